"""The op `ranger` and fastcurv.Ranger against the semantics of the published implementation, written out once more."""

import copy
import math

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv
from fastcurv import ops

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
SHAPES = [(6,), (), (4, 5), (3, 2, 4), (3, 2, 2, 2)]


class Lessw:
    """lessw2020, version 20.4.11 (2020.9.4 with `scaled_decay`), one parameter, in Python floats and float64 tensors."""

    def __init__(self, param, lr=1e-3, betas=(0.95, 0.999), eps=1e-5, weight_decay=0.0, alpha=0.5, k=6, use_gc=True,
                 gc_conv_only=False, threshold=5, scaled_decay=False):  # fmt: skip
        self.p, self.slow, self.t = param, None, 0
        self.m, self.v = torch.zeros_like(param), torch.zeros_like(param)
        self.__dict__.update(lr=lr, betas=betas, eps=eps, wd=weight_decay, alpha=alpha, k=k, threshold=threshold,
                             gc_dims=(3 if gc_conv_only else 1) if use_gc else 99, scaled_decay=scaled_decay)  # fmt: skip

    def step(self, grad):
        if self.slow is None:
            self.slow = self.p.clone()
        g = grad - grad.mean(tuple(range(1, grad.dim())), keepdim=True) if grad.dim() > self.gc_dims else grad
        self.t += 1
        t, (b1, b2) = self.t, self.betas
        self.v = b2 * self.v + (1 - b2) * g * g
        self.m = b1 * self.m + (1 - b1) * g
        n_max = 2 / (1 - b2) - 1
        n = n_max - 2 * t * b2**t / (1 - b2**t)
        if n > self.threshold:
            size = math.sqrt((1 - b2**t) * (n - 4) / (n_max - 4) * (n - 2) / n * n_max / (n_max - 2)) / (1 - b1**t)
            direction = self.m / (self.v.sqrt() + self.eps)
        else:
            size, direction = 1 / (1 - b1**t), self.m
        if self.scaled_decay:
            direction = direction + self.wd * self.p
        else:
            self.p = self.p - self.wd * self.lr * self.p
        self.p = self.p - size * self.lr * direction
        if t % self.k == 0:
            self.slow = self.slow + self.alpha * (self.p - self.slow)
            self.p = self.slow.clone()


def draw(shapes, generator, dtype=torch.float64):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def assert_close(got, want):
    torch.testing.assert_close(got.detach(), want, rtol=1e-13, atol=1e-14)


OPTIONS = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "2020.9.4": {"weight_decay": 0.1, "compat": "2020.9.4"},
    "no-gc": {"use_gc": False},
    "gc-conv-only": {"gc_conv_only": True},
    "every-step": {"k": 1},
    "alpha-0": {"alpha": 0.0},
    "alpha-1": {"alpha": 1.0},
    "never-rectified": {"betas": (0.9, 0.5)},
    "threshold": {"betas": (0.9, 0.99), "n_sma_threshold": 6, "k": 5},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_fourteen_steps_as_published(name, backend, generator):
    """The switch at the sixth step, and two synchronisations; every third step one parameter has no gradient."""
    options = {"lr": 0.05, **OPTIONS[name]}
    model = dict(options)
    model["scaled_decay"] = model.pop("compat", None) == "2020.9.4"
    model["threshold"] = model.pop("n_sma_threshold", 5)
    params = [nn.Parameter(p) for p in draw(SHAPES, generator)]
    models = [Lessw(p.detach().clone(), **model) for p in params]
    optimizer = fastcurv.Ranger(params, backend=backend, **options)
    for step in range(14):
        for i, (param, grad) in enumerate(zip(params, draw(SHAPES, generator), strict=True)):
            param.grad = None if (step + i) % 7 == 3 else grad
            if param.grad is not None:
                models[i].step(grad)
        optimizer.step()
        for param, model in zip(params, models, strict=True):
            if model.t == 0:
                continue
            state = optimizer.state[param]
            assert state["step"] == model.t
            assert_close(param, model.p)
            assert_close(state["exp_avg"], model.m)
            assert_close(state["exp_avg_sq"], model.v)
            assert_close(state["slow_buffer"], model.slow)
    assert {model.t for model in models} == {12}


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_other_betas_do_not_disturb_each_other(backend, generator):
    """In the published one they do: it caches the step size by the step count alone."""
    options = ({"betas": (0.95, 0.999)}, {"betas": (0.5, 0.9), "k": 3})
    together, apart = draw([(4, 3)] * 2, generator), None
    apart = [nn.Parameter(p.clone()) for p in together]
    together = [nn.Parameter(p) for p in together]
    both = fastcurv.Ranger(
        [{"params": [p], **o} for p, o in zip(together, options, strict=True)], lr=0.1, backend=backend
    )
    single = [fastcurv.Ranger([p], lr=0.1, backend=backend, **o) for p, o in zip(apart, options, strict=True)]
    for _ in range(14):
        for p, q, g in zip(together, apart, draw([(4, 3)] * 2, generator), strict=True):
            p.grad, q.grad = g, g.clone()
        both.step()
        for optimizer in single:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999])
def test_a_constant_gradient_descends_from_the_first_step_on(backend, beta2):
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Ranger([p], lr=0.01, betas=(0.95, beta2), alpha=1.0, backend=backend)
    p.grad = torch.ones_like(p)
    for _ in range(8):
        before = p.detach().clone()
        optimizer.step()
        assert (p < before).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_decay_does_not_leak_into_the_momentum(backend):
    """2020.9.4 as published: a zero gradient, a weight of 100 and a decay of 0.1 leave exp_avg at 10."""
    p = nn.Parameter(torch.full((2,), 100.0, device=DEVICE))
    optimizer = fastcurv.Ranger([p], weight_decay=0.1, compat="2020.9.4", backend=backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not optimizer.state[p]["exp_avg"].any() and (p < 100).all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(1, 2049), (2, 8193), (2, 33000), (3, 3, 64, 64)])
def test_the_mean_of_a_long_row(backend, shape):
    """Gradients that are integers with an integral mean: in float32 nothing may round, whatever the order of the sum."""
    n = math.prod(shape[1:])
    g = torch.arange(n).remainder(2).mul(2).sub(1).float()  # -1, 1, -1, ...
    g[n - n % 2 :] = 0
    p = torch.zeros(shape, device=DEVICE)
    grad = (g + 5).expand(shape[0], n).reshape(shape).contiguous().to(DEVICE)
    lists = {"params": [p], "grads": [grad], "exp_avgs": [torch.zeros_like(p)], "exp_avg_sqs": [torch.zeros_like(p)],
             "slow_buffers": [p.clone()], "steps": [torch.zeros((), device=DEVICE)]}  # fmt: skip
    case = cases.Case("ranger", lists, {"lr": 1.0, "beta1": 0.0, "beta2": 0.5})
    cases.call(case, backend)
    assert torch.equal(p, -g.to(DEVICE).expand(shape[0], n).reshape(shape))
    assert torch.equal(grad.view(shape[0], n)[0].cpu(), g + 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slow_weights_stay_where_they_are_between_synchronisations(backend, generator):
    case = cases.make_case("ranger", [(3, 4), (5,)], generator=generator, step=4.0, k=6)  # steps 5 and 6
    result = cases.run(case, backend)
    assert torch.equal(result["slow_buffers"][0], case["slow_buffers"][0])
    assert torch.equal(result["slow_buffers"][1], result["params"][1])


def test_gradients_are_not_centralised_in_place(generator):
    net = nn.Conv2d(2, 3, 2).to(DEVICE)
    optimizer = fastcurv.Ranger(net.parameters())
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
    grads = [(p.grad, p.grad.clone()) for p in net.parameters()]
    optimizer.step()
    for p, (grad, before) in zip(net.parameters(), grads, strict=True):
        assert p.grad is grad and torch.equal(cases.bits(grad), cases.bits(before))


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p, g in zip(params, draw([p.shape for p in params], generator, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


def test_a_checkpoint_of_radam_loads():
    """Its slow weights start from the parameters of that moment; the rest goes on."""
    params = [nn.Parameter(torch.ones(3, 4, dtype=torch.float64, device=DEVICE))]
    radam = torch.optim.RAdam(params, lr=0.01)
    train(radam, params, range(4))
    ranger = fastcurv.Ranger(params, lr=0.5)
    ranger.load_state_dict(radam.state_dict())
    state = ranger.state[params[0]]
    assert state["step"] == 4 and ranger.param_groups[0]["lr"] == 0.01 and ranger.param_groups[0]["k"] == 6
    assert torch.equal(state["slow_buffer"], params[0]) and state["slow_buffer"] is not params[0]
    assert torch.equal(state["exp_avg"], radam.state[params[0]]["exp_avg"])
    train(ranger, params, range(4, 8))


def test_a_checkpoint_of_the_published_implementation_loads():
    """An int step, `N_sma_threshhold` (spelled so) and `step_counter` in the groups, no options of ours."""
    source, target = (nn.Parameter(torch.ones(3, 4, device=DEVICE)) for _ in range(2))
    ours = fastcurv.Ranger([source], lr=0.01)
    train(ours, [source], range(5))
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["step"] = 5
    saved["param_groups"] = [{"lr": 0.01, "alpha": 0.5, "k": 6, "step_counter": 0, "betas": (0.95, 0.999),
                              "N_sma_threshhold": 5, "eps": 1e-5, "weight_decay": 0, "params": [0]}]  # fmt: skip
    loaded = fastcurv.Ranger([target], lr=0.7)
    loaded.load_state_dict(saved)
    with torch.no_grad():
        target.copy_(source)
    assert loaded.param_groups[0]["compat"] == "20.4.11" and loaded.param_groups[0]["lr"] == 0.01
    for optimizer, param in ((ours, source), (loaded, target)):
        train(optimizer, [param], range(5, 14))
    assert torch.equal(source, target)


def test_the_threshold_of_a_published_checkpoint_counts():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastcurv.Ranger([p])
    train(optimizer, [p], range(2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["n_sma_threshold"]
    saved["param_groups"][0]["N_sma_threshhold"] = 4
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["n_sma_threshold"] == 4


def test_slow_weights_of_half_precision_parameters_are_float32():
    p = nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16, device=DEVICE))
    optimizer = fastcurv.Ranger([p], lr=0.01, k=2, alpha=2.0**-8)
    train(optimizer, [p], range(4))
    slow = optimizer.state[p]["slow_buffer"]
    assert slow.dtype == torch.float32 and not torch.equal(slow, slow.bfloat16().float())
    again = fastcurv.Ranger([p])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["slow_buffer"], slow) and again.state[p]["slow_buffer"] is not slow


def test_the_slow_weights_are_copied_at_the_first_step_not_at_construction():
    p = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = fastcurv.Ranger([p], alpha=0.0, k=1)
    with torch.no_grad():
        p.fill_(7.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 7.0))


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_k(k):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="k: expected a whole number of at least 1"):
        fastcurv.Ranger([p], k=k)
    case = cases.make_case("ranger", [(3,)])
    with pytest.raises((ValueError, TypeError), match="k: expected a whole number of at least 1"):
        ops.ranger_(*case.arguments, k=k)


def test_unknown_versions_are_refused():
    with pytest.raises(ValueError, match=r"compat: expected one of 20\.4\.11, 2020\.9\.4, got '21'"):
        fastcurv.Ranger([nn.Parameter(torch.ones(3))], compat="21")
