"""fastcurv.Muon against float64 steps of the published algorithm, and against torch.optim.Muon."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import DEVICE, matrix_backends
from torch import nn
from training import assert_same_weights, copy_weights, network, parameters_of, set_grads, train

import fastcurv
from fastcurv.optim.muon import ADJUSTMENTS

BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
torch_muon = getattr(torch.optim, "Muon", None)


def newton_schulz(g, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    a, b, c = coefficients
    x = g.flatten(1)
    x = x if x.shape[0] <= x.shape[1] else x.mT
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if g.shape[0] <= g.flatten(1).shape[1] else x.mT).reshape(g.shape)


def published(param, grads, lr=0.02, wd=0.1, momentum=0.95, nesterov=True, adjust="original"):
    """Jordan et al. (2024) with decoupled decay, in float64."""
    p, buffer = param.double(), torch.zeros_like(param, dtype=torch.float64)
    rows, columns = p.shape[0], p[0].numel()
    scale = max(1, rows / columns) ** 0.5 if adjust == "original" else 0.2 * max(rows, columns) ** 0.5
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g.double()
        ahead = (1 - momentum) * g.double() + momentum * buffer if nesterov else buffer
        p = (1 - lr * wd) * p - lr * scale * newton_schulz(ahead)
    return p


def gradients(shape, count, generator, dtype=torch.float64):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count)]


@every_backend
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 3, 3, 3), (70, 90)], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"weight_decay": 0.0, "momentum": 0.5},
])  # fmt: skip
def test_published_steps(shape, options, backend, generator):
    grads = gradients(shape, 4, generator)
    p = nn.Parameter(gradients(shape, 1, generator)[0])
    settings = {"wd": options.get("weight_decay", 0.1), "adjust": options.get("adjust_lr_fn", "original")}
    settings |= {k: v for k, v in options.items() if k in ("nesterov", "momentum")}
    expected = published(p.detach(), grads, **settings)
    optimizer = fastcurv.Muon([p], lr=0.02, backend=backend, **options)
    for g in grads:
        p.grad = g
        optimizer.step()
        assert p.grad is g
    torch.testing.assert_close(p.data, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(torch_muon is None, reason="this torch has no Muon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
def test_no_farther_from_float64_than_torch(dtype, nesterov, generator):
    shape = (24, 40)
    start, grads = gradients(shape, 1, generator, dtype)[0], gradients(shape, 5, generator, dtype)
    expected = published(start, grads, nesterov=nesterov)
    errors = []
    for cls in (fastcurv.Muon, torch_muon):
        p = nn.Parameter(start.clone())
        optimizer = cls([p], lr=0.02, weight_decay=0.1, nesterov=nesterov)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        errors.append((p.double() - expected).norm().item())
        if cls is fastcurv.Muon:  # torch overwrites it in bfloat16 without Nesterov momentum
            momentum = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
            for g in grads:
                momentum = momentum + 0.05 * (g.double() - momentum)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), momentum, rtol=1e-5, atol=1e-6)
    assert errors[0] <= errors[1]


def test_other_parameters_are_those_of_adamw():
    mine, theirs = network(), network()
    groups = fastcurv.param_groups(mine, skip_last_linear=True)
    optimizer = fastcurv.Muon(groups, lr=0.02, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    named = dict(theirs.named_parameters())
    others = [
        named[name]
        for name in groups[1]["params"]
        and [n for n, _ in fastcurv.param_groups(theirs, skip_last_linear=True)[1]["params"]]
    ]
    plain = torch.optim.AdamW(others, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for step in range(5):
        set_grads(list(mine.parameters()), step)
        set_grads(list(theirs.parameters()), step)
        optimizer.step()
        plain.step()
    for p, q in zip(optimizer.param_groups[1]["params"], others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    for p in optimizer.param_groups[0]["params"]:
        assert set(optimizer.state[p]) == {"momentum_buffer"}


def test_plain_parameters_stay_one_group_and_their_dimensions_decide():
    for params in (network().parameters(), network().named_parameters()):
        optimizer = fastcurv.Muon(params, lr=0.02)
        (group,) = optimizer.param_groups
        train(optimizer, [0])
        for param in group["params"]:
            wanted = {"momentum_buffer"} if param.dim() > 1 else {"step", "exp_avg", "exp_avg_sq"}
            assert set(optimizer.state[param]) == wanted
    assert group["param_names"][1] == "0.bias"


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_continues_from_a_copy(how, dtype):
    source, target = network(dtype), network(dtype)
    a = fastcurv.Muon(source.parameters(), lr=0.02, adamw_lr=0.01)
    train(a, range(3))
    if how == "state_dict":
        copy_weights(source.parameters(), target.parameters())
        b = fastcurv.Muon(target.parameters())
        b.load_state_dict(copy.deepcopy(a.state_dict()))
    else:
        b = pickle.loads(pickle.dumps(a)) if how == "pickle" else copy.deepcopy(a)
    train(a, range(3, 7))
    train(b, range(3, 7))
    assert_same_weights(parameters_of(a), parameters_of(b))


@pytest.mark.skipif(torch_muon is None, reason="this torch has no Muon")
def test_a_checkpoint_of_torch_loads():
    p, q = (nn.Parameter(torch.eye(4, 6, device=DEVICE)) for _ in range(2))
    theirs, mine = torch_muon([p], lr=0.02), fastcurv.Muon([q], lr=0.5)
    set_grads([p], 0)
    theirs.step()
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert mine.param_groups[0]["lr"] == 0.02 and mine.param_groups[0]["momentum"] == 0.95
    torch.testing.assert_close(mine.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
    set_grads([q], 1)
    mine.step()


def test_schedulers_closure_scaler_and_missing_gradients():
    net = network(torch.float32)
    params = list(net.parameters())
    optimizer = fastcurv.Muon(params, lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = net(x).square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.step(lambda: 3.5) == 3.5
    before = params[0].detach().clone()
    set_grads(params, 0, skip={0})
    optimizer.step()
    assert torch.equal(params[0], before)


def test_a_layer_that_is_not_finite_keeps_its_momentum():
    p, q = (nn.Parameter(torch.eye(4, 6, device=DEVICE)) for _ in range(2))
    optimizer = fastcurv.Muon([("first", p), ("second", q)], lr=0.02, weight_decay=0.0)
    train(optimizer, [0])
    before, momentum = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
    set_grads([p, q], 1)
    p.grad[0, 0] = float("inf")
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
    set_grads([p, q], 2)
    with pytest.warns(UserWarning, match="the gradient of 'first' held NaN or infinity"):
        optimizer.step()
    assert p.isfinite().all() and not torch.equal(p, before)


def test_errors():
    p, bias = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"params\[1\]: expected two dimensions or more in a group with orthogonal=True"
    ):
        fastcurv.Muon([{"params": [p, bias], "orthogonal": True}])
    for options, match in [
        ({"lr": -1.0}, r"lr: expected a value in \[0, inf\)"),
        (
            {"adjust_lr_fn": "rms"},
            "adjust_lr_fn: expected one of original, match_rms_adamw, spectral_unclamped, or None",
        ),
        ({"ns_steps": 0}, "steps: expected a whole number"),
        ({"ns_coefficients": "quintic"}, "coefficients: expected one of"),
        ({"method": "svd"}, "method: expected one of"),
    ]:
        with pytest.raises(ValueError, match=match):
            fastcurv.Muon([p], **options)
    optimizer = fastcurv.Muon([{"params": [p]}, {"params": [bias]}], lr=0.1)
    p.grad, bias.grad = torch.ones(3, 3), torch.ones(3).to_sparse()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"grads\[0\]: expected a dense tensor"):
        optimizer.step()
    assert torch.equal(p, torch.eye(3)) and not optimizer.state


def test_what_gets_no_gradient_comes_to_rest(generator):
    """As in torch: below eps the momentum is not scaled up any more, and a norm of 1e-42 is no NaN."""
    for shape in ((8, 12), (150, 200)):
        p = nn.Parameter(torch.zeros(shape, device=DEVICE))
        optimizer = fastcurv.Muon([p], lr=0.1, weight_decay=0.0)
        p.grad = 1e-3 * torch.randn(shape, generator=generator).to(DEVICE)
        optimizer.step()
        optimizer.state[p]["momentum_buffer"].mul_(1e-39)
        p.grad.zero_()
        before = p.detach().clone()
        for _ in range(3):
            optimizer.step()
        assert p.isfinite().all() and (p - before).abs().max() < 1e-20


def test_options_of_a_group_count(generator):
    grad = torch.randn(6, 10, generator=generator).to(DEVICE)
    for name, value in {
        "ns_steps": 2, "ns_coefficients": (1.5, -0.5, 0.0), "momentum": 0.5, "nesterov": False, "maximize": True,
        "adjust_lr_fn": "match_rms_adamw", "eps": 1e3,
    }.items():  # fmt: skip
        p, q, r = (nn.Parameter(torch.zeros(6, 10, device=DEVICE)) for _ in range(3))
        one = fastcurv.Muon([{"params": [p]}, {"params": [q], name: value}], lr=0.1)
        other = fastcurv.Muon([r], lr=0.1, **{name: value})
        for x in (p, q, r):
            x.grad = grad.clone()
        one.step(), other.step()
        assert torch.equal(q, r) and not torch.equal(p, q), name
        if name == "maximize":
            assert torch.equal(p, -q)


@pytest.mark.parametrize("options, match", [
    (dict(momentum=2.0), r"momentum: expected a value in \[0, 1\)"),
    (dict(adamw_betas=(2.0, 0.9)), "beta1: expected a value in"),
    (dict(nesterov="x"), "nesterov: expected True or False"),
    (dict(ns_steps=0), "ns_steps: expected a whole number"),
    (dict(ns_coefficients=(1.0, 2.0)), "ns_coefficients: expected one of"),
    (dict(ns_coefficients=3), "ns_coefficients: expected one of"),
    (dict(ns_coefficients=(float("nan"), 0.0, 0.0)), "ns_coefficients: expected one of"),
    (dict(backend="x"), "backend: expected one of"),
    (dict(eps=-1.0), "eps: expected a value in"),
    (dict(method="qr"), "method: expected one of"),
])  # fmt: skip
def test_options_are_checked_at_once(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        fastcurv.Muon([nn.Parameter(torch.zeros(2, 3, device=DEVICE))], **options)


def test_a_bad_group_adds_nothing_and_a_bad_option_writes_nothing():
    model = nn.Linear(3, 2).to(DEVICE)
    optimizer = fastcurv.Muon(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2)), model.bias]})
    with pytest.raises(ValueError, match="orthogonal: expected True or False"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "orthogonal": "x"})
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.zeros(2, 2))}})
    assert len(optimizer.param_groups) == 1
    model(torch.ones(1, 3, device=DEVICE)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["adjust_lr_fn"] = "x"
    with pytest.raises(ValueError, match="adjust_lr_fn: expected one of"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)) and not optimizer.state
    empty = nn.Parameter(torch.zeros(5, 0, device=DEVICE))
    optimizer = fastcurv.Muon([empty])
    empty.grad = torch.zeros_like(empty)
    optimizer.step()


def test_checkpoints_of_other_models_load_nothing():
    def make(rows, columns):
        p = nn.Parameter(torch.ones(rows, columns, device=DEVICE))
        p.grad = torch.ones_like(p)
        return fastcurv.Muon([p]), p

    one, _ = make(1, 9)
    one.step()
    other, q = make(6, 9)
    with pytest.raises(ValueError, match=r"expected 'momentum_buffer' of shape \(6, 9\), got \(1, 9\)"):
        other.load_state_dict(one.state_dict())
    adamw = torch.optim.AdamW([q])
    adamw.step()
    with pytest.raises(ValueError, match=r"expected a key 'momentum_buffer', found .*exp_avg.*cannot make up"):
        other.load_state_dict(adamw.state_dict())
    assert not other.state

    same, p = make(1, 9)
    same.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["optim"])
    same.load_state_dict({"optim": one.state_dict()})
    assert torch.equal(same.state[p]["momentum_buffer"], next(iter(one.state.values()))["momentum_buffer"])


def test_compiled_step():
    ours, twins = (list(network().parameters()) for _ in range(2))
    one, other = (fastcurv.Muon(params, lr=0.1) for params in (ours, twins))
    compiled = torch.compile(lambda: other.step(), backend="aot_eager")
    for seed in range(3):
        set_grads(ours, seed)
        set_grads(twins, seed)
        one.step(), compiled()
    for p, q in zip(ours, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def mixed(dtype=torch.float32):
    return [nn.Parameter(torch.ones(shape, dtype=dtype, device=DEVICE)) for shape in ((4, 6), (6,))]


def test_one_cycle_cycles_the_momentum_of_muon_as_of_torchs():
    (p, b) = mixed()
    optimizer = fastcurv.Muon([p, b], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    q = nn.Parameter(torch.ones(4, 6, device=DEVICE))
    twin = torch.optim.SGD([q], lr=0.1, momentum=0.95)  # torch's Muon is not in every torch
    expected = torch.optim.lr_scheduler.OneCycleLR(twin, max_lr=0.1, total_steps=10)
    seen = []
    for step in range(9):
        set_grads([p, b, q], step)
        optimizer.step(), schedule.step(), twin.step(), expected.step()
        seen.append(optimizer.param_groups[0]["momentum"])
        assert seen[-1] == twin.param_groups[0]["momentum"]
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert max(seen) - min(seen) > 0.05


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_see_the_groups_that_were_given(tensor):
    params = mixed()
    rate = torch.tensor(0.5, device=DEVICE) if tensor else 0.5
    optimizer = fastcurv.Muon(params, lr=rate)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        plateau.step(1.0)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25
    groups = [{"params": params, "lr": 0.1}, {"params": mixed(), "lr": 0.2}]
    optimizer = fastcurv.Muon(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    set_grads(parameters_of(optimizer), 0)
    optimizer.step(), schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_the_rate_of_adamw_follows_that_of_muon():
    one, other = mixed(torch.float64), mixed(torch.float64)
    optimizer = fastcurv.Muon(one, lr=0.02, adamw_lr=0.01, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    plain = torch.optim.AdamW(other[1:], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"] = 0.02 / (step + 1), 0.01 / (step + 1)
        set_grads(one, step), set_grads(other, step)
        optimizer.step(), plain.step()
    torch.testing.assert_close(one[1], other[1], rtol=1e-12, atol=1e-13)
    again = fastcurv.Muon(mixed(torch.float64), lr=1.0, adamw_lr=5.0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["adamw_lr_ratio"] == optimizer.param_groups[0]["adamw_lr_ratio"] == 0.5
    with pytest.raises(ValueError, match="lr: expected a value above zero beside adamw_lr"):
        fastcurv.Muon(mixed(), lr=0.0, adamw_lr=0.1)


def test_coefficients_may_come_as_a_list(generator):
    """As they do from a configuration file."""
    grad, results = torch.randn(6, 10, generator=generator).to(DEVICE), []
    for coefficients in ((1.5, -0.5, 0.0), [1.5, -0.5, 0.0], [(1.5, -0.5, 0.0)], [[1.5, -0.5, 0.0]]):
        p = nn.Parameter(torch.zeros(6, 10, device=DEVICE))
        optimizer = fastcurv.Muon([p], lr=0.1)
        optimizer.load_state_dict(fastcurv.Muon([p], lr=0.1, ns_coefficients=coefficients).state_dict())
        p.grad = grad
        optimizer.step()
        results.append(p.detach())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(torch_muon is None, reason="this torch has no Muon")
@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_learning_rates_are_adjusted_as_in_torch(name, generator):
    """Two updates of one gradient differ by the ratio of their adjustments, which are torch's."""
    from torch.optim._muon import _adjust_lr

    for shape in ((6, 10), (10, 6)):
        ratio = {"spectral_unclamped": (shape[0] / shape[1]) ** 0.5}.get(name) or _adjust_lr(1.0, name, shape)
        if _adjust_lr(1.0, name, shape) != 1.0:  # what an older torch makes of a name that it does not know
            assert _adjust_lr(1.0, name, shape) == ratio
        grad, params = gradients(shape, 1, generator)[0], []
        for adjust in (name, "original"):
            params.append(nn.Parameter(torch.zeros(shape, dtype=torch.float64, device=DEVICE)))
            params[-1].grad = grad.clone()
            fastcurv.Muon([params[-1]], lr=0.02, adjust_lr_fn=adjust).step()
        expected = params[1] * ratio / _adjust_lr(1.0, "original", shape)
        torch.testing.assert_close(params[0], expected, rtol=1e-12, atol=0)
