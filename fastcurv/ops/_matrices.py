"""What the ops on each matrix of a list share: checks, flattening, and large matrices as torch's products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcurv import _alloc, _backend, _check

# Info of a matrix that is not finite; its result is zero.
NOT_FINITE = -2


def check(matrices: Sequence[Tensor]) -> None:
    """Checks a list of matrices, or of tensors that are flattened from dim 1 on.

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    for i, matrix in enumerate(matrices):
        where = f"matrices[{i}]"
        _check.dense_tensor(matrix, where)
        if matrix.dim() < 2:
            raise ValueError(
                f"{where}: expected two dimensions or more, the first counting rows, got shape {tuple(matrix.shape)}; "
                "leave biases and scales out"
            )
        if matrix.dtype != matrices[0].dtype or matrix.device != matrices[0].device:
            raise ValueError(
                f"{where}: expected {matrices[0].dtype} on {matrices[0].device} like matrices[0], got {matrix.dtype} "
                f"on {matrix.device}; one call takes one dtype and device"
            )


def check_info(matrices: Sequence[Tensor], info: Tensor | None) -> None:
    """Checks where the ops on a list of matrices are to write what they found; ValueError if they cannot."""
    if info is None:
        return
    if not isinstance(info, Tensor) or info.dtype != torch.int32 or info.numel() != len(matrices):
        found = f"{info.numel()} of {info.dtype}" if isinstance(info, Tensor) else type(info).__name__
        raise ValueError(f"info: expected {len(matrices)} int32 elements, one for each of matrices, got {found}")
    if not info.is_contiguous() or (matrices and info.device != matrices[0].device):
        raise ValueError(f"info: expected a contiguous tensor on {matrices[0].device} like matrices")


def flat(tensor: Tensor) -> Tensor | None:
    """A view of a tensor as a contiguous matrix whose rows are its slices along dim 0; None where there is none.

    The columns are in the order of memory.
    """
    rows = tensor.shape[0]
    columns = tensor.numel() // rows if rows else 0
    if tensor.is_contiguous():
        return tensor.view(rows, columns)
    if (rows == 1 or tensor.stride(0) == columns) and _check.is_dense(tensor):
        return tensor.as_strided((rows, columns), (columns, 1))
    return None


def _flattened(tensor: Tensor, is_usable: bool) -> Tensor:
    """A tensor as a contiguous matrix: its memory where that is usable, or a copy."""
    matrix = flat(tensor) if is_usable else None
    return tensor.reshape(len(tensor), tensor[:1].numel()).contiguous() if matrix is None else matrix


# What works on some of the matrices: (matrices, outs, info), the last two written.
Work = Callable[[list[Tensor], list[Tensor], Tensor], Any]


def mapped(matrices: Sequence[Tensor], function: Work, info: Tensor, in_order: bool = False) -> list[Tensor]:
    """Applies a function to tensors flattened to matrices, and gives the results their shapes.

    Args:
        matrices: Tensors of two or more dimensions.
        function: What is applied; it sees no empty matrices.
        info: One element for each tensor.
        in_order: Whether the order of columns means something to the function; others commute with permutations.

    Returns:
        Tensors of the shapes, dtypes and, where they are dense, layouts of `matrices`.
    """
    # As memory says, and with memory.
    matrices = [torch.zeros_like(m) if m._is_zerotensor() else m.resolve_neg() for m in matrices]
    results = [_alloc.empty_like(matrix) for matrix in matrices]
    usable = [flat(matrix) is not None and (matrix.is_contiguous() or not in_order) for matrix in matrices]
    views = [
        flat(result) if is_usable and matrix.stride() == result.stride() else None
        for matrix, result, is_usable in zip(matrices, results, usable, strict=True)
    ]
    # Where memory is no matrix, what lies in it is copied there and back.
    ins = [_flattened(matrix, is_usable) for matrix, is_usable in zip(matrices, usable, strict=True)]
    outs = [_alloc.empty_like(m) if v is None else v for m, v in zip(ins, views, strict=True)]
    full = [i for i, matrix in enumerate(matrices) if matrix.numel()]
    if len(full) < len(matrices):
        info.zero_()
    in_groups({tuple(full): function} if full else {}, ins, outs, info)
    for result, view, out in zip(results, views, outs, strict=True):
        if view is None:
            result.copy_(out.view(result.shape))
    return results


def widened(work: Work, matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    """Lets what works on float32 work on 16-bit matrices.

    Args:
        work: What works on float32 and float64.
        matrices: Matrices of one dtype.
        outs: Their results.
        info: One element for each.
    """
    if matrices[0].dtype in (torch.float32, torch.float64):
        work(matrices, outs, info)
        return
    results = [_alloc.empty_like(matrix, dtype=torch.float32) for matrix in matrices]
    work([matrix.float() for matrix in matrices], results, info)
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)


def in_groups(groups: Mapping[tuple[int, ...], Work], matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    """Lets each group of matrices be worked on by itself; what `info` says of no group stays.

    Args:
        groups: What works on which of them, by their numbers.
        matrices: All matrices.
        outs: Their results.
        info: One element for each; a GPU writes it without the host waiting.
    """
    if len(groups) == 1 and len(next(iter(groups))) == len(matrices):
        next(iter(groups.values()))(matrices, outs, info)
        return
    order = [i for indices in groups for i in indices]
    found = _alloc.empty(len(order), dtype=torch.int32, device=info.device)
    begin = 0
    for indices, work in groups.items():
        end = begin + len(indices)
        work([matrices[i] for i in indices], [outs[i] for i in indices], found[begin:end])
        begin = end
    if order:
        info.index_copy_(0, numbers(tuple(order), info.device), found)


@functools.lru_cache(maxsize=64)
def numbers(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions, on a device; waits for a GPU the first time only."""
    return torch.tensor(order, device=device)


def wide(matrix: Tensor) -> Tensor:
    """A matrix, or its transpose where it has more rows than columns."""
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def lone(matrices: Sequence[Tensor]) -> int | None:
    """The number of the matrix with which one thread would be busy after all others are done with the rest."""
    costs = _costs(matrices)
    most = max(range(len(costs)), key=costs.__getitem__)
    return most if torch.get_num_threads() * costs[most] > sum(costs) else None


def _costs(matrices: Sequence[Tensor]) -> list[int]:
    return [min(matrix.shape) * matrix.numel() for matrix in matrices]


def each(function: Callable[[Tensor, Tensor], int], matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    """Applies a function of torch's operations to one matrix after the other, on a CPU one to a thread if that is best.

    Args:
        function: Writes its second argument, and returns what `info` is to say.
        matrices: Matrices.
        outs: Their results.
        info: Written: one element for each.
    """
    costs = _costs(matrices)
    order = sorted(range(len(matrices)), key=costs.__getitem__, reverse=True)

    # Both are a thread's own.
    inference = torch.is_inference_mode_enabled()

    def run(k: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            info[order[k]] = function(matrices[order[k]], outs[order[k]])

    native = _backend.native()
    if native is not None and info.device.type == "cpu" and lone(matrices) is None:
        native.on_threads(run, len(order))
    else:
        for k in range(len(order)):
            run(k)


def unit(peaks: Tensor, part: float = 0.3) -> Tensor:
    """Powers of two that bring magnitudes near one; 1 where their exponents are within a part of the dtype's range.

    Multiplying by a power of two is exact, so that the bits of a norm or mean stay what they were.

    Args:
        peaks: Float32 or float64, the largest magnitude of each of some tensors.
        part: Of the dtype's exponents: below a half squares are safe.
    """
    most = math.log2(torch.finfo(peaks.dtype).max)
    exponents = peaks.double().log2().floor().clamp(2 - most, most - 2)
    is_extreme = peaks.isfinite() & (exponents.abs() > part * most)
    return torch.where(is_extreme, exponents.neg().exp2(), 1.0).to(peaks.dtype)


Dims = int | tuple[int, ...] | None


def scaled(x: Tensor, dim: Dims = None) -> tuple[Tensor, Tensor | float]:
    """A tensor whose squares float64 holds, and what power of two it was multiplied by; others are so already."""
    if x.dtype != torch.float64 or not x.numel():
        return x, 1.0
    scale = unit(torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=True))
    return x * scale, scale


def norm(x: Tensor, dim: Dims = None) -> Tensor:
    """The Euclidean norm, float64 with reduced dimensions kept: infinite only if an element is."""
    x, scale = scaled(x, dim)
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)
    return torch.where(size.isfinite(), (size / scale).clamp(max=torch.finfo(torch.float64).max), size)


def mirrored(matrices: Tensor) -> Tensor:
    """Symmetric matrices (b, n, n), of which what is on and below the diagonal is read."""
    return matrices.tril() + matrices.tril(-1).mT


def symmetric_product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, blocks: int = 4
) -> Tensor:
    """Alpha X y^T + beta plus where that is known to be symmetric, by blocks of rows: five eighths of the flops.

    Args:
        x: (b, m, n), in any layout.
        y: (b, m, n).
        plus: (b, m, m), symmetric, or None.
        alpha: Factor of the product.
        beta: Factor of `plus`.
        blocks: Blocks of rows.

    Returns:
        (b, m, m), symmetric to the bit.
    """
    m = x.shape[1]
    out = _alloc.empty(len(x), m, m, dtype=x.dtype, device=x.device)
    step = -(-m // blocks)
    for begin in range(0, m, step):
        end = min(m, begin + step)
        to = out[:, begin:end, :end]
        added = to if plus is None else plus[:, begin:end, :end]
        scale = 0.0 if plus is None else beta
        torch.baddbmm(added, x[:, begin:end], y[:, :end].mT, beta=scale, alpha=alpha, out=to)
        corner = to[:, :, begin:]
        corner.copy_(mirrored(corner))
        if begin:
            out[:, :begin, begin:end] = to[:, :, :begin].mT
    return out
