"""Copies of parameter values: slow weights of Lookahead and Ranger, and Nero's scales, count from where training starts."""

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from training import set_grads, train

import fastcurv

BACKENDS = [None, "reference"]


def make_lookahead(params, backend=None):
    return fastcurv.Lookahead(torch.optim.SGD(params, lr=0.5), k=3, backend=backend)


def make_lookahead_adamw(params, backend=None):
    return fastcurv.Lookahead(fastcurv.AdamW(params, lr=0.5, weight_decay=0.0, backend=backend), k=3, backend=backend)


def make_ranger(params, backend=None):
    return fastcurv.Ranger(params, lr=0.5, k=3, backend=backend)


def make_nested(params, backend=None):
    return fastcurv.Lookahead(make_ranger(params, backend), k=2, backend=backend)


MAKERS = [make_lookahead, make_lookahead_adamw, make_ranger, make_nested]
every_maker = pytest.mark.parametrize("make", MAKERS)


def weights(value, dtype=torch.float32):
    return [nn.Parameter(torch.full(shape, value, dtype=dtype, device=DEVICE)) for shape in ((3, 4), (5,))]


def load(params, value):
    with torch.no_grad():
        for param in params:
            param.fill_(value)


def slow_weights(optimizer):
    keys = [key for state in optimizer.state.values() for key in state if key.endswith("slow_buffer")]
    assert keys
    return [state[key] for state in optimizer.state.values() for key in state if key.endswith("slow_buffer")]


def dummy_step(optimizer, kind, params):
    """Takes a step that creates state and moves no parameter."""
    if kind == "checkpoint":  # torch's own: zero gradients, learning rate 0
        model = nn.Module()
        model.a, model.b = params
        get_optimizer_state_dict(model, optimizer)
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in params:
        param.grad = torch.zeros_like(param) if kind.startswith("zeros") else torch.ones_like(param)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if kind == "tensor" else 0.0 if kind != "zeros" else group["lr"]
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["checkpoint", "zeros", "zeros, lr 0", "lr 0", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
@every_maker
def test_weights_loaded_after_a_step_that_moved_nothing_are_where_slow_weights_start(make, backend, kind, dtype):
    params = weights(100.0, dtype)
    optimizer = make(params, backend)
    dummy_step(optimizer, kind, params)
    load(params, 1.0)
    for _ in range(6):  # a slow update or more
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    momentum_left = 1.0 if kind in ("lr 0", "tensor") else 0.0  # of the gradients that were seen
    for param in params:
        assert (param - 1.0).abs().max() <= 6 * 0.5 * 10 * momentum_left + 1e-6
    for slow in slow_weights(optimizer):
        assert (slow - 1.0).abs().max() <= 6 * 0.5 * 10 * momentum_left + 1e-6


@every_maker
def test_a_step_that_moved_something_is_where_slow_weights_stay(make):
    """Constraints that change weights between steps, such as clipping, are a part of training."""
    params = weights(1.0)
    optimizer = make(params)
    train(optimizer, [0])
    before = [slow.clone() for slow in slow_weights(optimizer)]
    load(params, 0.25)
    train(optimizer, [1])
    if make is make_nested:  # k = 2: the outer slow weights have moved
        return
    for slow, kept in zip(slow_weights(optimizer), before, strict=True):
        assert torch.equal(slow, kept)


@every_maker
def test_slow_weights_are_reset_in_mid_training(make):
    params = weights(1.0)
    optimizer = make(params)
    train(optimizer, range(4))
    load(params, 7.0)
    optimizer.reset_slow_weights()
    if make is make_nested:
        optimizer.optimizer.reset_slow_weights()
    for slow in slow_weights(optimizer):
        assert (slow == 7.0).all()
    load(params, 8.0)  # nothing has moved yet
    train(optimizer, [4], skip=lambda _: (0, 1))
    for param in params:
        param.grad = torch.zeros_like(param)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@every_maker
def test_a_copy_knows_that_nothing_has_moved(make, how):
    params = weights(100.0)
    optimizer = make(params)
    dummy_step(optimizer, "zeros, lr 0", params)
    again = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
    copies = [param for group in again.param_groups for param in group["params"]]
    load(copies, 1.0)
    for _ in range(6):
        for param in copies:
            param.grad = torch.zeros_like(param)
        again.step()
    for param in copies:
        assert (param == 1.0).all()


@every_maker
def test_loaded_slow_weights_count_whatever_the_parameters_are(make):
    """Also where they equal the parameters, as the first ones of a run do that starts from the same seed."""
    params, others = weights(1.0), weights(1.0)
    source, target = make(params), make(others)
    train(source, [0])
    dummy_step(target, "zeros, lr 0", others)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    train(source, range(1, 7))
    train(target, range(1, 7))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["checkpoint", "zeros", "zeros, lr 0"])
def test_scales_of_nero_are_those_of_the_weights_that_are_trained(kind):
    def make(value):
        params = weights(value)
        return fastcurv.Nero(params, constraints=False), params

    early, params = make(100.0)
    dummy_step(early, kind, params)
    load(params, 2.0)
    late, others = make(2.0)
    for optimizer in (early, late):
        train(optimizer, [0])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(early.state[p]["scale"], late.state[q]["scale"])
    load(params, 3.0)
    early.reset_scales()
    fresh, others = make(3.0)
    train(fresh, [0])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(early.state[p]["scale"], fresh.state[q]["scale"])


@every_maker
def test_following_ends_where_training_begins(make):
    params = weights(1.0)
    optimizer = make(params)
    set_grads(params, 0)
    optimizer.step()
    if DEVICE.type == "cpu":
        assert not optimizer._anchors
    train(optimizer, range(1, 12))
    assert not optimizer._anchors
