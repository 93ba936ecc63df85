"""Cases of the op `ranger`. Times are means over the six steps from one move of the slow weights to the next."""

from __future__ import annotations

import functools

import fastcurv

from . import models, truths
from .contenders import YARDSTICK, implementations, kozistr, optimi
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

# torch-optimi has no gradient centralisation, and adds eps to the root of the corrected second moment: with eps=0 it is
# Ranger without centralisation. It takes p.grad for its temporaries. pytorch_optimizer ascends in the first five steps
# unless told to degenerate to SGD; it centralises p.grad itself, which changes nothing the second time.
_PEERS = [
    *optimi(
        "Ranger",
        {"betas": (0.95, 0.999), "eps": 0.0},
        computes="Ranger without gradient centralisation, with eps = 0",
        truth=functools.partial(truths.Ranger, eps=0.0, use_gc=False),
    ),
    *kozistr("Ranger", {"degenerated_to_sgd": True}),
]
_ranger = functools.partial(
    StepCase,
    "ranger",
    implementations=functools.partial(
        implementations, op="ranger", ours=fastcurv.Ranger, states=3, yardstick=True, peers=_PEERS
    ),
    truth=truths.Ranger,
    bytes_per_element=28 + 8 / 6,
    baseline=YARDSTICK,
    period=6,
)
_CPU, _GPU = ("cpu",), ("cuda",)

CASES: list[Case] = [
    _ranger("1x50M", "Ranger, one matrix of 50M", devices=_CPU, shapes=lambda: [(50_000, 1000)]),
    _ranger("1800x1k", "Ranger, 1800 matrices of 10 x 100", shapes=lambda: [(10, 100)] * 1800),
    _ranger("resnet50", "Ranger, ResNet-50 (25.6M parameters)", shapes=models.resnet50),
    _ranger("gpt2", "Ranger, GPT-2 124M", shapes=models.gpt2),
    _ranger("300x64", "Ranger, 300 tensors of 64", shapes=lambda: models.many(300, 64), has_ceiling=False),
    _ranger("1x1e9", "Ranger, one matrix of 1e9", devices=_GPU, shapes=lambda: [(100_000, 10_000)]),
]
