"""The op `lars` and fastcurv.LARS: trust ratios, their edge cases, and SGD where they are off."""

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
SHAPES = [(5, 7), (3, 2, 3, 3), (4, 2100)]


def draw(shapes, generator):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]


def pair(shapes):
    return ([nn.Parameter(p) for p in draw(shapes, torch.Generator().manual_seed(3))] for _ in range(2))


def train(a, theirs, b, mine, steps, generator):
    for _ in range(steps):
        for p, q, g in zip(theirs, mine, draw([p.shape for p in theirs], generator), strict=True):
            p.grad, q.grad = g.clone(), g
        a.step()
        b.step()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_step_has_the_length_that_the_norms_say(backend, nesterov, generator):
    """Without decay and eps a first step moves by lr * trust * |w|, times 1 + momentum with Nesterov, whatever |g|."""
    case = cases.make_case("lars", [(5, 7), (33000,), (3, 2, 2, 2)], "float64", generator=generator, eps=0.0,
                           momentum=0.5, trust_coefficient=0.25, lr=0.5, nesterov=nesterov)  # fmt: skip
    for i, buffer in enumerate(case["momentum_buffers"]):
        buffer.zero_()
        case["grads"][i].mul_(10.0 ** (7 * i - 7))
    result = cases.run(case, backend)
    for before, after, grad in zip(case["params"], result["params"], case["grads"], strict=True):
        length = 0.5 * 0.25 * before.norm() * (1.5 if nesterov else 1.0)
        torch.testing.assert_close(before - after, length * grad / grad.norm(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("which", ["params", "grads"])
def test_a_zero_norm_gives_a_ratio_of_one(backend, which, generator):
    case = cases.make_case("lars", [(5, 7), (9,), (3, 3)], generator=generator, weight_decay=0.25, momentum=0.0)
    case[which][0].zero_()
    case[which][1].zero_()
    result = cases.run(case, backend)
    for i in range(2):
        want = case["params"][i] - 0.1 * (case["grads"][i] + 0.25 * case["params"][i])
        torch.testing.assert_close(result["params"][i], want, rtol=1e-6, atol=1e-7)
    cases.assert_as_accurate_as_torch(result, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1, "maximize": True}])
def test_not_adaptive_is_sgd_with_momentum(backend, options, generator):
    theirs, mine = pair(SHAPES)
    a = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False, **options)
    b = fastcurv.LARS(mine, lr=0.1, momentum=0.9, adaptive=False, backend=backend, **options)
    train(a, theirs, b, mine, 5, generator)
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)
        assert set(a.state[p]) == set(b.state[q])


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"momentum": 0.0}])
def test_as_in_pytorch_optimizer(options, generator):
    """Its LARS has no eps, always leaves vectors out (so none is here), and a ratio of trust / decay for zero gradients."""
    peer = pytest.importorskip("pytorch_optimizer").LARS
    theirs, mine = pair(SHAPES)
    a = peer(theirs, lr=0.3, trust_coefficient=0.05, foreach=False, **options)
    b = fastcurv.LARS(mine, lr=0.3, trust_coefficient=0.05, eps=0.0, backend="reference", **options)
    train(a, theirs, b, mine, 6, generator)
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_leave_vectors_out(backend, generator):
    """The usual recipe: one optimizer, two groups, of which one is plain SGD."""
    weight, bias = (nn.Parameter(p) for p in draw([(5, 7), (5,)], generator))
    optimizer = fastcurv.LARS([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "adaptive": False}],
                              lr=0.1, momentum=0.0, backend=backend)  # fmt: skip
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    w, b = weight.detach().clone(), bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), b - 0.1)
    ratio = 1e-3 * w.norm() / (weight.grad.norm() + 0.1 * w.norm() + 1e-8)
    torch.testing.assert_close(weight.detach(), w - 0.1 * ratio * (1 + 0.1 * w), rtol=1e-13, atol=1e-13)
