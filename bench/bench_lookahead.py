"""Cases of the op `lookahead`: around torch's fused SGD, so that what differs is the slow update."""

from __future__ import annotations

import functools

import torch
from torch.nn import Parameter

import fastcurv

from . import models, truths
from .contenders import implementations
from .entry import pytest_generate_tests, test_step
from .harness import Case, Options
from .stepping import Implementation, StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]


def _ours(params: list[Parameter], lr: float, k: int, backend: str) -> fastcurv.Lookahead:
    return fastcurv.Lookahead(torch.optim.SGD(params, lr=lr, fused=True), k=k, backend=backend)


def _implementations(options: Options, dtype: torch.dtype, k: int) -> list[Implementation]:
    theirs = [
        Implementation(name, "torch", functools.partial(truths.Lookahead, k=k, foreach=foreach, fused=True), 4)
        for name, foreach in (("torch foreach", True), ("torch loop", False))
    ]
    ours = functools.partial(_ours, k=k)
    return [*implementations(options, dtype, op="lookahead", ours=ours, states=1), *theirs]


def _case(name: str, work: str, k: int, bytes_per_element: float) -> StepCase:
    return StepCase(
        "lookahead",
        name,
        work,
        shapes=models.resnet50,
        implementations=functools.partial(_implementations, k=k),
        truth=functools.partial(truths.Lookahead, k=k, foreach=False),
        bytes_per_element=bytes_per_element,
        baseline="torch foreach",
        period=k,
        has_ceiling=False,
    )


# SGD moves 12 bytes, the slow update 16.
CASES: list[Case] = [
    _case("resnet50", "SGD and Lookahead with k = 5, ResNet-50", 5, 12 + 16 / 5),
    _case("resnet50-k1", "SGD and a slow update at every step, ResNet-50", 1, 28),
]
