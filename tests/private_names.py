"""Private names of torch that fastcurv uses. tests/test_private_names.py compares this list with the sources.

A release of torch may drop any of them without notice; each entry says where a name is used and why no public one does.
"""

HOOKS = "torch has public functions to register these hooks, but none to run them for a wrapped optimizer"
FOREACH = "torch has no public operation over lists of tensors; torch.optim uses the same names"

# name: (files that use it, why)
PRIVATE_NAMES = {
    "torch._C._len_torch_dispatch_stack": (
        {"fastcurv/_library.py"},
        "no public function says whether a TorchDispatchMode is active",
    ),
    "torch._foreach_copy_": (
        {"bench/truths.py", "kernels/_batches.py", "kernels/kron_apply.py", "kernels/kron_factor.py"},
        FOREACH,
    ),
    "torch._foreach_lerp": ({"fastcurv/optim/muon.py"}, FOREACH),
    "torch._foreach_lerp_": ({"bench/truths.py"}, FOREACH),
    "torch._foreach_neg": ({"fastcurv/optim/muon.py"}, FOREACH),
    "torch.nn.modules.conv._ConvNd": (
        {"fastcurv/optim/orthogonal.py"},
        "the convolutions of all dimensions have no public base class",
    ),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        {"fastcurv/_check.py"},
        "no public function tells a tensor that wraps others, such as a DTensor, from one with memory of its own",
    ),
    "Optimizer._optimizer_load_state_dict_post_hooks": ({"fastcurv/optim/_wrapper.py"}, HOOKS),
    "Optimizer._optimizer_load_state_dict_pre_hooks": ({"fastcurv/optim/_wrapper.py"}, HOOKS),
    "Optimizer._optimizer_state_dict_post_hooks": ({"fastcurv/optim/_wrapper.py"}, HOOKS),
    "Optimizer._optimizer_state_dict_pre_hooks": ({"fastcurv/optim/_wrapper.py"}, HOOKS),
    "Tensor._is_zerotensor": (
        {"fastcurv/_check.py", "fastcurv/ops/_matrices.py"},
        "no public function tells a tensor of zeros without memory, which autograd may return as a gradient",
    ),
    "amp._step_supports_amp_scaling": (
        {"fastcurv/optim/_state.py", "fastcurv/optim/muon.py", "fastcurv/optim/osgd.py"},
        "GradScaler reads this attribute of an optimizer to decide who unscales the gradients",
    ),
    "distributed.fsdp._fsdp_flattened": (
        {"fastcurv/_check.py"},
        "FSDP1 marks the shards that it flattened with this attribute only",
    ),
}
