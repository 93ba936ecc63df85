"""Cases that measure a whole training step, to see what share of it an optimizer takes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .harness import WARM_UPS, Case, Contender, Options, Prepared, Role

QUICK_BATCH = 8


class _Block(nn.Module):
    """Two convolutions around which the input is added, subsampled and padded where shapes differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.padding = outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return torch.relu(y + shortcut)


def resnet20() -> nn.Sequential:
    """ResNet-20 for CIFAR-10 (He et al., 2016, section 4.2), identity shortcuts: 20 matrices, 0.27M parameters."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [_Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An optimizer that takes part.

    Attributes:
        name: As printed.
        role: See `Contender`.
        make: The optimizer of a model.
        computes: See `Contender`.
    """

    name: str
    role: Role
    make: Callable[[nn.Module], Optimizer]
    computes: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCase(Case):
    """Forward, backward and `opt.step()` of ResNet-20 on random images.

    Attributes:
        batch: Images in a mini-batch.
        trainers: Who takes part.
    """

    batch: int
    trainers: Callable[[Options], list[Trainer]]

    def size(self, options: Options) -> dict[str, int]:
        """See `Case.size`."""
        count = [p.numel() for p in resnet20().parameters()]
        return {"tensors": len(count), "elements": sum(count)}

    def contenders(self, options: Options) -> list[Contender]:
        """See `Case.contenders`."""
        return [
            Contender(
                name=trainer.name,
                role=trainer.role,
                verify=lambda: "",  # the ops are, in cases of their own
                prepare=functools.partial(self.prepare, trainer, options),
                computes=trainer.computes,
            )
            for trainer in self.trainers(options)
        ]

    def prepare(self, trainer: Trainer, options: Options) -> Prepared:
        """Gives a trainer a model and images of its own.

        Args:
            trainer: What is prepared.
            options: Device, and whether the work is shrunk.
        """
        torch.manual_seed(0)
        batch = QUICK_BATCH if options.quick else self.batch
        model = resnet20().to(options.device)
        images = torch.randn(batch, 3, 32, 32, device=options.device)
        labels = torch.randint(10, (batch,), device=options.device)
        optimizer = trainer.make(model)

        stopwatch = _Stopwatch(options.device)

        def step() -> None:
            stopwatch.start()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            stopwatch.lap()
            optimizer.step()
            stopwatch.lap()

        for _ in range(WARM_UPS):
            step()
        return Prepared(step, share=stopwatch.share)


class _Stopwatch:
    """Two laps, over and over: which part of the time is the second?"""

    def __init__(self, device: str) -> None:
        self._device = device
        self._times: list[list[float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begins anew."""
        self._times.append([self._now()])

    def lap(self) -> None:
        """Ends a lap."""
        self._times[-1].append(self._now())

    def _now(self) -> float | torch.cuda.Event:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share(self) -> float:
        """That of the second lap, the median over all but the first calls."""
        counted = self._times[WARM_UPS:] or self._times
        return statistics.median(_between(b, c) / _between(a, c) for a, b, c in counted)


def _between(a: float | torch.cuda.Event, b: float | torch.cuda.Event) -> float:
    if isinstance(a, float) and isinstance(b, float):
        return b - a
    assert isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
    b.synchronize()
    return float(a.elapsed_time(b))
