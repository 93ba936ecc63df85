"""fastcurv.Adam and AdamW against torch.optim: parameters and state, through everything that happens in training."""

import copy
import io
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv

PAIRS = [(torch.optim.Adam, fastcurv.Adam), (torch.optim.AdamW, fastcurv.AdamW)]
OPTIONS = {
    "default": {},
    "l2": {"weight_decay": 0.2},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "betas": {"betas": (0.0, 0.5), "eps": 1e-3},
    "tensor-lr": {"lr": torch.tensor(0.05, dtype=torch.float64)},
    "ignored": {"foreach": True, "capturable": False, "fused": None},
    "all": {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "betas": (0.5, 0.9), "lr": 0.3},
}
BACKENDS = [None, "reference", "triton"]


def network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(80, 7), nn.Linear(7, 3, bias=False)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def set_grads(params, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = None if i in skip else grad.to(param)


def assert_same_training(torch_optimizer, ours, steps, dtype=torch.float64, skipping=True):
    """Eight steps or more (RAdam's rectification will switch at the sixth), a layer frozen at 3 and thawed at 5."""
    theirs, mine = ([p for g in optimizer.param_groups for p in g["params"]] for optimizer in (torch_optimizer, ours))
    for step in range(steps):
        skip = ({0, 1} if 3 <= step < 5 else set()) | ({4} if step == 2 else set()) if skipping else ()
        for params, optimizer in ((theirs, torch_optimizer), (mine, ours)):
            set_grads(params, step, skip)
            optimizer.step()
        # Each step rounds about 16 times; a step moves a parameter by at most a few lr, which is below one here.
        tolerance = 16 * (step + 1) * torch.finfo(dtype).eps * 4
        for a, b in zip(theirs, mine, strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
            state_a, state_b = torch_optimizer.state[a], ours.state[b]
            assert set(state_a) == set(state_b)
            for key in state_a:
                torch.testing.assert_close(
                    state_b[key], state_a[key], rtol=tolerance, atol=tolerance, check_dtype=False, check_device=False
                )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pair", PAIRS, ids=["Adam", "AdamW"])
def test_same_training_as_torch(pair, options, backend):
    theirs, mine = network(), network()
    torch_options = {k: v for k, v in OPTIONS[options].items() if k != "foreach"}
    assert_same_training(
        pair[0](theirs.parameters(), foreach=False, **torch_options),
        pair[1](mine.parameters(), backend=backend, **OPTIONS[options]),
        8,
    )


@pytest.mark.parametrize("pair", PAIRS, ids=["Adam", "AdamW"])
def test_same_training_as_torch_in_float32(pair):
    """Float32 torch (for-loop) is itself off by a few ulp a step; ours may be as far off again."""
    theirs, mine = network(torch.float32), network(torch.float32)
    assert_same_training(pair[0](theirs.parameters(), foreach=False), pair[1](mine.parameters()), 8, torch.float32)


def test_groups_schedules_and_parameters_added_later():
    theirs, mine = network(), network()
    optimizers = []
    for cls, net in ((torch.optim.AdamW, theirs), (fastcurv.AdamW, mine)):
        p = list(net.parameters())
        options = {"foreach": False} if cls is torch.optim.AdamW else {}
        optimizer = cls([{"params": p[:2], "lr": 0.2}, {"params": p[2:5], "betas": (0.5, 0.6)}], lr=0.01, **options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.3, 0.1], total_steps=20)
        for step in range(12):
            if step == 6:
                optimizer.add_param_group({"params": p[5:], "weight_decay": 0.3, "lr": 0.7})
            set_grads(p, step)
            optimizer.step()
            if step < 6:
                scheduler.step()
        optimizers.append(optimizer)
    for a, b in zip(theirs.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_lr_from_float_to_tensor_and_back():
    theirs, mine = network(), network()
    a, b = torch.optim.Adam(theirs.parameters(), foreach=False), fastcurv.Adam(mine.parameters())
    for step, lr in enumerate(
        [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.125, dtype=torch.float64), 0.0, 0.2]
    ):
        for net, optimizer in ((theirs, a), (mine, b)):
            optimizer.param_groups[0]["lr"] = lr
            set_grads(net.parameters(), step)
            optimizer.step()
    for x, y in zip(theirs.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


def test_closure_runs_first_with_gradients_and_its_loss_is_returned():
    net = network()
    optimizer = fastcurv.Adam(net.parameters())
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, device=DEVICE)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_mixed_dtypes_and_a_parameter_without_gradient_in_one_group():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    params = [nn.Parameter(torch.ones(5, dtype=d, device=DEVICE)) for d in dtypes]
    frozen = nn.Parameter(torch.ones(3, device=DEVICE), requires_grad=False)
    integers = nn.Parameter(torch.ones(3, dtype=torch.int64, device=DEVICE), requires_grad=False)
    optimizer = fastcurv.Adam([*params, frozen, integers], lr=0.5)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for p in params:
        assert torch.allclose(p.double(), torch.full((5,), 0.5, dtype=torch.float64, device=DEVICE), rtol=1e-6)
    assert optimizer.state[params[2]]["exp_avg"].dtype == torch.float32
    assert frozen.sum() == 3 and integers not in optimizer.state


@pytest.mark.parametrize("kind", ["state_dict", "pickle", "deepcopy", "weights_only"])
def test_continues_from_a_copy(kind):
    source, target = network(), network()
    a, b = fastcurv.AdamW(source.parameters(), lr=0.1, amsgrad=True), None
    for step in range(3):
        set_grads(source.parameters(), step)
        a.step()
    target.load_state_dict(source.state_dict())
    if kind == "state_dict":
        b = fastcurv.AdamW(target.parameters(), amsgrad=True)
        b.load_state_dict(a.state_dict())
    elif kind == "weights_only":
        buffer = io.BytesIO()
        torch.save(a.state_dict(), buffer)
        buffer.seek(0)
        b = fastcurv.AdamW(target.parameters())
        b.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        b = pickle.loads(pickle.dumps(a)) if kind == "pickle" else copy.deepcopy(a)
        assert type(b) is fastcurv.AdamW and b.backend is None
    params = [p for g in b.param_groups for p in g["params"]]
    for step in range(3, 6):
        set_grads(source.parameters(), step)
        set_grads(params, step)
        a.step()
        b.step()
    for x, y in zip(source.parameters(), params, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("direction", ["torch-to-fastcurv", "fastcurv-to-torch"])
@pytest.mark.parametrize("implementation", ["foreach", "fused", "capturable"])
def test_checkpoints_interchange_with_torch_mid_run(direction, implementation, amsgrad):
    if implementation == "capturable" and DEVICE.type == "cpu":
        pytest.skip("torch refuses capturable optimizers on the CPU")
    kwargs = {implementation: True}
    straight, crossing = network(), network()
    a = torch.optim.AdamW(straight.parameters(), lr=0.05, amsgrad=amsgrad, **kwargs)
    first, second = (torch.optim.AdamW, fastcurv.AdamW)[:: 1 if direction == "torch-to-fastcurv" else -1]
    b = first(crossing.parameters(), lr=0.05, amsgrad=amsgrad, **kwargs)
    for step in range(8):
        if step == 4:
            state, b = b.state_dict(), second(crossing.parameters(), lr=1.0, **kwargs)
            b.load_state_dict(state)
            assert b.param_groups[0]["lr"] == 0.05
        for net, optimizer in ((straight, a), (crossing, b)):
            set_grads(net.parameters(), step, {1} if step == 2 else ())
            optimizer.step()
    for x, y in zip(straight.parameters(), crossing.parameters(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
        assert set(a.state[x]) == set(b.state[y])


def test_float32_state_of_bfloat16_parameters_survives_loading():
    p, q = (nn.Parameter(torch.ones(100, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2))
    a, b = fastcurv.Adam([p]), fastcurv.Adam([q])
    p.grad = torch.randn(100, device=DEVICE).to(torch.bfloat16)
    a.step()
    a.state[p]["exp_avg"].mul_(1 + 2.0**-20)  # not representable in bfloat16
    b.load_state_dict(a.state_dict())
    assert b.state[q]["exp_avg"].dtype == torch.float32
    assert torch.equal(b.state[q]["exp_avg"], a.state[p]["exp_avg"])
    b.state[q]["exp_avg"].zero_()
    assert a.state[p]["exp_avg"].any()  # a copy, not an alias


def test_bfloat16_state_of_torch_is_widened():
    p, q = (nn.Parameter(torch.ones(100, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2))
    a, b = torch.optim.Adam([p]), fastcurv.Adam([q])
    p.grad = q.grad = torch.ones_like(p)
    a.step()
    b.load_state_dict(a.state_dict())
    b.step()
    assert b.state[q]["exp_avg"].dtype == torch.float32 and b.state[q]["step"] == 2


def test_bfloat16_state_of_float32_parameters():
    p = nn.Parameter(torch.ones(100, device=DEVICE))
    optimizer = fastcurv.Adam([p], state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    again = fastcurv.Adam([p], state_dtype=torch.bfloat16)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[p]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)])
def test_step_counts_of_any_kind_load(step):
    p = nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = fastcurv.Adam([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    optimizer.load_state_dict(state)
    loaded = optimizer.state[p]["step"]
    assert loaded.shape == () and loaded.dtype == torch.float32 and loaded.device == p.device and loaded == 3
    optimizer.step()
    assert optimizer.state[p]["step"] == 4


def test_state_replaced_by_hand_is_noticed():
    """Offloading frameworks move state and bring it back; the cached lists must not keep the old tensors."""
    p = nn.Parameter(torch.ones(50, device=DEVICE))
    optimizer = fastcurv.Adam([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    old = optimizer.state[p]["exp_avg"]
    optimizer.state[p]["exp_avg"] = torch.zeros_like(old)
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["exp_avg"], torch.full_like(old, 0.1))
    optimizer.state[p] = {k: v.double() if k != "step" else v for k, v in optimizer.state[p].items()}
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32 and torch.allclose(old, torch.full_like(old, 0.1))
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    p.data = torch.zeros(50, device=DEVICE)
    optimizer.step()
    assert (p < 0).all()


def test_memory_format_changed_after_the_first_step():
    net = nn.Conv2d(4, 8, 3).to(DEVICE)
    plain = copy.deepcopy(net)
    a, b = fastcurv.Adam(net.parameters(), lr=0.1), fastcurv.Adam(plain.parameters(), lr=0.1)
    for step in range(4):
        if step == 2:
            net.to(memory_format=torch.channels_last)
        set_grads(net.parameters(), step)
        set_grads(plain.parameters(), step)
        a.step()
        b.step()
    assert not net.weight.is_contiguous()
    assert torch.equal(net.weight, plain.weight)


def test_grad_scaler_with_and_without_unscaling():
    for clip in (False, True):
        nets = network(torch.float32), network(torch.float32)
        results = []
        for net, cls in zip(nets, (torch.optim.AdamW, fastcurv.AdamW), strict=True):
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)
            optimizer = cls(net.parameters(), lr=0.01, **({"fused": True} if cls is torch.optim.AdamW else {}))
            for step in range(6):
                set_grads(net.parameters(), step)
                for p in net.parameters():
                    p.grad *= scaler.scale(torch.ones((), device=DEVICE))
                    if step == 3:
                        p.grad.view(-1)[0] = float("inf")
                before = [p.grad.clone() for p in net.parameters()]
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                    before = [p.grad.clone() for p in net.parameters()]
                scaler.step(optimizer)
                scaler.update()
                if cls is fastcurv.AdamW:
                    assert (
                        all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True)) or step == 3
                    )
            results.append(scaler.get_scale())
            assert all(s["step"] == 5 for s in optimizer.state.values())
        assert results[0] == results[1]
        for x, y in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def test_version_counters_advance():
    p = nn.Parameter(torch.ones(4, device=DEVICE))
    optimizer = fastcurv.Adam([p])
    loss = (p * p).sum()  # saves p for backward
    p.grad = torch.ones_like(p)
    before, grad_before = p._version, p.grad._version
    optimizer.step()
    assert p._version > before and p.grad._version == grad_before
    assert optimizer.state[p]["exp_avg"]._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_accumulation_and_clipping():
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64, device=DEVICE)
    nets = network(), network()
    for net, cls in zip(nets, (torch.optim.Adam, fastcurv.Adam), strict=True):
        optimizer = cls(net.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            for part in x.split(2):
                net(part).square().mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_set_default_dtype_does_not_change_the_step_count():
    torch.set_default_dtype(torch.float64)
    try:
        p = nn.Parameter(torch.ones(4, device=DEVICE))
        optimizer = fastcurv.Adam([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[p]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_temporaries():
    """Peak memory: a step allocates less than one parameter's worth, where foreach allocates several."""
    import tracemalloc

    p = nn.Parameter(torch.ones(1 << 20, device=DEVICE))
    optimizer = fastcurv.Adam([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        optimizer.step()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.events())
    assert allocated < 1 << 16, allocated
    tracemalloc.start()
    optimizer.step()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_profiler_hooks_and_named_parameters():
    net = network()
    optimizer = fastcurv.Adam(net.named_parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_grads(net.parameters(), 0)
    optimizer.step()
    assert calls == ["pre", "post"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
