"""Every uninitialised allocation of the library, in one place: tests fill it with NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def empty(*size: int, device: torch.device | str | None, **options: Any) -> Tensor:
    """`torch.empty`; the device is named, because the default one is the user's to choose."""
    return torch.empty(*size, device=device, **options)


def empty_like(tensor: Tensor, **options: Any) -> Tensor:
    """`torch.empty_like`, in the memory format of `tensor`."""
    return torch.empty_like(tensor, **options)
