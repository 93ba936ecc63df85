"""The op `sgd` and fastcurv.SGD against torch.optim.SGD, and more than 2^31 elements."""

import copy
import itertools

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, OPTIONS, make_case, options_of
from torch import nn

import fastcurv
from fastcurv import _backend, ops

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
SHAPES = [(5, 7), (), (0,), (3, 2, 3, 3), (2100,)]


def torch_sgd(case):
    """The same call by torch.optim; the momentum is planted, and absent where the call is the first."""
    case = case.clone()
    options = dict(case.options)
    scale, first = options.pop("grad_scale", None), options.pop("is_first_step", False)
    leaves = [nn.Parameter(p) for p in case["params"]]
    optimizer = torch.optim.SGD(leaves, foreach=False, **options)
    for i, leaf in enumerate(leaves):
        leaf.grad = case["grads"][i] if scale is None else case["grads"][i] / scale
        if case["momentum_buffers"] and not first:
            optimizer.state[leaf] = {"momentum_buffer": case["momentum_buffers"][i]}
    optimizer.step()
    if first:
        case.lists["momentum_buffers"] = [optimizer.state[leaf]["momentum_buffer"] for leaf in leaves]
    return case


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("options", OPTIONS["sgd"])
def test_one_call_equals_torch_in_float64(options, backend, generator):
    case = make_case("sgd", dtype="float64", generator=generator, **options_of("sgd", options))
    ours, torchs = cases.run(case, backend), torch_sgd(case)
    for name, tensors in ours.outputs.items():
        for got, want in zip(tensors, torchs[name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


GRID = list(itertools.product((0.0, 0.9), (0.0, 0.5), (0.0, 0.1), (False, True), (False, True)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum, dampening, weight_decay, nesterov, maximize", [
    row for row in GRID if not (row[3] and (row[0] == 0 or row[1] != 0))
])  # fmt: skip
def test_several_steps_equal_torch(backend, momentum, dampening, weight_decay, nesterov, maximize, generator):
    """Gradients missing on some steps: with dampening, each parameter has a first step of its own."""
    options = {"lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
               "nesterov": nesterov, "maximize": maximize}  # fmt: skip
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in SHAPES]
    theirs, mine = ([nn.Parameter(p.clone()) for p in params] for _ in range(2))
    a, b = torch.optim.SGD(theirs, foreach=False, **options), fastcurv.SGD(mine, backend=backend, **options)
    for step in range(6):
        for i, (p, q) in enumerate(zip(theirs, mine, strict=True)):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(DEVICE)
            p.grad, q.grad = (None, None) if (step + i) % 4 == 1 else (g, g.clone())
        a.step()
        b.step()
        for p, q in zip(theirs, mine, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)
            # torch notes an empty buffer as None; an absent one means the same.
            theirs_state = {k: v for k, v in a.state[p].items() if v is not None}
            assert set(theirs_state) == set(b.state.get(q, {}))
            for key, value in theirs_state.items():
                torch.testing.assert_close(b.state[q][key], value, rtol=1e-13, atol=1e-13)


def test_nothing_is_kept_without_momentum():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.SGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer.state.get(p) and torch.allclose(p, torch.full_like(p, 0.9))


def test_momentum_switched_on_and_off_by_a_schedule():
    theirs, mine = (nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    a, b = torch.optim.SGD([theirs], lr=0.1, foreach=False), fastcurv.SGD([mine], lr=0.1)
    for step, momentum in enumerate((0.0, 0.9, 0.5, 0.0, 0.9)):
        for p, optimizer in ((theirs, a), (mine, b)):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = torch.full_like(p, step + 1.0)
            optimizer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_checkpoint_of_torch_before_the_first_momentum(dampening):
    """torch saves `momentum_buffer: None` for a parameter that has no momentum yet."""
    theirs, mine = (nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE)) for _ in range(2))
    a = torch.optim.SGD([theirs], lr=0.1, foreach=False)
    theirs.grad = torch.ones_like(theirs)
    a.step()
    a.param_groups[0].update(momentum=0.9, dampening=dampening)
    b = fastcurv.SGD([mine])
    saved = copy.deepcopy(a.state_dict())
    saved["state"] = {0: {"momentum_buffer": None}}
    b.load_state_dict(saved)
    with torch.no_grad():
        mine.copy_(theirs)
    for _ in range(3):
        for p, optimizer in ((theirs, a), (mine, b)):
            p.grad = torch.full_like(p, 2.0)
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(options):
    with pytest.raises(ValueError, match="nesterov=True: expected a momentum above zero and no dampening"):
        fastcurv.SGD([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_as_in_torch(backend, dtype):
    param = DTYPES[dtype][0]
    info, inf = torch.finfo(param), float("inf")
    values = [0.0, -0.0, 1.0, inf, -inf, float("nan"), info.max, info.tiny, info.smallest_normal / 8]
    grid = torch.tensor(values, dtype=torch.float64)
    params, grads = (x.reshape(-1).to(DEVICE, param) for x in torch.meshgrid(grid, grid, indexing="ij"))
    case = cases.Case("sgd", {"params": [params], "grads": [grads], "momentum_buffers": []}, {"lr": 0.25})
    arithmetic = torch.float64 if param == torch.float64 else torch.float32
    expected = torch_sgd(case.map(lambda t: t.to(arithmetic, copy=True)))["params"][0].to(param)
    result = cases.run(case, backend)["params"][0]
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(0.0, 1.0, -1.0) == 0, expected.nan_to_num(0.0, 1.0, -1.0) == 0)
    for kind in (torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(expected))


def available_bytes():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


@pytest.mark.large
def test_elements_beyond_two_to_the_31():
    """bfloat16, 4.3 GB of parameters, and of gradients of which only a few pages are ever touched."""
    if DEVICE.type == "cuda" or _backend.unusable("sgd", "cpp", DEVICE):
        pytest.skip("host memory")
    if available_bytes() < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    count = (1 << 31) + 12345
    # calloc: pages that nobody writes are all the one page of zeros.
    param, grad = (torch.zeros(count, dtype=torch.bfloat16) for _ in range(2))
    spots = [slice(0, 999), slice((1 << 31) - 999, (1 << 31) + 999), slice(count - 999, count)]
    for i, spot in enumerate(spots):
        grad[spot] = torch.arange(spot.stop - spot.start, dtype=torch.float32).remainder(97).add(i + 1).bfloat16()
    ops.sgd_([param], [grad], [], lr=0.5, momentum=0.0, backend="cpp")
    for spot in spots:
        assert torch.equal(param[spot], -0.5 * grad[spot])
    for start, end in itertools.pairwise([0, *itertools.chain(*((s.start, s.stop) for s in spots)), count]):
        if slice(start, end) not in spots:
            assert (
                not param[start : min(end, start + 100_000)].any() and not param[max(start, end - 100_000) : end].any()
            )


@pytest.mark.parametrize("how", ["cleared", "None"])
def test_a_momentum_that_was_reset_starts_as_the_gradient(how):
    """With dampening the first step differs; torch notes None where there is no momentum yet."""
    results = []
    for cls in (torch.optim.SGD, fastcurv.SGD):
        p = nn.Parameter(torch.zeros(3, device=DEVICE))
        optimizer = cls([p], lr=1.0, momentum=0.9, dampening=0.5)
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        if how == "cleared":
            optimizer.state[p].clear()
        else:
            optimizer.state[p]["momentum_buffer"] = None
        optimizer.step()
        optimizer.step()
        results.append(p)
    assert torch.equal(*results)
