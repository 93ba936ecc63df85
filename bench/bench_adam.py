"""Cases of the op `adam`: for `fastcurv bench adam`, and for `pytest bench`, which compares commits."""

from __future__ import annotations

import functools
from typing import Any

import torch

import fastcurv

from . import models, truths
from .contenders import YARDSTICK, Peer, implementations, kozistr, loop, optimi
from .entry import pytest_generate_tests, test_step
from .harness import Case
from .stepping import Make, StepCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

# The Adam of pytorch_optimizer is torch's own class; of what it implements itself, QHAdam with its default nus=(1, 1)
# is Adam. torch-optimi adds eps to the root of the corrected second moment, which is Adam; in RAdam it is the same for
# eps=0 alone.
_PEERS = [
    *(peer for peer in optimi("Adam", {"betas": (0.9, 0.999), "eps": 1e-8}) if peer.name == "torch-optimi"),
    Peer("pytorch_optimizer QHAdam", "pytorch_optimizer", "QHAdam", {"foreach": True}),
]
_RADAM_TRUTH = loop(functools.partial(torch.optim.RAdam, eps=0))
_RADAM_PEERS = optimi("RAdam", {"betas": (0.9, 0.999), "eps": 0.0}, computes="RAdam with eps = 0", truth=_RADAM_TRUTH)
# It starts both moments at the same value, which we do only for zero.
_YOGI_PEERS = kozistr(
    "Yogi",
    {"initial_accumulator": 0.0},
    computes="Yogi whose second moment starts at zero",
    truth=functools.partial(truths.Yogi, start=0.0),
)


def _case(ours: Any, theirs: Any, truth: Make, **options: Any) -> Any:
    """What makes cases of a rule of the op; `options` are those of `implementations`."""
    return functools.partial(
        StepCase,
        "adam",
        implementations=functools.partial(implementations, op="adam", ours=ours, states=2, theirs=theirs, **options),
        truth=truth,
        bytes_per_element=28,
    )


_adam = _case(fastcurv.Adam, torch.optim.Adam, loop(torch.optim.Adam), peers=_PEERS)
_radam = _case(fastcurv.RAdam, torch.optim.RAdam, loop(torch.optim.RAdam), fused=False, peers=_RADAM_PEERS)
_nadam = _case(fastcurv.NAdam, torch.optim.NAdam, loop(torch.optim.NAdam), fused=False)
_yogi = _case(fastcurv.Yogi, None, truths.Yogi, yardstick=True, peers=_YOGI_PEERS)
_half = functools.partial(_adam, dtype=torch.bfloat16, bytes_per_element=22, baseline="")
_CPU, _GPU = ("cpu",), ("cuda",)

CASES: list[Case] = [
    _adam("1x50M", "Adam, one tensor of 50M", devices=_CPU, shapes=lambda: models.single(50_000_000)),
    _adam("2000x5k", "Adam, 2000 tensors of 5000", shapes=lambda: models.many(2000, 5000)),
    _adam("resnet20", "Adam, ResNet-20", shapes=models.resnet20),
    _adam("resnet50", "Adam, ResNet-50", shapes=models.resnet50),
    _adam("mnist", "Adam, MNIST autoencoder", shapes=models.mnist),
    _adam("gpt2", "Adam, GPT-2 124M", shapes=models.gpt2),
    _half("1x50M-bf16", "Adam, one bfloat16 tensor of 50M", devices=_CPU, shapes=lambda: models.single(50_000_000)),
    _adam("300x64", "Adam, 300 tensors of 64", shapes=lambda: models.many(300, 64), has_ceiling=False),
    _adam("1x1e9", "Adam, one tensor of 1e9", devices=_GPU, shapes=lambda: models.single(1_000_000_000)),
    _half("1x1e9-bf16", "Adam, one bfloat16 tensor of 1e9", devices=_GPU, shapes=lambda: models.single(1_000_000_000)),
    _adam("llama_1b", "Adam, Llama 3.2 1B", devices=_GPU, shapes=models.llama_1b),
    _radam("radam-resnet50", "RAdam, ResNet-50", baseline="torch foreach", shapes=models.resnet50),
    _nadam("nadam-resnet50", "NAdam, ResNet-50", baseline="torch foreach", shapes=models.resnet50),
    _yogi("yogi-resnet50", "Yogi, ResNet-50", baseline=YARDSTICK, shapes=models.resnet50),
]
