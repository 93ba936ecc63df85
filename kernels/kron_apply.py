"""Gradients times inverses of Kronecker products in Triton, layers of equal shapes together.

Division and partial sums happen where a tile of a product is stored; partial sums are added in order. Nothing waits for
the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import divide, read_scalar, scalar, store
from ._products import load_tile, multiply_add, tiling

# Elements that a program sets to zero at a time, and partial sums that it adds.
_CHUNK = 1024


@triton.jit
def _load_either(x_ptr, rows, columns, m, n, TRANSPOSED: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile of an m x n matrix, whose memory holds it or its transpose."""
    if TRANSPOSED:
        tile = tl.trans(load_tile(x_ptr, columns, rows, n, m, COMPUTE))
    else:
        tile = load_tile(x_ptr, rows, columns, m, n, COMPUTE)
    return tile


@triton.jit(do_not_specialize=["scalars"])
def multiply_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    other_ptr,
    row_values_ptr,
    column_values_ptr,
    partials_ptr,
    scalars,
    m,
    n,
    depth,
    row_tiles,
    column_tiles,
    X_TRANSPOSED: tl.constexpr,
    Y_TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A tile of a scaled x y, divided by 1 + r c^T where there are such values, and its sums where they are wanted."""
    program = tl.program_id(0)
    i, j = program % row_tiles, program // row_tiles % column_tiles
    batch = (program // row_tiles // column_tiles).to(tl.int64)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    x_ptr += batch * m * depth
    y_ptr += batch * depth * n
    total = tl.zeros([BLOCK, BLOCK], COMPUTE)
    for begin in range(0, depth, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        left = _load_either(x_ptr, rows, k, m, depth, X_TRANSPOSED, COMPUTE)
        right = _load_either(y_ptr, k, columns, depth, n, Y_TRANSPOSED, COMPUTE)
        total = multiply_add(left, right, total)
    total = total * read_scalar(scalars[0]).to(COMPUTE)
    if row_values_ptr is not None:
        row_values = tl.load(row_values_ptr + batch * m + rows, mask=rows < m, other=0.0)
        column_values = tl.load(column_values_ptr + batch * n + columns, mask=columns < n, other=0.0)
        divisor = 1.0 + row_values[:, None] * column_values[None, :]
        # An infinite value would make what it divides zero: NaN instead, which will be noticed.
        total = tl.where(divisor - divisor == 0.0, divide(total, divisor), float("nan"))
    if out_ptr is not None:
        store(out_ptr + batch * m * n, rows[:, None].to(tl.int64) * n + columns[None, :], total, mask)
    if partials_ptr is not None:
        wide = tl.where(mask, total, 0.0).to(tl.float64)
        partials_ptr += program.to(tl.int64) * 2
        if other_ptr is not None:
            other = load_tile(other_ptr + batch * m * n, rows, columns, m, n, COMPUTE).to(tl.float64)
            tl.store(partials_ptr, tl.sum(tl.sum(wide * other, axis=1), axis=0))
        else:
            tl.store(partials_ptr, 0.0)
        if out_ptr is not None:
            tl.store(partials_ptr + 1, tl.sum(tl.sum(wide * wide, axis=1), axis=0))
        else:
            tl.store(partials_ptr + 1, 0.0)


@triton.jit
def _add(partials_ptr, batch, tiles, which, lanes, CHUNK: tl.constexpr):
    """Lanes plus the partial sums of a layer, in a fixed order."""
    for begin in range(0, tiles, CHUNK):
        tile = begin + tl.arange(0, CHUNK)
        lanes += tl.load(partials_ptr + (batch * tiles + tile) * 2 + which, mask=tile < tiles, other=0.0)
    return lanes


@triton.jit
def sum_kernel(
    partials_ptr, more_ptr, update_ptr, products_ptr, info_ptr, tiles, more_tiles, numel, CHUNK: tl.constexpr
):
    """The sums of a layer; zeros, for the update too, where one of them is not finite."""
    batch = tl.program_id(0).to(tl.int64)
    dots = _add(partials_ptr, batch, tiles, 0, tl.zeros([CHUNK], tl.float64), CHUNK)
    squares = _add(partials_ptr, batch, tiles, 1, tl.zeros([CHUNK], tl.float64), CHUNK)
    if more_ptr is not None:
        dots = _add(more_ptr, batch, more_tiles, 0, dots, CHUNK)
    dot, square = tl.sum(dots, axis=0), tl.sum(squares, axis=0)
    finite = (dot - dot == 0.0) & (square - square == 0.0)
    tl.store(products_ptr + 2 * batch, tl.where(finite, dot, 0.0))
    tl.store(products_ptr + 2 * batch + 1, tl.where(finite, square, 0.0))
    tl.store(info_ptr + batch, tl.where(finite, 0, -2))
    for begin in range(0, tl.where(finite, 0, numel), CHUNK):
        offsets = begin + tl.arange(0, CHUNK)
        zeros = tl.zeros([CHUNK], update_ptr.dtype.element_ty)
        tl.store(update_ptr + batch * numel + offsets, zeros, mask=offsets < numel)


def _multiply(
    x: Tensor,
    y: Tensor,
    *,
    x_transposed: bool = False,
    y_transposed: bool = False,
    scale: float = 1.0,
    values: tuple[Tensor, Tensor] | None = None,
    other: Tensor | None = None,
    has_sums: bool = False,
    is_kept: bool = True,
) -> tuple[Tensor, Tensor]:
    """The products of two batches of matrices, or of their transposes, and partial sums; what is unwanted is empty."""
    m, depth = x.mT.shape[1:] if x_transposed else x.shape[1:]
    n = y.shape[1] if y_transposed else y.shape[2]
    block, deep, warps = tiling(max(m, n), x.dtype)
    row_tiles, column_tiles = triton.cdiv(m, block), triton.cdiv(n, block)
    out = x.new_empty(len(x), m if is_kept else 0, n)
    partials = x.new_empty(len(x), row_tiles * column_tiles if has_sums else 0, 2, dtype=torch.float64)
    multiply_kernel[(len(x) * row_tiles * column_tiles,)](
        x, y, out if is_kept else None, other, *(values or (None, None)), partials if has_sums else None,
        (scalar(scale),), m, n, depth, row_tiles, column_tiles, X_TRANSPOSED=x_transposed, Y_TRANSPOSED=y_transposed,
        BLOCK=block, DEPTH=deep, COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=warps,
    )  # fmt: skip
    return out, partials


def _apply(
    grad: Tensor, left: Tensor, right: Tensor, inputs: Tensor | None, values: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates, products and info of layers of equal shapes."""
    more = None
    if inputs is not None:
        scale = 1.0 / grad.shape[1]
        left_factor, _ = _multiply(grad, left, y_transposed=True)  # (L g^T)^T
        right_factor, _ = _multiply(inputs, right)
        update, partials = _multiply(left_factor, right_factor, x_transposed=True, scale=scale, has_sums=True)
        gram, _ = _multiply(grad, left_factor, y_transposed=True, scale=scale)
        _, more = _multiply(
            inputs, right_factor, y_transposed=True, scale=scale, other=gram, has_sums=True, is_kept=False
        )
    elif values is not None:
        half, _ = _multiply(left, grad, x_transposed=True)
        quotient, _ = _multiply(half, right, values=values)
        half, _ = _multiply(left, quotient)
        update, partials = _multiply(half, right, y_transposed=True, other=grad, has_sums=True)
    else:
        half, _ = _multiply(left, grad)
        update, partials = _multiply(half, right, other=grad, has_sums=True)
    products = grad.new_empty(len(grad), 2, dtype=torch.float64)
    info = grad.new_empty(len(grad), dtype=torch.int32)
    sum_kernel[(len(grad),)](
        partials, more, update, products, info, partials.shape[1], 0 if more is None else more.shape[1],
        update[0].numel(), CHUNK=_CHUNK,
    )  # fmt: skip
    return update, products, info


def kron_apply(
    grads: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    inputs: list[Tensor],
    left_values: list[Tensor],
    right_values: list[Tensor],
    updates: list[Tensor],
    products: Tensor,
    info: Tensor,
    workspace: Tensor,
) -> None:
    """The update of every layer and its inner products; see `fastcurv.ops.kron_apply`. `workspace` is not needed."""
    batches: dict[tuple[int, ...], list[int]] = {}
    found_products, found_info = list(products.unbind()), list(info.unbind())
    for i, update in enumerate(updates):
        if update.numel():
            batches.setdefault((*update.shape, len(grads[i])), []).append(i)
        else:
            found_products[i], found_info[i] = torch.zeros_like(products[i]), torch.zeros_like(info[i])
    for members in batches.values():
        tensors = [
            torch.stack([of_all[i] for i in members]) if of_all else None
            for of_all in (grads, lefts, rights, inputs, left_values, right_values)
        ]
        grad, left, right, samples, s2, s1 = tensors
        assert grad is not None and left is not None and right is not None
        results = _apply(grad, left, right, samples, None if s2 is None or s1 is None else (s2, s1))
        torch._foreach_copy_([updates[i] for i in members], results[0].unbind())
        for i, of_products, of_info in zip(members, results[1].unbind(), results[2].unbind(), strict=True):
            found_products[i], found_info[i] = of_products, of_info
    # One launch each, and no index that would have to travel to the device.
    torch.stack(found_products, out=products)
    torch.stack(found_info, out=info)
