"""Cases of the op `nero`, beside our own Adam."""

from __future__ import annotations

import functools

import fastcurv

from . import models, truths
from .contenders import YARDSTICK, implementations, kozistr
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

# Its eps is added where the paper has none.
_PEERS = kozistr("Nero", {"eps": 0.0})
_nero = functools.partial(
    StepCase,
    "nero",
    implementations=functools.partial(
        implementations, op="nero", ours=fastcurv.Nero, states=0, yardstick=True, peers=_PEERS
    ),
    truth=truths.Nero,
    bytes_per_element=12,
    baseline=YARDSTICK,
)

CASES: list[Case] = [
    _nero("resnet50", "Nero, ResNet-50", shapes=models.resnet50),
    _nero("gpt2", "Nero, GPT-2 124M", shapes=models.gpt2),
]
