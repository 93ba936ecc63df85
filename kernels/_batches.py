"""Lists of matrices as batches of one shape, which kernels do together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _wide(matrix: Tensor) -> Tensor:
    """A matrix, or its transpose where it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def in_batches(
    matrices: list[Tensor], outs: list[Tensor], info: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Applies a function to the matrices of each shape, stacked; a tall one counts as its transpose.

    Args:
        matrices: Matrices of one dtype and device.
        outs: Written: the results, rounded to their dtype.
        info: Written: what the function says of each matrix.
        function: From a contiguous batch with at most as many rows as columns to results and info of its matrices.
    """
    batches: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(tuple(sorted(matrix.shape)), []).append(i)
    found = list(info.view(-1).unbind())
    for members in batches.values():
        results, of_each = function(torch.stack([_wide(matrices[i]) for i in members]))
        torch._foreach_copy_([_wide(outs[i]) for i in members], results.unbind())
        for i, one in zip(members, of_each.unbind(), strict=True):
            found[i] = one
    # One launch, and no index that would have to travel to the device.
    torch.stack(found, out=info.view(-1))
