"""What the ops on Kronecker factors share: the checks of lists of square matrices, and of damping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastcurv import _alloc, _backend, _check

DTYPES = (torch.float32, torch.float64)
# Rows of results that share memory.
SHARED = 64


def factors(matrices: Sequence[Tensor], name: str = "factors", like: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Checks a list of square matrices.

    Args:
        matrices: What was given.
        name: What the argument is called.
        like: Checked ones that these must be like.

    Returns:
        The matrices, contiguous.

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    matrices = listed(matrices, name)
    if like is not None and len(matrices) != len(like):
        raise ValueError(f"{name}: expected {len(like)} tensors, one for each of factors, got {len(matrices)}")
    if like is None and _are_square(matrices):
        return matrices
    for i, matrix in enumerate(matrices):
        where = f"{name}[{i}]"
        _check.dense_tensor(matrix, where)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"{where}: expected a square matrix, got shape {tuple(matrix.shape)}")
        if matrix.dtype not in DTYPES:
            raise ValueError(
                f"{where}: expected float32 or float64, got {matrix.dtype}; inverses of 16-bit factors are noise, keep "
                "factors in float32"
            )
        model = matrices[0] if like is None else like[i]
        if matrix.dtype != model.dtype or matrix.device != model.device:
            raise ValueError(
                f"{where}: expected {model.dtype} on {model.device} like factors[{0 if like is None else i}], got "
                f"{matrix.dtype} on {matrix.device}; one call takes one dtype and device"
            )
        if like is not None and matrix.shape != model.shape:
            raise ValueError(
                f"{where}: expected shape {tuple(model.shape)} like factors[{i}], got {tuple(matrix.shape)}"
            )
    return [matrix.resolve_neg().contiguous() for matrix in matrices]


def listed(matrices: object, name: str = "factors") -> list[Any]:
    """See `fastcurv._check.tensors`."""
    return _check.tensors(matrices, name, "for one matrix, give [matrix]")


def _are_square(matrices: list[Any]) -> bool:
    """Whether there is nothing to say of a list, and nothing to copy: mostly so, and soon found out."""
    native = _backend.native()
    if native is None or not {Tensor, Parameter}.issuperset(map(type, matrices)):
        return False
    return not any(map(Tensor.is_neg, matrices)) and native.are_square(matrices)


def by_size(matrices: Sequence[Tensor], at_least: int = 0) -> list[list[int]]:
    """The numbers of the square matrices of each size, from a least one on."""
    members: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if len(matrix) >= at_least:
            members.setdefault(len(matrix), []).append(i)
    return list(members.values())


def results(matrices: list[Tensor]) -> list[Tensor]:
    """Uninitialised, contiguous matrices like those given.

    Small ones that are all of one size share their memory: to allocate one takes longer than to invert it.
    """
    sizes = set(map(Tensor.numel, matrices))
    if len(matrices) > 1 and len(sizes) == 1 and 0 < max(sizes) <= SHARED**2:
        n = len(matrices[0])
        whole = _alloc.empty(len(matrices) * n, n, dtype=matrices[0].dtype, device=matrices[0].device)
        with torch.no_grad():
            return list(whole.unsafe_split(n))  # each has a version counter of its own
    return [_alloc.empty_like(matrix) for matrix in matrices]


def dampings(damping: float | Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """What is added to the diagonal of each of some matrices, float64 on their device.

    Raises:
        TypeError, ValueError: Unless it is a number that is not negative, or a tensor of one or of one for each.
    """
    device = matrices[0].device if matrices else None
    if not isinstance(damping, Tensor):
        _check.number("damping", damping)
        return torch.full((len(matrices),), float(damping), dtype=torch.float64, device=device)
    if damping.dtype not in DTYPES or damping.numel() not in (1, len(matrices)):
        raise ValueError(
            f"damping: expected a number, or a float32 or float64 tensor of one element or of {len(matrices)}, one for "
            f"each of factors, got {damping.dtype} of shape {tuple(damping.shape)}"
        )
    if matrices and damping.device != device:
        raise ValueError(f"damping: expected a tensor on {device} like factors, got {damping.device}")
    return damping.detach().to(torch.float64).reshape(-1).expand(len(matrices)).contiguous()


def fake(matrices: list[Tensor], damping: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tensors like the results for a list of factors, and like their `info`."""
    info = torch.empty(len(matrices), dtype=torch.int32, device=damping.device)
    return [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in matrices], info
