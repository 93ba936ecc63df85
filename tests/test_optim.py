"""Every optimizer, through everything that happens in training: against torch where torch has the class."""

import copy

import pytest
import torch
from cases import DEVICE
from torch import nn
from training import (
    OURS,
    PAIRS,
    WHOLE,
    assert_same_weights,
    copy_weights,
    make,
    network,
    parameters_of,
    set_grads,
    train,
)

import fastcurv
from fastcurv import _backend

every_pair = pytest.mark.parametrize("name", PAIRS)
every_optimizer = pytest.mark.parametrize("name", OURS)

COMMON = {
    "default": {},
    "l2": {"weight_decay": 0.2},
    "maximize": {"maximize": True, "lr": 0.1},
    "tensor-lr": {"lr": torch.tensor(0.05, dtype=torch.float64)},
    "ignored": {"foreach": True},
}
BETAS = {**COMMON, "betas": {"betas": (0.0, 0.5), "eps": 1e-3}}
ADAM = {
    **BETAS,
    "amsgrad": {"amsgrad": True},
    "ignored": {"foreach": True, "capturable": False, "fused": None},
    "all": {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.5, 0.9), "lr": 0.3},
}
DECOUPLED = {"weight_decay": 0.2, "decoupled_weight_decay": True, "betas": (0.7, 0.9), "lr": 0.1}
OPTIONS = {
    "Adam": {**ADAM, "decoupled": DECOUPLED},
    "AdamW": ADAM,
    "RAdam": {**BETAS, "decoupled": DECOUPLED},
    "NAdam": {**BETAS, "decoupled": DECOUPLED, "momentum-decay": {"momentum_decay": 0.3, "lr": 0.1}},
    "SGD": {
        **COMMON,
        "momentum": {"momentum": 0.9, "lr": 0.1},
        "dampening": {"momentum": 0.9, "dampening": 0.3, "lr": 0.1},
        "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True, "lr": 0.05},
    },
}


def assert_same_training(torch_optimizer, ours, steps, dtype=torch.float64):
    """Eight steps or more (RAdam's rectification switches at the sixth), a layer frozen at 3 and thawed at 5."""
    theirs, mine = parameters_of(torch_optimizer), parameters_of(ours)
    for step in range(steps):
        skip = ({0, 1} if 3 <= step < 5 else set()) | ({4} if step == 2 else set())
        for params, optimizer in ((theirs, torch_optimizer), (mine, ours)):
            set_grads(params, step, skip)
            optimizer.step()
        # Each step rounds about 16 times; a step moves a parameter by at most a few lr, which is below one here.
        tolerance = 16 * (step + 1) * torch.finfo(dtype).eps * 4
        for a, b in zip(theirs, mine, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
            state_a, state_b = torch_optimizer.state[a], ours.state.get(b, {})
            assert set(state_a) == set(state_b)
            for key in state_a:
                torch.testing.assert_close(
                    state_b[key], state_a[key], rtol=tolerance, atol=tolerance, check_dtype=False, check_device=False
                )


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("name, options", [(name, row) for name in PAIRS for row in OPTIONS[name]])
def test_same_training_as_torch(name, options, backend):
    if backend == "triton" and _backend.unusable("adam", "triton", DEVICE):
        pytest.skip("no Triton here")
    if backend == "triton" and options not in ("default", "all", "decoupled"):
        pytest.skip("test_every_op.py has all options for each back end")
    chosen = OPTIONS[name][options]
    theirs, mine = PAIRS[name]
    torch_options = {k: v for k, v in chosen.items() if k != "foreach"}
    assert_same_training(
        theirs(network().parameters(), foreach=False, **torch_options),
        mine(network().parameters(), backend=backend, **chosen),
        8,
    )


@every_pair
def test_same_training_as_torch_in_float32(name):
    """Float32 torch (for-loop) is itself off by a few ulp a step; ours may be as far off again."""
    nets = network(torch.float32), network(torch.float32)
    theirs, mine = (cls(net.parameters(), lr=0.01) for cls, net in zip(PAIRS[name], nets, strict=True))
    assert_same_training(theirs, mine, 8, torch.float32)


@every_optimizer
def test_each_parameter_as_if_it_had_an_optimizer_of_its_own(name):
    """Gradients missing on some steps, a layer frozen and thawed, one that joins later: own counts, own momenta."""
    together, apart = network(), network()
    p = list(together.parameters())
    one = make(name, [{"params": p[:2]}, {"params": p[2:-1], "lr": 0.125}])
    many = [make(name, [q], lr=OURS[name][1]["lr"] if i < 2 else 0.125) for i, q in enumerate(apart.parameters())]
    if name == "Nero":  # constraints the last parameter when it joins
        copy_weights(apart.parameters(), p)
    for step in range(10):
        if step == 4:
            one.add_param_group({"params": p[-1:], "lr": 0.125})
            copy_weights(list(apart.parameters())[-1:], p[-1:])
        skip = {step % 5} | ({0, 1} if 5 <= step < 8 else set()) | ({len(p) - 1} if step < 4 else set())
        set_grads(p, step, skip)
        set_grads(list(apart.parameters()), step, skip)
        one.step()
        for optimizer in many:
            optimizer.step()
    assert_same_weights(p, apart.parameters())


@every_pair
def test_groups_schedules_and_parameters_added_later(name):
    results = []
    for cls in PAIRS[name]:
        net = network()
        p = list(net.parameters())
        other = {"momentum": 0.5} if name == "SGD" else {"betas": (0.5, 0.6)}
        momentum = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = cls([{"params": p[:2], "lr": 0.2}, {"params": p[2:5], **other}], lr=0.01, foreach=False, **momentum)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.3, 0.1], total_steps=20)  # cycles momenta
        for step in range(12):
            if step == 6:
                optimizer.add_param_group({"params": p[5:], "weight_decay": 0.3, "lr": 0.07})
            set_grads(p, step)
            optimizer.step()
            if step < 6:
                scheduler.step()
        results.append(p)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@every_optimizer
@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    lambda o: torch.optim.lr_scheduler.SequentialLR(o, [
        torch.optim.lr_scheduler.LinearLR(o, total_iters=2), torch.optim.lr_scheduler.CosineAnnealingLR(o, 4)], [2]),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
])  # fmt: skip
@pytest.mark.parametrize("tensor", [False, True])
def test_schedules_set_the_rate_that_the_step_uses(name, schedule, tensor):
    """Against the same rates set by hand; with a tensor, which schedulers write in place."""
    scheduled, by_hand = network(), network()
    lr = torch.tensor(0.0625, dtype=torch.float64) if tensor else 0.0625
    a, b = make(name, scheduled.parameters(), lr=lr), make(name, by_hand.parameters())
    scheduler = schedule(a)
    for step in range(6):
        rate = a.param_groups[0]["lr"]
        for group in b.param_groups:
            group["lr"] = float(rate)
        train(a, [step])
        train(b, [step])
        scheduler.step()
        assert isinstance(a.param_groups[0]["lr"], torch.Tensor) == tensor
    assert_same_weights(scheduled.parameters(), by_hand.parameters())


@every_optimizer
def test_lr_from_float_to_tensor_and_back(name):
    changing, plain = network(), network()
    a, b = make(name, changing.parameters()), make(name, plain.parameters())
    for step, lr in enumerate(
        [0.125, torch.tensor(0.125), torch.tensor(0.25, dtype=torch.float64), 0.0, torch.tensor([0.5])]
    ):
        a.param_groups[0]["lr"], b.param_groups[0]["lr"] = lr, float(lr)
        train(a, [step])
        train(b, [step])
    assert_same_weights(changing.parameters(), plain.parameters())


@every_optimizer
def test_closure_runs_first_with_gradients_and_its_loss_is_returned(name):
    net = network()
    optimizer = make(name, net.parameters(), lr=1e-3)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, device=DEVICE)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert first.requires_grad and optimizer.step(closure) < first


@every_optimizer
def test_mixed_dtypes_and_parameters_without_gradient_in_one_group(name):
    """Each dtype as in an optimizer of its own."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16]
    shapes = [(5, 3), (5, 3), (5, 3), (7,), (5, 3)]
    together, apart = ([], [])
    for i, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
        value = torch.linspace(-1, 1, 5 * 3).add(0.1 * i)[: torch.Size(shape).numel()].view(shape).to(DEVICE, dtype)
        together.append(nn.Parameter(value.clone()))
        apart.append(nn.Parameter(value.clone()))
    frozen = nn.Parameter(torch.ones(3, device=DEVICE), requires_grad=False)
    whole = nn.Parameter(torch.ones(3, dtype=torch.int64, device=DEVICE), requires_grad=False)
    one = make(name, [*together, frozen, whole])
    many = [make(name, [p]) for p in apart]
    for step in range(4):
        set_grads(together, step)
        set_grads(apart, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    assert_same_weights(together, apart)
    assert frozen.sum() == 3 and whole not in one.state and frozen not in one.state
    for key, value in one.state[together[2]].items():
        assert value.dtype == torch.float32, key


@every_optimizer
def test_a_parameter_changes_its_dtype_between_two_steps(name):
    values = [torch.linspace(-1, 1, 12, device=DEVICE).view(4, 3) * (i + 1) for i in range(3)]
    together, apart = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    one, many = make(name, together), [make(name, [p]) for p in apart]
    for step in range(4):
        if step == 2:
            for p in (together[1], apart[1]):
                p.grad = None
                p.data = p.data.double()
        train(one, [step])
        set_grads(apart, step)
        for optimizer in many:
            optimizer.step()
    assert_same_weights(together, apart)


@every_optimizer
def test_gradients_of_zeros_that_have_no_memory(name):
    results = []
    for zeros in (torch.zeros, torch._efficientzerotensor):
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        optimizer = make(name, [p])
        for step in range(3):
            p.grad = torch.ones(4, 3) if step == 1 else zeros(4, 3)
            optimizer.step()
        results.append([p])
    assert_same_weights(*results)


@every_optimizer
def test_memory_format_changed_after_the_first_step(name):
    net = nn.Conv2d(4, 8, 3).to(DEVICE, torch.float64)
    plain = copy.deepcopy(net)
    a, b = make(name, net.parameters()), make(name, plain.parameters())
    for step in range(4):
        if step == 2:
            net.to(memory_format=torch.channels_last)
        train(a, [step])
        train(b, [step])
    assert not net.weight.is_contiguous()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):  # sums over a row may be taken in another order
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


@every_optimizer
def test_state_that_was_replaced_between_two_steps(name):
    """By hand, as an offload does it: an entry of the dict, the memory of an entry, a dict, and a gradient."""
    one, other = network(), network()
    a, b = make(name, one.parameters()), make(name, other.parameters())

    def clones(state):
        return {key: value.clone() for key, value in state.items()}

    def swap_memory(state):
        for value in state.values():
            value.data = value.data.clone()

    def replace_dict(state):
        a.state[p[0]] = clones(state)

    p = list(one.parameters())
    for step, change in enumerate([None, lambda state: state.update(clones(state)), swap_memory, replace_dict]):
        if change:
            change(a.state[p[0]])
        for net in (one, other):
            set_grads(list(net.parameters()), step)
        p[1].grad = p[1].grad.clone()
        a.step()
        b.step()
        assert_same_weights(p, other.parameters())
    if len(a.state[p[0]]) > 1:  # without any, a parameter starts anew
        del a.state[p[0]][next(iter(a.state[p[0]]))]
        with pytest.raises(ValueError, match=r"state of params\[0\]: expected a key"):
            a.step()


@every_optimizer
def test_version_counters_advance(name):
    p = nn.Parameter(torch.ones(4, 3, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(1))
    loss = (p * p).sum()  # saves p for backward
    before, grad_before = p._version, p.grad._version
    versions = {key: value._version for key, value in optimizer.state[p].items() if key not in ("scale", "slow_buffer")}
    optimizer.step()
    assert p._version > before and p.grad._version == grad_before
    assert all(optimizer.state[p][key]._version > version for key, version in versions.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_pair
def test_gradient_accumulation_and_clipping(name):
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64, device=DEVICE)
    nets = network(), network()
    for net, cls in zip(nets, PAIRS[name], strict=True):
        optimizer = cls(net.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            for part in x.split(2):
                net(part).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@every_optimizer
def test_set_default_dtype_does_not_change_the_state(name):
    torch.set_default_dtype(torch.float64)
    try:
        p = nn.Parameter(torch.ones(4, 3, device=DEVICE, dtype=torch.float32))
        optimizer = make(name, [p])
        train(optimizer, range(2))
        assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name in OURS if name not in WHOLE])
@pytest.mark.skipif(_backend.native() is None, reason="the reference makes temporaries")
def test_no_temporaries(name):
    """A step allocates less than a parameter's worth, where foreach allocates several."""
    from torch.profiler import ProfilerActivity, profile

    p = nn.Parameter(torch.ones(1 << 8, 1 << 12, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(2))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        optimizer.step()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.events())
    assert allocated < 1 << 17, allocated


@every_optimizer
def test_hooks_and_named_parameters(name):
    net = network()
    optimizer = make(name, net.named_parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, range(1))
    assert calls == ["pre", "post"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
    assert type(optimizer).__name__ in repr(optimizer)


def test_every_optimizer_is_tested():
    classes = {n for n in fastcurv.__all__ if isinstance(getattr(fastcurv, n), type(torch.optim.Optimizer))}
    optimizers = {n for n in classes if issubclass(getattr(fastcurv, n), torch.optim.Optimizer)}
    # Wrappers have files of their own.
    assert optimizers == set(OURS) | {"Lookahead", "Orthogonal"}
