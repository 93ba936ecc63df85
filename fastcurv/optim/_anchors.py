"""Copies of parameter values that optimizers keep, and from when on they count."""

from __future__ import annotations

import torch
from torch import Tensor

# Copies follow a parameter for so many steps at most: a GPU is not asked whether it has moved, and some never do.
STEPS = 8


class Anchors:
    """Copies of parameters that count from the first step that moves the parameters.

    Distributed checkpoints make state by a step that moves nothing, and load weights afterwards. A copy that was taken
    in such a step follows its parameter until a step moves that. No GPU is waited for.
    """

    def __init__(self) -> None:
        self._watched: dict[Tensor, tuple[Tensor, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._watched)

    def watch(self, param: Tensor) -> None:
        """To be called where a copy of a parameter was taken."""
        self._watched[param] = torch.zeros((), dtype=torch.bool, device=param.device), 0

    def forget(self, param: Tensor) -> None:
        """To be called where a copy came from a checkpoint: it counts, whatever the parameter is at the moment."""
        self._watched.pop(param, None)

    def follow(self, param: Tensor, kept: Tensor, now: Tensor) -> None:
        """To be called before a step.

        Args:
            param: The parameter.
            kept: What is kept of it; written, unless the parameter has moved since it was taken.
            now: What would be kept if it were taken now.
        """
        if param in self._watched:
            kept.copy_(torch.where(self._watched[param][0], kept, now))

    def settle(self, param: Tensor, has_moved: Tensor) -> None:
        """To be called after a step, with a 0-d tensor that says whether the step has moved the parameter."""
        if param not in self._watched:
            return
        before, steps = self._watched.pop(param)
        moved = before | has_moved
        if steps < STEPS and (moved.device.type != "cpu" or not moved):
            self._watched[param] = moved, steps + 1
