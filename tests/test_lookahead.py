"""The op `lookahead` and fastcurv.Lookahead around other optimizers, against Algorithm 1 of Zhang et al. (2019)."""

import copy
import io
import pickle

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
INNER = {
    "torch-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "torch-sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "torch-adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "fastcurv-adam": lambda p: fastcurv.Adam(p, lr=0.05),
    "fastcurv-ranger": lambda p: fastcurv.Ranger(p, lr=0.05, k=4),
    "lookahead": lambda p: fastcurv.Lookahead(torch.optim.SGD(p, lr=0.1), k=2, alpha=0.75),
}
every_inner = pytest.mark.parametrize("inner", INNER)


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (5,), (), (2, 2, 2, 2)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype)) for s in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def train(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_equal(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def algorithm_1(inner, params, k, alpha, outer):
    """The paper, line by line; `inner` keeps its state across outer steps, as in the paper's experiments."""
    phi = [p.detach().clone() for p in params]
    step = 0
    for _ in range(outer):
        for _ in range(k):
            train(inner, params, [step])
            step += 1
        phi = [s + alpha * (p.detach() - s) for s, p in zip(phi, params, strict=True)]
        with torch.no_grad():
            for p, s in zip(params, phi, strict=True):
                p.copy_(s)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k, alpha", [(5, 0.5), (1, 0.3), (3, 1.0), (2, 0.0)])
@every_inner
def test_algorithm_1(inner, k, alpha, backend):
    theirs, mine = parameters(), parameters()
    algorithm_1(INNER[inner](theirs), theirs, k, alpha, 3)
    train(fastcurv.Lookahead(INNER[inner](mine), k=k, alpha=alpha, backend=backend), mine, range(3 * k))
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_around_radam_it_is_ranger_without_centralisation(backend):
    common = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-5}
    theirs, mine, torchs = parameters(), parameters(), parameters()
    train(fastcurv.Ranger(theirs, k=6, use_gc=False, backend=backend, **common), theirs, range(20))
    train(fastcurv.Lookahead(fastcurv.RAdam(mine, backend=backend, **common), k=6, backend=backend), mine, range(20))
    train(fastcurv.Lookahead(torch.optim.RAdam(torchs, **common), k=6, backend=backend), torchs, range(20))
    for p, q, r in zip(theirs, mine, torchs, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(r, p, rtol=1e-12, atol=1e-13)


def test_closure():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Lookahead(torch.optim.SGD([p], lr=0.1), k=2, alpha=1.0)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert losses[0] == 3.0 and losses == sorted(losses, reverse=True)


@every_inner
@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    lambda o: torch.optim.lr_scheduler.LinearLR(o),
])  # fmt: skip
def test_schedulers_take_the_wrapper_or_what_it_wraps(inner, schedule, recwarn):
    results = []
    for wrapper in (True, False):
        params = parameters()
        optimizer = fastcurv.Lookahead(INNER[inner](params), k=3)
        scheduler = schedule(optimizer if wrapper else optimizer.optimizer)
        for step in range(8):
            train(optimizer, params, [step])
            scheduler.step()
        results.append(params)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert_equal(*results)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@every_inner
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(inner, unscale):
    """A step that overflows counts neither for the inner optimizer nor towards k."""
    scaled, plain = parameters(torch.float32), parameters(torch.float32)
    a, b = (fastcurv.Lookahead(INNER[inner](params), k=3) for params in (scaled, plain))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=100)
    for step in range(8):
        set_grads(scaled, step)
        set_grads(plain, step)
        for p in scaled:
            p.grad *= scaler.scale(torch.ones((), device=DEVICE))
        if step == 4:
            scaled[0].grad[0] = float("inf")
        if unscale:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if step != 4:
            b.step()
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@every_inner
@pytest.mark.parametrize("kind", ["state_dict", "weights_only", "pickle", "deepcopy"])
@pytest.mark.parametrize("at", [0, 4, 6])
def test_continues_from_a_copy(inner, kind, at):
    source, target = parameters(), parameters()
    a = fastcurv.Lookahead(INNER[inner](source), k=3, alpha=0.25)
    train(a, source, range(at))
    with torch.no_grad():
        for p, q in zip(source, target, strict=True):
            q.copy_(p)
    if kind in ("state_dict", "weights_only"):
        saved = copy.deepcopy(a.state_dict())  # torch's own loader would share the tensors
        if kind == "weights_only":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        b = fastcurv.Lookahead(INNER[inner](target))
        b.load_state_dict(saved)
        assert (b.k, b.alpha) == (3, 0.25)
    else:
        b = pickle.loads(pickle.dumps(a)) if kind == "pickle" else copy.deepcopy(a)
        target = [p for group in b.param_groups for p in group["params"]]
        assert all(p is not q for p, q in zip(source, target, strict=True))
    train(a, source, range(at, 10))
    train(b, target, range(at, 10))
    assert_equal(source, target)


@every_inner
def test_a_checkpoint_of_the_bare_optimizer_loads(inner):
    """Slow weights start from the parameters at the next step, and the count from zero."""
    source, target = parameters(), parameters()
    bare = INNER[inner](source)
    train(bare, source, range(4))
    with torch.no_grad():
        for p, q in zip(source, target, strict=True):
            q.copy_(p)
    wrapped, loaded = fastcurv.Lookahead(bare, k=3), fastcurv.Lookahead(INNER[inner](target), k=3)
    train(loaded, target, range(2))  # history that the checkpoint replaces
    with torch.no_grad():
        for p, q in zip(source, target, strict=True):
            q.copy_(p)
    loaded.load_state_dict(copy.deepcopy(bare.state_dict()))
    train(wrapped, source, range(4, 12))
    train(loaded, target, range(4, 12))
    assert_equal(source, target)


def test_a_checkpoint_of_another_model_loads_nothing():
    params, others = parameters(), [nn.Parameter(torch.ones(7, dtype=torch.float64, device=DEVICE))]
    optimizer = fastcurv.Lookahead(INNER["torch-adam"](params), k=2)
    other = fastcurv.Lookahead(torch.optim.SGD(others, lr=9.0), k=9)
    train(optimizer, params, range(3))
    train(other, others, range(3))
    with pytest.raises(ValueError, match=r"'lookahead_slow_buffer' of shape \(4, 3\), got \(7,\)"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.k == 2 and optimizer.param_groups[0]["lr"] == 0.05


def test_weights_loaded_between_construction_and_the_first_step_are_where_it_starts():
    p = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = fastcurv.Lookahead(torch.optim.SGD([p], lr=1.0), k=1, alpha=0.0)
    with torch.no_grad():
        p.fill_(7.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 7.0))


def test_parameters_added_later_start_when_they_come():
    first, second = (nn.Parameter(torch.zeros(3, device=DEVICE)) for _ in range(2))
    optimizer = fastcurv.Lookahead(torch.optim.SGD([first], lr=1.0), k=2, alpha=0.5)
    first.grad = torch.ones_like(first)
    optimizer.step()
    with torch.no_grad():
        second.fill_(8.0)
    optimizer.add_param_group({"params": [second], "lr": 2.0})
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert (first == -1).all() and (second == 7).all()


def test_mixed_dtypes_and_slow_weights_in_float32():
    params = [nn.Parameter(torch.ones(4, dtype=d, device=DEVICE)) for d in cases._check.STATE_DTYPES]
    whole = nn.Parameter(torch.ones(4, dtype=torch.int64, device=DEVICE), requires_grad=False)
    optimizer = fastcurv.Lookahead(torch.optim.SGD([*params, whole], lr=2.0**-6), k=1, alpha=2.0**-6)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    saved = optimizer.state_dict()["state"]
    for i, p in enumerate(params):
        exact = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert saved[i]["lookahead_slow_buffer"].dtype == exact
    assert not torch.equal(
        saved[2]["lookahead_slow_buffer"].bfloat16().float(), saved[2]["lookahead_slow_buffer"]
    )  # finer than bfloat16


def test_layouts_that_change_and_weights_that_are_replaced():
    net, plain = (nn.Conv2d(3, 4, 2).to(DEVICE, torch.float64) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    a, b = (fastcurv.Lookahead(torch.optim.SGD(n.parameters(), lr=0.1), k=2) for n in (net, plain))
    for step in range(6):
        if step == 3:
            net.to(memory_format=torch.channels_last)
        train(a, list(net.parameters()), [step])
        train(b, list(plain.parameters()), [step])
    assert not net.weight.is_contiguous()
    assert_equal(net.parameters(), plain.parameters())


def test_hooks_zero_grad_and_representation():
    params = parameters()
    optimizer = fastcurv.Lookahead(torch.optim.SGD(params, lr=0.1), k=2)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("wrapper"))
    optimizer.optimizer.register_step_post_hook(lambda *_: calls.append("inner"))
    train(optimizer, params, range(1))
    assert calls == ["inner", "wrapper"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    assert repr(optimizer).startswith("Lookahead(k=2, alpha=0.5, SGD")


def test_what_is_frozen_is_left_alone_until_it_is_not():
    mask = nn.Parameter(torch.full((3,), -torch.inf, device=DEVICE), requires_grad=False)
    p, q = (nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2))
    q.requires_grad = False
    optimizer = fastcurv.Lookahead(torch.optim.SGD([p, mask, q], lr=1.0), k=2)
    for step in range(4):
        p.grad = torch.ones_like(p)
        if step == 2:
            q.data.fill_(10.0)
            q.requires_grad = True
        q.grad = torch.ones_like(q) if step >= 2 else None
        optimizer.step()
    assert torch.equal(mask, torch.full_like(mask, -torch.inf))
    assert (p == -1).all() and (q == 9).all()


def test_dtypes_that_change_and_parameters_that_become_others():
    p = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = fastcurv.Lookahead(torch.optim.SGD([p], lr=1.0), k=1, alpha=0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p, torch.full_like(p, -2.0))
    p.grad = None
    p.data = torch.zeros(4, device=DEVICE)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(3,\) like its slow weights, got \(4,\)"):
        optimizer.step()
    assert not p.any()


def test_state_dict_hooks():
    params = parameters()
    optimizer = fastcurv.Lookahead(torch.optim.SGD(params, lr=0.1), k=2)
    train(optimizer, params, range(1))
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == 0.5 and saved["extra"] == 1
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append(saved.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: o.state.clear())
    optimizer.load_state_dict(dict(saved))
    assert seen == [1] and not optimizer.state
    train(optimizer, params, range(3))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("inner", ["torch-plain", "torch-adam", "fastcurv-adam", "fastcurv-ranger"])
def test_distributed_checkpoints(inner, flatten):
    from torch.distributed.checkpoint import state_dict as dcp

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(DEVICE, torch.float64)

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    source, target = model(), model()
    a = fastcurv.Lookahead(INNER[inner](source.parameters()), k=3, alpha=0.25)
    train(a, list(source.parameters()), range(4))
    a.zero_grad()
    before = copy.deepcopy(source.state_dict())
    saved = dcp.get_optimizer_state_dict(source, a, options=options)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())  # saving does not train
    target.load_state_dict(before)
    b = fastcurv.Lookahead(INNER[inner](target.parameters()))
    dcp.set_optimizer_state_dict(target, b, copy.deepcopy(saved), options=options)
    assert (b.k, b.alpha) == (3, 0.25)
    train(a, list(source.parameters()), range(4, 10))
    train(b, list(target.parameters()), range(4, 10))
    assert_equal(source.parameters(), target.parameters())


def test_a_checkpoint_with_options_out_of_range_loads_nothing():
    params = parameters()
    optimizer = fastcurv.Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9), k=2)
    train(optimizer, params, range(3))
    for key, value, match in [
        ("lookahead_k", 0, "lookahead_k: expected"),
        ("lookahead_alpha", 2.0, "alpha: expected"),
        ("lookahead_step", "x", "lookahead_step: expected"),
    ]:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update({key: value, "lr": 5.0})
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert optimizer.k == 2 and optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("options, error, match", [
    ({"k": 0}, ValueError, "k: expected a whole number of at least 1"),
    ({"k": 2.5}, ValueError, "k: expected a whole number of at least 1"),
    ({"alpha": -0.1}, ValueError, r"alpha: expected a value in \[0, 1\]"),
    ({"alpha": 1.5}, ValueError, r"alpha: expected a value in \[0, 1\]"),
    ({"optimizer": "sgd"}, TypeError, "optimizer: expected a torch.optim.Optimizer, got str"),
])  # fmt: skip
def test_constructor(options, error, match):
    arguments = {"optimizer": torch.optim.SGD(parameters(), lr=0.1), **options}
    with pytest.raises(error, match=match):
        fastcurv.Lookahead(**arguments)
