"""Cases of the op `sgd`, with momentum."""

from __future__ import annotations

import functools

import torch

import fastcurv

from . import models
from .contenders import implementations, loop, optimi
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

_OURS, _THEIRS = (functools.partial(made, momentum=0.9) for made in (fastcurv.SGD, torch.optim.SGD))
_sgd = functools.partial(
    StepCase,
    "sgd",
    implementations=functools.partial(
        implementations, op="sgd", ours=_OURS, states=1, theirs=_THEIRS, peers=optimi("SGD", {"momentum": 0.9})
    ),
    truth=loop(_THEIRS),
    bytes_per_element=20,
)

CASES: list[Case] = [
    _sgd("1x50M", "SGD, one tensor of 50M", devices=("cpu",), shapes=lambda: models.single(50_000_000)),
    _sgd("2000x5k", "SGD, 2000 tensors of 5000", shapes=lambda: models.many(2000, 5000)),
    _sgd("resnet50", "SGD, ResNet-50", shapes=models.resnet50),
    _sgd("300x64", "SGD, 300 tensors of 64", shapes=lambda: models.many(300, 64), has_ceiling=False),
    _sgd("1x1e9", "SGD, one tensor of 1e9", devices=("cuda",), shapes=lambda: models.single(1_000_000_000)),
]
