"""Gram-Schmidt on the rows of matrices in Triton: the algorithm of csrc/cpu/gram_schmidt.cpp, one program for a matrix.

Panel by panel, each twice: its rows less their projections on all earlier rows, by products of tiles; then one after
another less their projections on the earlier rows of the panel. A projection that leaves less than half is done again
("twice is enough" holds for a row against an orthonormal set, which a panel is not before its rows are done).

About 4 m^2 n flops for m rows of n elements, which stay in the cache of the GPU at best: a list of many matrices keeps
it busy, a single large one does not.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._batches import in_batches
from ._common import read_scalar, scalar
from ._products import load_tile, multiply_add

# Rows of a panel, earlier rows that are taken at once, columns of a tile in products, bytes of a row in other tiles.
_PANEL, _OTHERS, _DEPTH, _BYTES = 16, 32, 16, 1024
_ROUNDING = 0.1


@triton.jit
def _store_tile(x_ptr, rows, columns, m, n, tile):
    """Stores elements of a contiguous m x n matrix in place of those that were loaded.

    Several threads may have loaded the same one: the barrier keeps the last of them from finding the new value.
    """
    tl.debug_barrier()
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(x_ptr + offsets, tile, mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _normalise_panel(x_ptr, rows, m, n, PANEL: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    """Divides rows by their norms, which it returns: Gram-Schmidt does not see the difference."""
    squares = tl.zeros([PANEL, COLUMNS], tl.float64)
    for begin in range(0, n, COLUMNS):
        tile = load_tile(x_ptr, rows, begin + tl.arange(0, COLUMNS), m, n, COMPUTE).to(tl.float64)
        squares += tile * tile
    norms = tl.sqrt(tl.sum(squares, axis=1))
    scales = tl.where(norms > 0.0, 1.0 / tl.where(norms > 0.0, norms, 1.0), 0.0).to(COMPUTE)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        tile = load_tile(x_ptr, rows, columns, m, n, COMPUTE) * scales[:, None]
        _store_tile(x_ptr, rows, columns, m, n, tile)
    tl.debug_barrier()
    return norms


@triton.jit
def _project_panel(
    x_ptr,
    rows,
    others,
    m,
    n,
    before,
    PANEL: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Subtracts from rows their projections on others, of which those below `before` count."""
    products = tl.zeros([PANEL, OTHERS], COMPUTE)
    for begin in range(0, n, DEPTH):
        columns = begin + tl.arange(0, DEPTH)
        left = load_tile(x_ptr, rows, columns, m, n, COMPUTE)
        products = multiply_add(left, tl.trans(load_tile(x_ptr, others, columns, before, n, COMPUTE)), products)
    for begin in range(0, n, DEPTH):
        columns = begin + tl.arange(0, DEPTH)
        projection = multiply_add(
            products, load_tile(x_ptr, others, columns, before, n, COMPUTE), tl.zeros([PANEL, DEPTH], COMPUTE)
        )
        tile = load_tile(x_ptr, rows, columns, m, n, COMPUTE) - projection
        _store_tile(x_ptr, rows, columns, m, n, tile)
    tl.debug_barrier()


@triton.jit
def _project_row(x_ptr, row, panel, n, PANEL: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    """Subtracts from a row its projections on the earlier rows of its panel; its norm afterwards."""
    products = tl.zeros([PANEL, COLUMNS], COMPUTE)
    index = row + tl.arange(0, 1)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        # Rows that are not earlier are not loaded: they count as zero.
        earlier = load_tile(x_ptr, panel, columns, row, n, COMPUTE)
        products += earlier * load_tile(x_ptr, index, columns, row + 1, n, COMPUTE)
    factors = tl.sum(products, axis=1)
    squares = tl.zeros([1, COLUMNS], tl.float64)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        projection = tl.sum(load_tile(x_ptr, panel, columns, row, n, COMPUTE) * factors[:, None], axis=0)
        tile = load_tile(x_ptr, index, columns, row + 1, n, COMPUTE) - projection[None, :]
        _store_tile(x_ptr, index, columns, row + 1, n, tile)
        squares += tile.to(tl.float64) * tile.to(tl.float64)
    tl.debug_barrier()
    return tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit(do_not_specialize=["scalars"])
def gram_schmidt_kernel(
    x_ptr,
    largest_ptr,
    info_ptr,
    scalars,
    m,
    n,
    PANEL: tl.constexpr,
    OTHERS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """A matrix whose rows were divided by their largest elements, in place."""
    COMPUTE: tl.constexpr = x_ptr.dtype.element_ty
    zero, floor = read_scalar(scalars[0]), read_scalar(scalars[1])
    batch = tl.program_id(0).to(tl.int64)
    x_ptr += batch * m * n
    largest_ptr += batch * m
    unit = tl.full([], 1.0, tl.float64)
    dependent = tl.full([], 0, tl.int32)
    for first in range(0, m, PANEL):
        panel = first + tl.arange(0, PANEL)
        norms = _normalise_panel(x_ptr, panel, m, n, PANEL, COLUMNS, COMPUTE)
        norms *= tl.load(largest_ptr + panel, mask=panel < m, other=0.0).to(tl.float64)
        passes, zeros, shortest = first * 0, dependent * 0, unit
        # What a row loses the second time is rounding of the first, which may be most of it, but not again and again.
        while (passes < 2) | ((shortest < 0.5) & (passes < 4)):
            for other in range(0, first, OTHERS):
                others = other + tl.arange(0, OTHERS)
                _project_panel(x_ptr, panel, others, m, n, first, PANEL, OTHERS, DEPTH, COMPUTE)
            zeros, shortest = dependent * 0, unit
            for row in range(first, tl.minimum(first + PANEL, m)):
                before, length = unit * 4.0, unit
                while (length < 0.5 * before) & (length > zero):
                    before = length
                    length = _project_row(x_ptr, row, panel, n, PANEL, COLUMNS, COMPUTE)
                norm = tl.sum(tl.where(panel == row, norms, 0.0), axis=0)
                # A row of length one of which another projection leaves little was rounding of the first.
                least = tl.where(passes > 0, unit * ROUNDING, unit * zero)
                counts = (length > least) & ((passes > 0) | (length * norm > floor))
                shortest = tl.where(counts, tl.minimum(shortest, length), shortest)
                zeros += tl.where(counts, 0, 1)
                scale = tl.where(counts, 1.0 / tl.where(counts, length, 1.0), 0.0).to(COMPUTE)
                index = row + tl.arange(0, 1)
                for begin in range(0, n, COLUMNS):
                    columns = begin + tl.arange(0, COLUMNS)
                    tile = load_tile(x_ptr, index, columns, row + 1, n, COMPUTE) * scale
                    _store_tile(x_ptr, index, columns, row + 1, n, tile)
                tl.debug_barrier()
            passes += 1
        dependent += zeros
    tl.store(info_ptr + batch, dependent)


def _batch(batch: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt on a batch."""
    exact = batch.dtype == torch.float64
    x = batch.to(torch.float64 if exact else torch.float32)
    # Scaled first, so that no square overflows or vanishes. A maximum is the same in any order, and NaN if one is.
    largest = x.abs().amax(dim=2, keepdim=True)
    finite = largest.isfinite().all(dim=1, keepdim=True)
    x = torch.where(finite & (largest > 0), x / largest, 0.0)
    count, m, n = x.shape
    info = torch.empty(count, dtype=torch.int32, device=x.device)
    zero = math.sqrt(max(n, 64)) * (2.0**-53 if exact else 2.0**-24)
    gram_schmidt_kernel[(count,)](
        x, torch.where(finite, largest, 0.0), info, (scalar(zero), scalar(floor)), m, n,
        PANEL=_PANEL, OTHERS=_OTHERS, DEPTH=_DEPTH, COLUMNS=_BYTES // x.element_size(), ROUNDING=_ROUNDING, num_warps=8,
        # Without a bound ptxas spills to fit a second program in a multiprocessor.
        maxnreg=224,
    )  # fmt: skip
    return x, torch.where(finite.view(-1), info, -2)


def gram_schmidt(matrices: list[Tensor], outs: list[Tensor], info: Tensor, *, floor: float) -> None:
    """One launch for each shape; see `fastcurv.ops.orthogonalize` for the arguments."""
    in_batches(matrices, outs, info, partial(_batch, floor=floor))
