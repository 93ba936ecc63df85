"""Models, gradients and optimizers that the tests of all optimizers share."""

from __future__ import annotations

import torch
from cases import DEVICE
from torch import nn

import fastcurv

# Where torch has the class: its options are ours.
PAIRS = {
    name: (getattr(torch.optim, name), getattr(fastcurv, name)) for name in ("Adam", "AdamW", "RAdam", "NAdam", "SGD")
}

# Every optimizer, with options under which it keeps all the state it can.
OURS = {
    "Adam": (fastcurv.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (fastcurv.AdamW, {"lr": 0.05}),
    "RAdam": (fastcurv.RAdam, {"lr": 0.05, "betas": (0.9, 0.99)}),
    "NAdam": (fastcurv.NAdam, {"lr": 0.05}),
    "Yogi": (fastcurv.Yogi, {"lr": 0.05}),
    "SGD": (fastcurv.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "LARS": (fastcurv.LARS, {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.1}),
    "LAMB": (fastcurv.LAMB, {"lr": 0.05}),
    "OSGD": (fastcurv.OSGD, {"lr": 0.05, "weight_decay": 0.1}),
    "Muon": (fastcurv.Muon, {"lr": 0.05}),
    "Nero": (fastcurv.Nero, {"lr": 0.05, "beta": 0.9}),
    "Ranger": (fastcurv.Ranger, {"lr": 0.05, "betas": (0.9, 0.99), "k": 3, "weight_decay": 0.1}),
}


# These look at a gradient as a whole, after GradScaler has unscaled it.
WHOLE = ("OSGD", "Muon")


def make(name, params, **options):
    """One of `OURS`."""
    cls, defaults = OURS[name]
    return cls(params, **{**defaults, **options})


def network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(80, 7), nn.Linear(7, 3, bias=False)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(params, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = None if i in skip else grad.to(param)


def train(optimizer, steps, skip=lambda step: ()):
    """Steps with gradients that depend on nothing but the number of the step."""
    for step in steps:
        set_grads(parameters_of(optimizer), step, skip(step))
        optimizer.step()


def copy_weights(source, target):
    with torch.no_grad():
        for p, q in zip(source, target, strict=True):
            q.copy_(p)


def assert_same_weights(a, b):
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(p, q), i
