"""The op `adam`: Adam, AdamW, AMSGrad, RAdam, NAdam and Yogi over lists of tensors."""

from __future__ import annotations

from torch import Tensor

from fastcurv.ops._multi_tensor import multi_tensor_op

# Rules for the second moment and the step; the list of state that each needs beyond the two moments.
RULES: dict[str, str | None] = {
    "adam": None,
    "amsgrad": "max_exp_avg_sqs",
    "radam": None,
    "nadam": "mu_products",
    "yogi": None,
}


@multi_tensor_op(optional=("max_exp_avg_sqs", "mu_products"))
def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    mu_products: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    mu_decay: float | Tensor = 0.0,
    rule: str = "adam",
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of an optimizer of the Adam family on a list of parameters, in place.

    The formulas are in `fastcurv.reference.adam`. Differs from `torch.optim` in: the state of half-precision parameters
    is float32; `grads` are never written, not even with `grad_scale`; bias corrections, the rectification of RAdam and
    the momentum schedule of NAdam are computed in double precision wherever the step count is.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        exp_avgs: First moments, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones. In bfloat16 averages stand still where 1 - beta is below 2^-8.
        exp_avg_sqs: Second moments, of the dtype of `exp_avgs`.
        max_exp_avg_sqs: Running maxima of the second moments for the rule `amsgrad`, else empty.
        mu_products: Products of the momenta so far for the rule `nadam`, one float32 element each, else empty.
        steps: Steps taken by each parameter, one float32 element each, on its device; advanced by one.
        lr: Learning rate. Like the next five: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment: of the bias-corrected one, but with `radam` of the raw one, as
            torch does.
        weight_decay: L2 penalty, or decoupled decay.
        mu_decay: Decay per step of the momentum schedule of `nadam`: 0.96^psi, where psi is torch's `momentum_decay`.
        rule: `adam`, `amsgrad`, `radam`, `nadam` or `yogi`.
        decoupled_weight_decay: Whether weight decay acts on the parameters (AdamW) and not through the gradient.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Kingma and Ba (2015), Algorithm 1; Reddi et al. (2018), Algorithm 2; Loshchilov and Hutter (2019),
    Algorithm 2; Liu et al. (2020), Algorithm 2; Dozat (2016), Algorithm 8; Zaheer et al. (2018), Algorithm 2; spec
    first_order 1.1, errata 3.1 items 1 to 4.

    Cost: 28 bytes per float32 element (22 for bfloat16 parameters with float32 state; 36 in float32 with `amsgrad`) and
    13 flops (17 with `nadam`); one launch, or one parallel region, for the whole list.

    Example:
        >>> import torch
        >>> from fastcurv.ops import adam_
        >>> p, m, v, t = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
        >>> adam_([p], [torch.full((3,), 2.0)], [m], [v], [], [], [t], lr=0.1)
        >>> p, t
        (tensor([0.9000, 0.9000, 0.9000]), tensor(1.))
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    needed = RULES[rule]
    given = {"max_exp_avg_sqs": max_exp_avg_sqs, "mu_products": mu_products}
    for name, tensors in given.items():
        if (name == needed) != (len(tensors) > 0) and params:
            wanted = f"{len(params)} tensors" if name == needed else "none"
            raise ValueError(f"{name}: expected {wanted} with rule={rule!r}, got {len(tensors) or 'none'}")
