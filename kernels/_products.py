"""Products of batches of matrices in Triton, half of each where the product is known to be symmetric.

The bits of a product do not depend on how many there are: tiles and splits are chosen by the shape of the matrices, and
partial sums are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import read_scalar, scalar, store, widened

# Programs that a single matrix should give, and the columns that are worth one.
_PROGRAMS = 64
_COLUMNS = 256

Step = tuple[float, float, float]


def tiling(m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Edge of a tile of the result, depth of a product of tiles, and warps, for matrices of m rows."""
    if dtype == torch.bfloat16:
        return (128, 64, 8) if m > 1024 else (64, 64, 4)
    return (64, 16, 8) if m > 128 else (32, 16, 4)


def _operand(dtype: torch.dtype) -> tl.dtype:
    """What factors are multiplied as; sums are kept in float32 or more.

    Triton's interpreter cannot multiply bfloat16; as float32 the products are the same.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def load_tile(x_ptr, rows, columns, m, n, OPERAND: tl.constexpr):
    """Elements of a contiguous m x n matrix; zeros outside."""
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    tile = tl.load(x_ptr + offsets, mask=(rows < m)[:, None] & (columns < n)[None, :], other=0.0)
    return tile if tile.dtype == OPERAND else widened(tile, OPERAND)


@triton.jit
def multiply_add(left, right, total):
    """Total + left right, by IEEE products where they are of float32 or float64."""
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _lower_tile(tile):
    """Row and column of the tiles on and below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root may be off by rounding.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _store_symmetric(total, addend_ptr, out_ptr, scalars, batch, tile, m, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Stores a tile, and its mirror image, of the product, or of a + b addend + c product."""
    i, j = _lower_tile(tile)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    if addend_ptr is not None:
        addend = load_tile(addend_ptr + batch * m * m, rows, columns, m, m, COMPUTE)
        diagonal = tl.where(rows[:, None] == columns[None, :], read_scalar(scalars[0]).to(COMPUTE), 0.0)
        total = read_scalar(scalars[2]).to(COMPUTE) * total + read_scalar(scalars[1]).to(COMPUTE) * addend + diagonal
    out_ptr += batch * m * m
    lower = (columns[None, :] <= rows[:, None]) & (rows < m)[:, None]
    store(out_ptr, rows[:, None].to(tl.int64) * m + columns[None, :], total, lower)
    # Of a tile on the diagonal the upper half is the mirror image, too, so that the result is symmetric to the bit.
    upper = (columns[:, None] < rows[None, :]) & (rows < m)[None, :]
    store(out_ptr, columns[:, None].to(tl.int64) * m + rows[None, :], tl.trans(total), upper)


@triton.jit(do_not_specialize=["scalars"])
def symmetric_kernel(
    x_ptr,
    y_ptr,
    addend_ptr,
    partials_ptr,
    out_ptr,
    scalars,
    m,
    n,
    tiles,
    splits,
    length,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A tile of x y^T, or its partial sum over a split: `length` columns, a multiple of DEPTH."""
    program = tl.program_id(0)
    tile, split, batch = program % tiles, program // tiles % splits, (program // tiles // splits).to(tl.int64)
    i, j = _lower_tile(tile)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    x_ptr += batch * m * n
    y_ptr += batch * m * n
    total = tl.zeros([BLOCK, BLOCK], COMPUTE)
    for begin in range(0, length, DEPTH):
        k = split * length + begin + tl.arange(0, DEPTH)
        left = load_tile(x_ptr, rows, k, m, n, OPERAND)
        right = load_tile(y_ptr, columns, k, m, n, OPERAND)
        total = multiply_add(left, tl.trans(right), total)
    if partials_ptr is not None:
        index = tl.arange(0, BLOCK)
        tl.store(partials_ptr + program.to(tl.int64) * (BLOCK * BLOCK) + index[:, None] * BLOCK + index[None, :], total)
    else:
        _store_symmetric(total, addend_ptr, out_ptr, scalars, batch, tile, m, BLOCK, COMPUTE)


@triton.jit(do_not_specialize=["scalars"])
def sum_splits_kernel(
    addend_ptr,
    partials_ptr,
    out_ptr,
    scalars,
    m,
    tiles,
    splits,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sum of a tile's partial sums, in order."""
    program = tl.program_id(0)
    tile, batch = program % tiles, (program // tiles).to(tl.int64)
    index = tl.arange(0, BLOCK)
    partials_ptr += (batch * splits * tiles + tile) * (BLOCK * BLOCK)
    total = tl.zeros([BLOCK, BLOCK], COMPUTE)
    for _ in range(0, splits):
        total += tl.load(partials_ptr + index[:, None] * BLOCK + index[None, :])
        partials_ptr += tiles * (BLOCK * BLOCK)
    _store_symmetric(total, addend_ptr, out_ptr, scalars, batch, tile, m, BLOCK, COMPUTE)


@triton.jit(do_not_specialize=["scalars"])
def product_kernel(
    p_ptr,
    x_ptr,
    out_ptr,
    scalars,
    m,
    n,
    row_tiles,
    column_tiles,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A tile of p x, or of a x + p x."""
    program = tl.program_id(0)
    # Rows of tiles vary fastest: they read the same columns of x.
    i, j = program % row_tiles, program // row_tiles % column_tiles
    batch = (program // row_tiles // column_tiles).to(tl.int64)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    p_ptr += batch * m * m
    x_ptr += batch * m * n
    total = tl.zeros([BLOCK, BLOCK], COMPUTE)
    for begin in range(0, m, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        left = load_tile(p_ptr, rows, k, m, m, OPERAND)
        total = multiply_add(left, load_tile(x_ptr, k, columns, m, n, OPERAND), total)
    if len(scalars) > 0:
        total += read_scalar(scalars[0]).to(COMPUTE) * load_tile(x_ptr, rows, columns, m, n, COMPUTE)
    offsets = batch * m * n + rows[:, None].to(tl.int64) * n + columns[None, :]
    store(out_ptr, offsets, total, (rows < m)[:, None] & (columns < n)[None, :])


def symmetric_product(x: Tensor, y: Tensor, step: Step | None = None, addend: Tensor | None = None) -> Tensor:
    """The product x y^T where that is known to be symmetric, or a + b addend + c x y^T.

    Args:
        x: A contiguous (batch, m, n).
        y: Likewise.
        step: (a, b, c).
        addend: A symmetric, contiguous (batch, m, m).

    Returns:
        (batch, m, m), symmetric to the bit.
    """
    count, m, n = x.shape
    block, depth, warps = tiling(m, x.dtype)
    tiles = triton.cdiv(m, block) * (triton.cdiv(m, block) + 1) // 2
    splits = max(1, min(_PROGRAMS // tiles, n // _COLUMNS))
    length = triton.cdiv(n, splits * depth) * depth
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_empty(count, m, m)
    partials = x.new_empty(count, splits, tiles, block, block, dtype=compute) if splits > 1 else None
    scalars = tuple(scalar(value) for value in step or ())
    types = {"BLOCK": block, "COMPUTE": tl.float64 if compute == torch.float64 else tl.float32}
    symmetric_kernel[(count * splits * tiles,)](
        x,
        y,
        addend,
        partials,
        out,
        scalars,
        m,
        n,
        tiles,
        splits,
        length,
        DEPTH=depth,
        OPERAND=_operand(x.dtype),
        num_warps=warps,
        **types,
    )
    if partials is not None:
        sum_splits_kernel[(count * tiles,)](addend, partials, out, scalars, m, tiles, splits, num_warps=8, **types)
    return out


def product(p: Tensor, x: Tensor, dtype: torch.dtype, a: float | None = None) -> Tensor:
    """The product p x, or a x + p x.

    Args:
        p: A contiguous (batch, m, m).
        x: A contiguous (batch, m, n).
        dtype: Of the result.
        a: A number that in p would cost digits of its other elements.
    """
    count, m, n = x.shape
    block, depth, warps = tiling(m, x.dtype)
    row_tiles, column_tiles = triton.cdiv(m, block), triton.cdiv(n, block)
    out = torch.empty_like(x, dtype=dtype)
    product_kernel[(count * row_tiles * column_tiles,)](
        p, x, out, () if a is None else (scalar(a),), m, n, row_tiles, column_tiles,
        BLOCK=block, DEPTH=depth, OPERAND=_operand(x.dtype),
        COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=warps,
    )  # fmt: skip
    return out
