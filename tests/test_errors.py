"""Bad input: the error names the argument and the index, says what to do, and nothing is written."""

import pytest
import torch
from cases import DEVICE, adam_case
from torch import nn

import fastcurv
from fastcurv import ops

OTHER = torch.device("meta")


def snapshot(tensors):
    return [t.detach().clone() for t in tensors]


def assert_op_refuses(case, error, match, backend=None):
    tensors = [
        t for tensors in case.outputs for t in tensors if isinstance(t, torch.Tensor) and t.layout is torch.strided
    ]
    before = snapshot(tensors)
    with pytest.raises(error, match=match):
        ops.adam_(*case.lists, **case.options, backend=backend)
    for now, then in zip(tensors, before, strict=True):
        assert now.device.type == "meta" or torch.equal(now, then)


SHAPES = [(4, 3), (5,), (64, 32)]


def bad_grad(index, make):
    def change(case):
        case.grads[index] = make(case.grads[index])

    return change


BAD = {
    "shape": (
        bad_grad(2, lambda g: g.t()),
        ValueError,
        r"grads\[2\]: expected shape \(64, 32\) like params\[2\], got \(32, 64\)",
    ),
    "dtype": (
        bad_grad(1, lambda g: g.double()),
        ValueError,
        r"grads\[1\]: expected float32 like params\[1\], got float64",
    ),
    "integer": (bad_grad(1, lambda g: g.long()), ValueError, r"grads\[1\]: expected one of float32, .* got int64"),
    "complex": (
        bad_grad(1, lambda g: g + 0j),
        ValueError,
        r"grads\[1\]: expected a real tensor, got complex64.*view_as_real",
    ),
    "sparse": (bad_grad(0, lambda g: g.to_sparse()), ValueError, r"grads\[0\]: expected a dense tensor.*SparseAdam"),
    "device": (
        bad_grad(1, lambda g: g.to(OTHER)),
        ValueError,
        r"grads\[1\]: expected device .* like params\[1\], got meta",
    ),
    "no-tensor": (bad_grad(1, lambda g: None), TypeError, r"grads\[1\]: expected a torch.Tensor, got NoneType"),
    "count": (lambda c: c.grads.pop(), ValueError, r"grads: expected 3 tensors, one for each of params, got 2"),
    "state-count": (lambda c: c.exp_avgs.pop(), ValueError, r"exp_avgs: expected 3 tensors.* got 2"),
    "steps-count": (lambda c: c.steps.pop(), ValueError, r"steps: expected 3 tensors.* got 2"),
    "state-dtype": (
        lambda c: c.exp_avgs.__setitem__(0, c.exp_avgs[0].half()),
        ValueError,
        r"exp_avgs\[0\]: expected float32 or bfloat16 for float32 params, got float16",
    ),
    "mixed-state": (
        lambda c: c.exp_avg_sqs.__setitem__(2, c.exp_avg_sqs[2].bfloat16()),
        ValueError,
        r"exp_avg_sqs\[2\]: expected float32 like exp_avgs\[0\], got bfloat16",
    ),
    "state-layout": (
        lambda c: c.exp_avgs.__setitem__(2, c.exp_avgs[2].t().contiguous().t()),
        ValueError,
        r"exp_avgs\[2\]: expected strides \(32, 1\) like params\[2\], got \(1, 64\)",
    ),
    "step-dtype": (
        lambda c: c.steps.__setitem__(1, torch.tensor(1)),
        ValueError,
        r"steps\[1\]: expected one float32 element.*int64",
    ),
    "expanded": (
        lambda c: c.params.__setitem__(1, torch.ones(1, device=DEVICE).expand(5)),
        ValueError,
        r"params\[1\]: expected elements that fill their memory without gaps or overlap.*strides \(0,\)",
    ),
    "strided": (
        lambda c: c.params.__setitem__(1, torch.ones(10, device=DEVICE)[::2]),
        ValueError,
        r"params\[1\]: expected elements that fill their memory",
    ),
    "mixed-params": (
        lambda c: (c.params.__setitem__(1, c.params[1].double()), c.grads.__setitem__(1, c.grads[1].double())),
        ValueError,
        r"params\[1\]: expected float32 on .* like params\[0\], got float64",
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", BAD)
def test_op(name, backend, generator):
    change, error, match = BAD[name]
    case = adam_case(SHAPES, generator=generator)
    change(case)
    assert_op_refuses(case, error, match, backend)


@pytest.mark.parametrize("first, second, names", [
    (("params", 0), ("params", 2), r"params\[2\].*overlaps params\[0\]"),
    (("params", 1), ("exp_avgs", 1), r"exp_avgs\[1\].*overlaps params\[1\]"),
    (("exp_avgs", 0), ("exp_avg_sqs", 2), r"exp_avg_sqs\[2\].*overlaps exp_avgs\[0\]"),
])  # fmt: skip
def test_overlapping_tensors(first, second, names, generator):
    case = adam_case([(6,), (6,), (6,)], generator=generator)
    base = torch.randn(9, device=DEVICE)
    getattr(case, first[0])[first[1]] = base[:6]
    getattr(case, second[0])[second[1]] = base[3:] if first[1] != second[1] else base[:6]
    assert_op_refuses(case, ValueError, names)


def test_overlap_that_appears_later_is_noticed(generator):
    """The second call has the shapes of the first; only an address differs."""
    space = ops.adam.workspace()
    case = adam_case([(6,), (6,)], generator=generator)
    space.prepare(case.lists)
    case.params[1] = case.params[0]
    with pytest.raises(ValueError, match=r"params\[1\].*overlaps params\[0\]"):
        space.prepare(case.lists)


@pytest.mark.parametrize("options, match", [
    ({"lr": -0.1}, r"lr: expected a value in \[0, inf\), got -0.1"),
    ({"lr": float("nan")}, r"lr: expected a value"),
    ({"beta1": 1.0}, r"beta1: expected a value in \[0, 1\), got 1.0"),
    ({"beta2": -0.5}, r"beta2: expected a value in \[0, 1\)"),
    ({"eps": -1e-8}, r"eps: expected a value"),
    ({"weight_decay": -1.0}, r"weight_decay: expected a value"),
    ({"lr": torch.ones(2)}, r"lr: expected a number or a tensor of one"),
    ({"lr": torch.ones((), dtype=torch.int64)}, r"lr: expected a number or a tensor of one"),
    ({"grad_scale": torch.ones((), device=OTHER)}, r"grad_scale: expected a tensor on"),
    ({"amsgrad": True}, r"max_exp_avg_sqs: expected 3 tensors with amsgrad=True, got none"),
])  # fmt: skip
def test_hyper_parameters(options, match, generator):
    case = adam_case(SHAPES, generator=generator)
    case.options.update(options)
    assert_op_refuses(case, ValueError, match)


def test_a_named_back_end_that_cannot_run(generator):
    case = adam_case(SHAPES, generator=generator)
    name = "cpp" if DEVICE.type == "cuda" else "cuda"
    assert_op_refuses(case, ValueError, rf"backend='{name}' cannot run adam on .*: needs tensors on", backend=name)
    assert_op_refuses(case, ValueError, "unknown; expected one of cuda, triton, cpp, reference", backend="rocm")
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Adam([p], backend=name)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="cannot run"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("options, error, match", [
    ({"lr": -1.0}, ValueError, "lr: expected"),
    ({"betas": (0.9, 1.0)}, ValueError, "beta2: expected"),
    ({"eps": -1.0}, ValueError, "eps: expected"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay: expected"),
    ({"lr": "fast"}, TypeError, "lr: expected a number"),
    ({"lr": torch.ones(3)}, ValueError, "lr: expected"),
    ({"differentiable": True}, ValueError, "differentiable=True: .*autograd cannot follow.*torch.optim.Adam"),
])  # fmt: skip
@pytest.mark.parametrize("cls", [fastcurv.Adam, fastcurv.AdamW])
def test_constructor(cls, options, error, match):
    with pytest.raises(error, match=match):
        cls([nn.Parameter(torch.ones(3))], **options)
    optimizer = cls([nn.Parameter(torch.ones(3))])
    if "differentiable" not in options:
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **options})
        assert len(optimizer.param_groups) == 1


def test_an_error_in_the_second_group_leaves_the_first_unwritten():
    a, b, c = (nn.Parameter(torch.ones(n, device=DEVICE)) for n in (3, 4, 5))
    optimizer = fastcurv.Adam([{"params": [a]}, {"params": [b, c]}], lr=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    c.grad = torch.ones(5, device=DEVICE).to_sparse()
    with pytest.raises(ValueError, match=r"parameter group 1: grads\[1\]: expected a dense tensor"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in (a, b, c))
    assert not any(torch.is_tensor(s.get("step")) and s["step"] for s in optimizer.state.values())
    c.grad = torch.ones(5, device=DEVICE)
    optimizer.step()
    assert all((p < 1).all() for p in (a, b, c))


def test_messages_count_parameters_as_the_group_does():
    params = [nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(4)]
    optimizer = fastcurv.Adam(params)
    for p in params[2:]:
        p.grad = torch.ones_like(p)
    params[3].grad = torch.ones(3, device=DEVICE).to_sparse()
    with pytest.raises(ValueError, match=r"grads\[3\]"):
        optimizer.step()


def test_sharded_parameters_are_refused_cleanly():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
        optimizer = fastcurv.AdamW([p])
        p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"params\[0\]: expected a plain tensor, got DTensor.*not supported yet"):
            optimizer.step()
        assert not optimizer.state[p]
    finally:
        torch.distributed.destroy_process_group()


def checkpoint(**state):
    return {
        "state": {0: state},
        "param_groups": [{**fastcurv.Adam([nn.Parameter(torch.ones(3))]).state_dict()["param_groups"][0]}],
    }


@pytest.mark.parametrize("state, match", [
    ({"momentum_buffer": torch.ones(3)}, r"params'\]\[0\]: expected a key 'step', found \['momentum_buffer'\].*cannot make up"),
    ({"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}, "expected a key 'exp_avg_sq'"),
    ({"step": 1, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(3)}, r"'exp_avg' of shape \(3,\), got \(4,\)"),
])  # fmt: skip
def test_checkpoints_that_cannot_be_loaded(state, match):
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Adam([p], lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(checkpoint(**state))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())


def test_a_checkpoint_without_the_maximum_starts_it_anew():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Adam([p], amsgrad=True)
    saved = checkpoint(step=torch.tensor(5.0), exp_avg=torch.ones(3), exp_avg_sq=torch.full((3,), 4.0))
    saved["param_groups"][0]["amsgrad"] = True
    optimizer.load_state_dict(saved)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["max_exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
