"""Cases of the op `lars`, beside our own Adam."""

from __future__ import annotations

import functools

import fastcurv

from . import models, truths
from .contenders import YARDSTICK, implementations, kozistr
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

# pytorch_optimizer takes SGD's step on tensors of one dimension. It leaves the momentum in p.grad, which goes into its
# next step; its time does not depend on that, and its verification gives it a new gradient at each step.
_PEERS = kozistr(
    "LARS",
    {"trust_coefficient": 1.0},
    computes="LARS with SGD's step for tensors of one dimension",
    truth=functools.partial(truths.LARS, trust=1.0, dimensions=2),
)
_lars = functools.partial(
    StepCase,
    "lars",
    # A trust coefficient of the size at which an error shows.
    implementations=functools.partial(
        implementations,
        op="lars",
        ours=functools.partial(fastcurv.LARS, trust_coefficient=1.0),
        states=1,
        yardstick=True,
        peers=_PEERS,
    ),
    truth=functools.partial(truths.LARS, trust=1.0),
    bytes_per_element=20,
    baseline=YARDSTICK,
)

CASES: list[Case] = [
    _lars("resnet50", "LARS, ResNet-50", shapes=models.resnet50),
    _lars("gpt2", "LARS, GPT-2 124M", shapes=models.gpt2),
]
