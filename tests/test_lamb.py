"""The op `lamb` and fastcurv.LAMB: trust ratios, their edge cases, and Adam where they are off."""

import cases
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastcurv

EVERY = [*cases.backends(), "reference"]
BACKENDS = [b for b in EVERY if b != "cuda_host"]
SHAPES = [(5, 7), (3, 2, 3, 3), (4, 2100), (6,), ()]


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
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_every_step_has_the_length_of_the_parameter_times_lr(backend, weight_decay, generator):
    case = cases.make_case("lamb", cases.AWKWARD_SHAPES, "float64", generator=generator, weight_decay=weight_decay)
    result = cases.run(case, backend)
    for before, after in zip(case["params"], result["params"], strict=True):
        torch.testing.assert_close((before - after).norm(), 0.1 * before.norm(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_the_step_is_that_of_adam_scaled(backend, weight_decay, generator):
    """Without decay in the direction of Adam's step; with decay, of that plus lr times decay times the weight."""
    ours = cases.make_case("lamb", SHAPES, "float64", generator=generator, weight_decay=weight_decay)
    lists = {**ours.lists, "max_exp_avg_sqs": [], "mu_products": []}
    lists = {name: lists[name] for name in fastcurv.ops.adam_.lists}
    adam = cases.Case("adam", lists, {**ours.options, "decoupled_weight_decay": True})
    result, plain = cases.run(ours, backend), cases.run(adam, backend)
    for before, after, unscaled in zip(ours["params"], result["params"], plain["params"], strict=True):
        step = before - unscaled
        torch.testing.assert_close(before - after, 0.1 * before.norm() * step / step.norm(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", EVERY)
def test_a_zero_norm_gives_a_ratio_of_one(backend, generator):
    case = cases.make_case("lamb", [(5, 7), (9,), (3, 3)], generator=generator, eps=2.0**-10)
    case["params"][0].zero_()
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        case[name][1].zero_()
    result = cases.run(case, backend)
    cases.assert_as_accurate_as_torch(result, case)
    assert result["params"][0].all() and torch.equal(result["params"][1], case["params"][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.0, 0.5)}])
def test_not_adaptive_is_adamw(backend, options, generator):
    theirs, mine = pair(SHAPES)
    a = torch.optim.AdamW(theirs, lr=0.1, eps=1e-6, weight_decay=0.1, foreach=False, **options)
    b = fastcurv.LAMB(mine, lr=0.1, weight_decay=0.1, adaptive=False, backend=backend, **options)
    train(a, theirs, b, mine, 6, generator)
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)
        assert set(a.state[p]) == set(b.state[q])


def test_as_in_pytorch_optimizer(generator):
    """Its update holds the moments without bias correction, which the trust ratio takes out again where there is neither
    eps nor decay; with either the two differ. By default it also divides the learning rate by 1 - beta1^t outside the
    ratio, clamps the norm of a parameter to 10, and clips gradients."""
    peer = pytest.importorskip("pytorch_optimizer").Lamb
    theirs, mine = pair([(5, 7), (3, 2, 3, 3), (6,)])
    a = peer(theirs, lr=0.1, eps=0.0, max_grad_norm=0.0, foreach=False, adam_debias=True)
    b = fastcurv.LAMB(mine, lr=0.1, eps=0.0, weight_decay=0.0, backend="reference")
    train(a, theirs, b, mine, 6, generator)
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-13)


def test_a_checkpoint_of_adam_loads(generator):
    theirs, mine = pair(SHAPES)
    a, b = torch.optim.AdamW(theirs, lr=0.1), fastcurv.LAMB(mine)
    train(a, theirs, b, mine, 2, generator)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["lr"] == 0.1 and b.param_groups[0]["adaptive"]
    for p, q in zip(theirs, mine, strict=True):
        assert torch.equal(b.state[q]["exp_avg"], a.state[p]["exp_avg"]) and b.state[q]["step"] == 2
    b.step()
