"""Cases of the op `lamb`, beside our own Adam."""

from __future__ import annotations

import functools
import math

import fastcurv

from . import models, truths
from .contenders import YARDSTICK, implementations, kozistr
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

# pytorch_optimizer corrects no bias, which the trust ratio divides out where eps and weight decay are zero, and bounds
# norms at 10 unless told otherwise. `adam_debias` keeps it from correcting the learning rate instead.
_PEERS = kozistr(
    "Lamb",
    {"eps": 0.0, "adam_debias": True},
    attributes={"clamp": math.inf},
    computes="LAMB without weight decay, with eps = 0",
    truth=functools.partial(truths.LAMB, eps=0.0),
)
_lamb = functools.partial(
    StepCase,
    "lamb",
    implementations=functools.partial(
        implementations, op="lamb", ours=fastcurv.LAMB, states=2, yardstick=True, peers=_PEERS
    ),
    truth=functools.partial(truths.LAMB, weight_decay=0.01),
    bytes_per_element=28,
    baseline=YARDSTICK,
)

CASES: list[Case] = [
    _lamb("resnet50", "LAMB, ResNet-50", shapes=models.resnet50),
    _lamb("gpt2", "LAMB, GPT-2 124M", shapes=models.gpt2),
]
