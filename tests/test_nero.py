"""The op `nero` and fastcurv.Nero: angles, constraints, and the published implementation."""

import copy
import math
import pickle

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
SHAPES = [(5, 7), (3, 2, 3, 3), (4,), (), (6, 1), (2, 2500)]


class Published:
    """jxbz/nero for one parameter, from its description (spec nero 1.5), in float64."""

    def __init__(self, param, lr=0.01, beta=0.999, constraints=True):
        self.p, self.lr, self.beta, self.t = param.clone(), lr, beta, 0
        # A neuron of one weight cannot have mean zero and norm one; the published code makes NaN of it.
        self.constrained = constraints and param.dim() > 1 and param[0].numel() > 1
        self.project()
        self.average = torch.zeros_like(self.norms(self.p))
        self.scale = self.norms(self.p).mean()
        if self.scale == 0:
            self.scale = torch.tensor(0.01)

    def norms(self, x):
        return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) if x.dim() > 1 else x.abs()

    def project(self):
        if self.constrained:
            self.p = self.p - self.p.flatten(1).mean(dim=1).view(-1, *[1] * (self.p.dim() - 1))
            self.p = self.p / self.norms(self.p)

    def step(self, g):
        self.t += 1
        self.average = self.beta * self.average + (1 - self.beta) * self.norms(g) ** 2
        update = g / (self.average / (1 - self.beta**self.t)).sqrt()
        self.p = self.p - self.lr * self.scale * update.nan_to_num(0.0)
        self.project()


def draw(shapes, generator, dtype=torch.float64):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"constraints": False}, {"lr": 0.3, "beta": 0.5}, {"beta": 0.0}])
def test_ten_steps_as_published(backend, options, generator):
    params = [nn.Parameter(p) for p in draw(SHAPES, generator)]
    models = [Published(p.detach(), **options) for p in params]
    optimizer = fastcurv.Nero(params, backend=backend, **options)
    for step in range(10):
        for i, (param, grad) in enumerate(zip(params, draw(SHAPES, generator), strict=True)):
            param.grad = None if (step + i) % 7 == 3 else grad
            if param.grad is not None:
                models[i].step(grad)
        optimizer.step()
        for param, model in zip(params, models, strict=True):
            torch.testing.assert_close(param.detach(), model.p, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"constraints": False}])
def test_as_in_pytorch_optimizer(options, generator):
    """Where semantics coincide: it makes NaN of a neuron of one weight, so none is here, and adds eps, which we do not."""
    peer = pytest.importorskip("pytorch_optimizer").Nero
    shapes = [(5, 7), (3, 2, 3, 3), (4,)]
    theirs, mine = ([nn.Parameter(p.cpu()) for p in draw(shapes, torch.Generator().manual_seed(3))] for _ in range(2))
    a = peer(theirs, lr=0.1, beta=0.9, eps=0.0, **options)
    b = fastcurv.Nero(mine, lr=0.1, beta=0.9, backend="reference", **options)
    for _ in range(6):
        for p, q, g in zip(theirs, mine, draw(shapes, generator), strict=True):
            p.grad, q.grad = g.cpu(), g.cpu().clone()
        a.step()
        b.step()
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 9), (3, 2, 5, 7), (2, 33000), (300, 3)])
def test_neurons_have_mean_zero_and_norm_one(backend, dtype, shape, generator):
    case = cases.make_case("nero", [shape], dtype, generator=generator)
    neurons = cases.run(case, backend)["params"][0].double().flatten(1)
    # How much of a neuron its mean takes away, and so how much of its precision.
    free = cases.run(cases.Case("nero", case.lists, {**case.options, "constraints": False}), "reference")
    free = free["params"][0].double().flatten(1)
    lost = free.norm(dim=1) / (free - free.mean(dim=1, keepdim=True)).norm(dim=1)
    n, eps = neurons.shape[1], torch.finfo(cases.DTYPES[dtype][0]).eps
    # Each weight is rounded to half an ulp of at most its own size, and the factor by which all are scaled to a few ulp.
    assert (neurons.sum(dim=1).abs() <= 4 * eps * math.sqrt(n) * lost).all()
    # Sums are taken in double: of float64 weights that is no more than they have, and squares lose it twice.
    assert ((neurons.norm(dim=1) - 1).abs() <= 4 * eps * (lost**2 if dtype == "float64" else 1)).all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("lr", [1e-3, 0.01, 0.5])
def test_the_first_step_turns_each_neuron_by_the_angle_whose_tangent_is_lr(backend, lr, generator):
    """With g perpendicular to w and of mean zero, w - lr g / |g| already has mean zero: nothing but length is lost."""
    w, g = draw([(6, 11), (6, 11)], generator)
    w = w - w.mean(1, keepdim=True)
    w = w / w.norm(dim=1, keepdim=True)
    g = g - g.mean(1, keepdim=True)
    g = (g - (g * w).sum(1, keepdim=True) * w) * torch.logspace(-8, 8, 6, device=DEVICE, dtype=g.dtype)[:, None]
    one, zeros = torch.ones((), dtype=w.dtype, device=DEVICE), torch.zeros(6, 1, dtype=w.dtype, device=DEVICE)
    lists = {"params": [w.clone()], "grads": [g], "row_exp_avg_sqs": [zeros], "scales": [one],
             "steps": [torch.zeros((), device=DEVICE)]}  # fmt: skip
    result = cases.run(cases.Case("nero", lists, {"lr": lr}), backend)["params"][0]
    cosine, sine = (result * w).sum(1), -(result * g).sum(1) / g.norm(dim=1)
    torch.testing.assert_close(sine / cosine, torch.full_like(sine, lr), rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (3, 1)])
def test_dead_neurons_stay(backend, shape, generator):
    """A neuron that never saw a gradient: 0 / 0 is 0. Its neighbours move."""
    p = nn.Parameter(draw([shape], generator, torch.float32)[0])
    optimizer = fastcurv.Nero([p], backend=backend)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    if p.dim() > 1 and shape[1] > 1:
        p.grad[:, 0] = 2.0
    p.grad[0] = 0
    for _ in range(3):
        optimizer.step()
    assert torch.allclose(p[0], before[0], rtol=0, atol=4 * 1.2e-7)
    assert p.isfinite().all() and (p[1:] != before[1:]).any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neurons_of_equal_weights_become_zero(backend, dtype, generator):
    """They have no direction; what the rounding of their mean leaves must not be blown up to norm one."""
    values = draw([(200, 1)], generator, dtype)[0]
    for n in (2, 3, 7, 10, 33):
        p = nn.Parameter(values.expand(200, n).clone())
        optimizer = fastcurv.Nero([p], lr=0.0, backend=backend)
        assert not p.any()
        with torch.no_grad():
            p.copy_(values.expand(200, n))
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert not p.any()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neurons_far_from_mean_zero(backend, dtype, generator):
    """Weights loaded after construction: the mean is a thousand times the deviation from it.

    Not in float64, of which the sums are no wider: there the norm loses twice the digits that the mean takes away.
    """
    case = cases.make_case("nero", [(5, 411), (3, 9000)], dtype, generator=generator)
    for param in case["params"]:
        param.mul_(2.0**-10).add_(1.0)
    cases.assert_as_accurate_as_torch(cases.run(case, backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_per_neuron_is_not_constrained(backend):
    p = nn.Parameter(torch.full((4, 1), 3.0, device=DEVICE))
    q = nn.Parameter(torch.zeros(4, device=DEVICE))
    optimizer = fastcurv.Nero([p, q], lr=0.5, backend=backend)
    assert (p == 3).all()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert torch.allclose(p, torch.full_like(p, 3.0 - 0.5 * 3.0))  # the scale is the mean norm
    assert torch.allclose(q, torch.full_like(q, -0.5 * 0.01))  # or 0.01 where that is zero


def test_construction_and_later_groups_project(generator):
    """Also of half precision and in any layout; 1-D parameters and unconstrained groups are left alone."""
    p, q, r = (nn.Parameter(x) for x in draw([(4, 3, 2, 2)] * 3, generator, torch.float32))
    q = nn.Parameter(q.detach().to(memory_format=torch.channels_last))
    half, bias = nn.Parameter(torch.randn(4, 50).bfloat16().to(DEVICE)), nn.Parameter(torch.ones(4, device=DEVICE))
    kept = r.detach().clone()
    optimizer = fastcurv.Nero([p, half, bias])
    optimizer.add_param_group({"params": [q]})
    optimizer.add_param_group({"params": [r], "constraints": False})
    for x, eps in ((p, 1e-6), (q, 1e-6), (half, 2.0**-6)):
        assert (x.detach().float().flatten(1).norm(dim=1) - 1).abs().max() < eps
        assert x.detach().float().flatten(1).sum(dim=1).abs().max() < 10 * eps
    assert torch.equal(r, kept) and torch.equal(bias, torch.ones_like(bias)) and not q.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_construction_leaves_neurons_alone_that_are_there(dtype, generator):
    """So that training goes on as if it had not stopped."""
    p = nn.Parameter(torch.randn(50, 33, generator=generator, dtype=torch.float64).to(DEVICE, dtype))
    optimizer = fastcurv.Nero([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn(50, 33, generator=generator, dtype=torch.float64).to(p)
        optimizer.step()
        there = p.detach().clone()
        fastcurv.Nero([p])
        assert torch.equal(p, there)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_projects_groups_that_are_added_to_it(copied, generator):
    def matrix():
        return nn.Parameter(torch.randn(5, 4, generator=generator).to(DEVICE))

    optimizer, later = copied(fastcurv.Nero([matrix()])), matrix()
    optimizer.add_param_group({"params": [later]})
    torch.testing.assert_close(later.norm(dim=1), torch.ones(5, device=DEVICE))


def test_construction_writes_nothing_unless_everything_is_right(generator):
    def matrix(**options):
        return nn.Parameter(torch.randn(4, 3, generator=generator, **options).to(DEVICE))

    whole = nn.Parameter(torch.tensor([[3, 4, 5], [1, 2, 9]], device=DEVICE), requires_grad=False)
    fastcurv.Nero([matrix(), whole])
    assert whole.tolist() == [[3, 4, 5], [1, 2, 9]]
    strided = nn.Parameter(torch.randn(4, 6, generator=generator).to(DEVICE)[:, ::2])
    for params, match in [
        ([{"params": [matrix()]}, {"params": [matrix()], "lr": -1}], "lr: expected a value"),
        ([matrix(), matrix(dtype=torch.complex64)], r"params\[1\]: expected a real tensor"),
        ([matrix(), strided], r"params\[1\]: expected elements that fill their memory"),
        ([matrix(), *nn.LazyLinear(2).parameters()], r"params\[1\]: expected values, which Nero normalises"),
    ]:
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        all_of_them = [p for group in groups for p in group["params"] if type(p) is nn.Parameter]
        before = [p.detach().clone() for p in all_of_them]
        with pytest.raises(ValueError, match=match):
            fastcurv.Nero(params)
        assert all(torch.equal(p, q) for p, q in zip(all_of_them, before, strict=True))
