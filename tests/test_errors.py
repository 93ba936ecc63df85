"""Bad input: the error names the argument and the index, says what to do, and nothing is written."""

import copy
import inspect
import itertools
import re

import pytest
import torch
from cases import DEVICE, make_case, op_of
from torch import nn
from training import OURS, make

import fastcurv
from fastcurv import _backend, _check

OTHER = torch.device("meta")
OPS = _backend.OPS
every_op = pytest.mark.parametrize("op", OPS)
every_optimizer = pytest.mark.parametrize("name", OURS)
SHAPES = [(4, 3), (5,), (64, 32)]


def full_case(op, shapes=SHAPES, **options):
    """A case in which no list is empty, but for what Adam's rules exclude."""
    return make_case(op, shapes, **({"rule": "amsgrad"} if op == "adam" else {}), **options)


def assert_op_refuses(case, error, match, backend=None):
    outputs = itertools.chain(*case.outputs.values())
    tensors = [t for t in outputs if isinstance(t, torch.Tensor) and t.layout is torch.strided]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(error, match=match):
        op_of(case.op)(*case.arguments, **case.options, backend=backend)
    for now, then in zip(tensors, before, strict=True):
        assert now.device.type == "meta" or torch.equal(now, then)


# kind of list: (index, what is made of the tensor, error, message with {name} for the list)
CHANGES = {
    "grad": [
        (2, lambda g: g.t(), ValueError, r"{name}\[2\]: expected shape \(64, 32\) like params\[2\], got \(32, 64\)"),
        (1, lambda g: g.double(), ValueError, r"{name}\[1\]: expected float32 like params\[1\], got float64"),
        (1, lambda g: g.long(), ValueError, r"{name}\[1\]: expected one of float32, .* got int64"),
        (1, lambda g: g + 0j, ValueError, r"{name}\[1\]: expected a real tensor, got complex64.*view_as_real"),
        (0, lambda g: g.to_sparse(), ValueError, r"{name}\[0\]: expected a dense tensor.*SparseAdam"),
        (1, lambda g: g.to(OTHER), ValueError, r"{name}\[1\]: expected device .* like params\[1\], got meta"),
        (1, lambda g: None, TypeError, r"{name}\[1\]: expected a torch.Tensor, got NoneType"),
    ],
    "param": [
        (1, lambda p: p[:1].expand(5), ValueError, r"{name}\[1\]: expected elements that fill their memory.*strides \(0,\)"),
        (1, lambda p: p.repeat(2)[::2], ValueError, r"{name}\[1\]: expected elements that fill their memory"),
        (1, lambda p: p.double(), ValueError, r"{name}\[1\]: expected float32 on .* like params\[0\], got float64"),
        (1, lambda p: p.to_sparse(), ValueError, r"{name}\[1\]: expected a dense tensor"),
    ],
    "state": [
        (0, lambda s: s.half(), ValueError, r"{name}\[0\]: expected float32 or bfloat16 for float32 params, got float16"),
        (2, lambda s: s.t().contiguous().t(), ValueError, r"{name}\[2\]: expected strides \(32, 1\) like params\[2\], got \(1, 64\)"),
        (1, lambda s: s[:4], ValueError, r"{name}\[1\]: expected shape \(5,\) like params\[1\], got \(4,\)"),
        (1, lambda s: s.to(OTHER), ValueError, r"{name}\[1\]: expected device .* like params\[1\], got meta"),
        (1, lambda s: None, TypeError, r"{name}\[1\]: expected a torch.Tensor, got NoneType"),
    ],
    "exact": [
        (0, lambda s: s.bfloat16(), ValueError, r"{name}\[0\]: expected float32 for float32 params, got bfloat16"),
        (2, lambda s: s.t().contiguous().t(), ValueError, r"{name}\[2\]: expected strides \(32, 1\) like params\[2\], got \(1, 64\)"),
    ],
    "row": [
        (2, lambda s: s[:63], ValueError, r"{name}\[2\]: expected 64 contiguous float32 elements on .*, got shape \(63, 1\)"),
        (0, lambda s: s.double(), ValueError, r"{name}\[0\]: expected 4 contiguous float32 elements.* float64"),
        (1, lambda s: s.repeat(2)[::2], ValueError, r"{name}\[1\]: expected 5 contiguous float32 elements"),
    ],
    "one": [(1, lambda s: s.double(), ValueError, r"{name}\[1\]: expected one float32 element.*float64")],
    "count": [
        (1, lambda s: s.long(), ValueError, r"{name}\[1\]: expected one float32 element.*int64"),
        (1, lambda s: 3, TypeError, r"{name}\[1\]: expected a torch.Tensor, got int"),
        (0, lambda s: s.repeat(2), ValueError, r"{name}\[0\]: expected one float32 element.* shape \(2,\)"),
    ],
}  # fmt: skip
BAD = [
    (op, name, i)
    for op in OPS
    for name in full_case(op, [(2,)]).lists
    if full_case(op, [(2,)])[name]
    for i in range(len(CHANGES[_check.kind(name)]))
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op, name, number", BAD)
def test_a_bad_tensor(op, name, number, backend):
    index, change, error, match = CHANGES[_check.kind(name)][number]
    case = full_case(op)
    case[name][index] = change(case[name][index])
    assert_op_refuses(case, error, match.replace("{name}", name), backend)


@every_op
def test_a_list_that_is_too_short(op):
    for name in full_case(op).lists:
        case = full_case(op)
        if name != "params" and case[name]:
            case[name].pop()
            assert_op_refuses(case, ValueError, rf"{name}: expected 3 tensors.* got 2")


@pytest.mark.parametrize("op", ["adam", "lamb", "ranger"])
def test_moments_of_two_dtypes(op):
    case = full_case(op)
    case["exp_avg_sqs"][2] = case["exp_avg_sqs"][2].bfloat16()
    assert_op_refuses(case, ValueError, r"exp_avg_sqs\[2\]: expected float32 like exp_avgs\[0\], got bfloat16")


needs_native = pytest.mark.skipif(_backend.native() is None, reason="overlap is found by the native extension")


@needs_native
@every_op
def test_overlapping_tensors(op):
    """Every two lists that are written, and a list with itself."""
    shaped = [name for name in full_case(op).outputs if name in full_case(op).shaped and full_case(op)[name]]
    for first, second in itertools.combinations_with_replacement(shaped, 2):
        case = full_case(op, [(6,), (6,), (6,)])
        base = torch.randn(9, device=DEVICE)
        case[first][0], case[second][2] = base[:6], base[3:]
        assert_op_refuses(
            case, ValueError, rf"{second}\[2\].*overlaps {first}\[0\]|{first}\[0\].*overlaps {second}\[2\]"
        )


@needs_native
@every_op
def test_overlap_that_appears_later_is_noticed(op):
    """The second call has the shapes of the first; only an address differs."""
    space = op_of(op).workspace()
    case = full_case(op, [(6,), (6,)])
    space.prepare(case.arguments)
    case["params"][1] = case["params"][0]
    with pytest.raises(ValueError, match=r"params\[1\].*overlaps params\[0\]"):
        space.prepare(case.arguments)


def with_option(op, name, value):
    case = full_case(op)
    case.options[name] = value
    return case


@every_op
def test_hyper_parameters(op):
    for name in op_of(op).scalars:
        bounded = name in _check._BOUNDED
        interval = rf"{name}: expected a value in \[0, {'1' if bounded else 'inf'}[\])]"
        for value in (-0.1, float("nan"), *((1.5,) if bounded else ()), *((1.0,) if name.startswith("beta") else ())):
            assert_op_refuses(with_option(op, name, value), ValueError, interval + f", got {value}")
        tensors = rf"{name}: expected a number or a tensor of one"
        assert_op_refuses(with_option(op, name, torch.ones(2)), ValueError, tensors)
        assert_op_refuses(with_option(op, name, torch.ones((), dtype=torch.int64)), ValueError, tensors)
        assert_op_refuses(with_option(op, name, True), TypeError, rf"{name}: expected a number")
        assert_op_refuses(with_option(op, name, "fast"), TypeError, rf"{name}: expected a number")
    for name in ("grad_scale", "found_inf"):
        if name != "grad_scale" or "grads" in full_case(op).lists:
            case = with_option(op, name, torch.ones((), device=OTHER))
            assert_op_refuses(case, ValueError, rf"{name}: expected a tensor on .* got meta")


@every_op
def test_a_named_back_end_that_cannot_run(op):
    name = "cpp" if DEVICE.type == "cuda" else "cuda"
    match = rf"backend='{name}' cannot run {op} on .*: needs tensors on"
    assert_op_refuses(full_case(op), ValueError, match, backend=name)
    match = "unknown; expected one of cuda, triton, cpp, reference"
    assert_op_refuses(full_case(op), ValueError, match, backend="rocm")


def ones(*shape):
    return nn.Parameter(torch.ones(*shape, device=DEVICE))


@every_optimizer
def test_an_optimizer_on_a_back_end_that_cannot_run(name):
    p = ones(3)
    optimizer = make(name, [p], backend="cpp" if DEVICE.type == "cuda" else "cuda")
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="cannot run"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def bad_options(name):
    defaults = OURS[name][0]([ones(3)]).defaults
    yield {"lr": -1.0}, ValueError, "lr: expected"
    yield {"lr": "fast"}, TypeError, "lr: expected a number"
    yield {"lr": torch.ones(3)}, ValueError, "lr: expected"
    for key in ("eps", "weight_decay", "momentum", "momentum_decay", "initial_accumulator", "trust_coefficient"):
        if key in defaults:
            yield {key: -1.0}, ValueError, f"{key}: expected"
    if "betas" in inspect.signature(OURS[name][0]).parameters:
        yield {"betas": (0.9, 1.0)}, ValueError, "beta2: expected"
        yield {"betas": (-0.1, 0.9)}, ValueError, "beta1: expected"
    if "beta" in defaults:
        yield {"beta": 1.0}, ValueError, "beta: expected"
    if "alpha" in defaults:
        yield {"alpha": 1.1}, ValueError, "alpha: expected"
    if "differentiable" in defaults and hasattr(torch.optim, name):
        yield (
            {"differentiable": True},
            ValueError,
            rf"differentiable=True: .*autograd cannot follow.*torch.optim.{name}",
        )


@every_optimizer
def test_constructor(name):
    cls = OURS[name][0]
    for options, error, match in bad_options(name):
        with pytest.raises(error, match=match):
            cls([ones(3)], **options)
        optimizer = cls([ones(3)])
        p = nn.Parameter(torch.arange(6.0).view(2, 3))
        before = p.detach().clone()
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [p], **options})
        assert len(optimizer.param_groups) == 1 and torch.equal(p, before)


def test_differentiable_yogi_points_nowhere_that_is_not():
    with pytest.raises(ValueError, match="differentiable=True") as caught:
        fastcurv.Yogi([ones(3)], differentiable=True)
    named = re.findall(r"torch\.optim\.(\w+)", str(caught.value))
    assert all(hasattr(torch.optim, name) for name in named)


@every_optimizer
def test_an_error_in_the_second_group_leaves_the_first_unwritten(name):
    params = [nn.Parameter(torch.randn(3, n, device=DEVICE)) for n in (3, 4, 5)]
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}])
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    dense, params[2].grad = params[2].grad, params[2].grad.to_sparse()
    with pytest.raises(ValueError, match=r"parameter group 1: grads\[1\]: expected a dense tensor"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not any(torch.is_tensor(s.get("step")) and s["step"] for s in optimizer.state.values())
    params[2].grad = dense
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


@every_optimizer
def test_messages_count_parameters_as_the_group_does(name):
    params = [ones(3) for _ in range(4)]
    optimizer = make(name, params)
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
        for name in OURS:
            p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
            optimizer = make(name, [p])
            p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
            with pytest.raises(
                TypeError, match=r"params\[0\]: expected a plain tensor, got DTensor.*not supported yet"
            ):
                optimizer.step()
            assert not optimizer.state[p]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bad, error, match", [
    ({"k": 0}, ValueError, "k: expected a whole number of at least 1, got 0"),
    ({"k": 6.0}, ValueError, "k: expected a whole number of at least 1, got 6.0"),
    ({"lr": "x"}, TypeError, "lr: expected a number or a one-element tensor, got str"),
    ({"lr": None}, TypeError, "lr: expected a number or a one-element tensor, got NoneType"),
    ({"lr": torch.ones(2)}, ValueError, "lr: expected a number or a tensor of one float32 or float64 element"),
    ({"lr": torch.tensor(1)}, ValueError, "lr: expected a number or a tensor of one float32 or float64 element"),
    ({"lr": torch.ones((), device="meta")}, ValueError, "lr: expected a tensor on .* like the parameters, got meta"),
    ({"maximize": "yes"}, TypeError, "maximize: expected True or False, got 'yes'"),
    ({"momentum_decay": -1}, ValueError, r"momentum_decay: expected a value in \[0, inf\), got -1"),
])  # fmt: skip
@every_optimizer
def test_what_is_set_after_construction_is_checked_before_any_group_is_written(name, bad, error, match):
    first, second = ones(3, 2), ones(3, 2)
    optimizer = make(name, [{"params": [first]}, {"params": [second]}])
    if not set(bad) <= set(optimizer.param_groups[1]):
        pytest.skip("an option of others")
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    before = copy.deepcopy((first.data, optimizer.state_dict()["state"]))
    optimizer.param_groups[1].update(bad)
    with pytest.raises(error, match=f"parameter group 1: {match}"):
        optimizer.step()
    after = (first.data, optimizer.state_dict()["state"])
    assert str(before) == str(after)


@every_optimizer
def test_a_step_that_fails_leaves_no_state_behind(name):
    first, second = ones(3, 2), ones(3, 2)
    optimizer = make(name, [{"params": [first]}, {"params": [second]}])
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second).to_sparse()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter group 1: grads\[0\]: expected a dense tensor"):
            optimizer.step()
        assert not optimizer.state
    alone, same = ones(3, 2), ones(3, 2)
    undisturbed = make(name, [{"params": [alone]}, {"params": [same]}])
    for p in (second, alone, same):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
        undisturbed.step()
    assert torch.equal(first, alone) and torch.equal(second, same)
    first.grad = torch.ones_like(first).to_sparse()
    state = {key: value.clone() for key, value in optimizer.state[second].items()}
    optimizer.state[second]["step"] = 2  # would be made a tensor again
    with pytest.raises(ValueError, match=r"parameter group 0: grads\[0\]"):
        optimizer.step()
    assert optimizer.state[second]["step"] == 2
    assert all(torch.equal(value, optimizer.state[second][key]) for key, value in state.items() if key != "step")


@every_optimizer
def test_a_dtype_of_state_that_cannot_be_had(name):
    if "state_dtype" not in inspect.signature(OURS[name][0]).parameters:
        pytest.skip("keeps no state whose dtype may be chosen")
    for dtype in (torch.float16, torch.float64, "bfloat16"):
        with pytest.raises(ValueError, match=r"state_dtype: expected torch\.float32, torch\.bfloat16 or None"):
            make(name, [ones(3)], state_dtype=dtype)


@every_optimizer
def test_sparse_state_in_a_checkpoint(name):
    p = ones(3, 2)
    optimizer = make(name, [p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    key = next(key for key, value in saved["state"][0].items() if value.dim() > 1)
    saved["state"][0] = {**saved["state"][0], key: saved["state"][0][key].to_sparse()}
    saved["param_groups"][0]["lr"] = 0.25
    with pytest.raises(ValueError, match=f"expected a dense '{key}', got layout torch.sparse_coo"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] != 0.25 and optimizer.state[p][key].layout is torch.strided


def saved_by(optimizer, **state):
    return {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}


@every_optimizer
def test_checkpoints_that_cannot_be_loaded(name):
    """Of another optimizer, of another model, or without something that cannot be made up: nothing is loaded."""
    p = ones(3, 2)
    optimizer = make(name, [p], lr=0.5)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    bad = []
    for key, value in before.items():
        wrong = torch.ones(7)
        bad.append(({**before, key: wrong}, rf"params'\]\[0\]: expected '{key}' of shape .*, got \(7,\)"))
        if key not in optimizer._optional_keys:
            others = {k: v for k, v in before.items() if k != key} or {"of_another": value}
            bad.append((others, rf"params'\]\[0\]: expected a key '{key}', found .*cannot make up"))
    for state, match in bad:
        saved = saved_by(make(name, [ones(3, 2)], lr=0.25), **state)
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.items())
    assert bad


@pytest.mark.parametrize("name", OURS)
def test_a_back_end_that_is_no_name_is_refused_at_construction(name):
    with pytest.raises(
        (TypeError, ValueError), match=r"backend: expected one of cuda, triton, cpp, reference, or None, got \['cpp'\]"
    ):
        OURS[name][0]([ones(2, 3)], backend=["cpp"])
