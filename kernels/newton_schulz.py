"""Newton-Schulz steps towards polar factors in Triton, on the matrices of each shape together.

For m rows and n >= m columns a step is A = X X^T, P = b A + c A^2, X <- a X + P X: 3 m^2 n + m^3 flops, since only one
half of what is symmetric is formed. Few rows make few tiles: long products are split. No step waits for the host.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._batches import in_batches
from ._common import load, read_scalar, scalar, store
from ._products import Step, product, symmetric_product

# Elements of a program of elementwise kernels.
_CHUNK = 4096
# By how much singular values may grow before the Gram matrix is formed anew: its rounding errors grow by the square.
_GROWTH = 1024.0


@triton.jit
def squares_kernel(x_ptr, sums_ptr, numel, chunks, CHUNK: tl.constexpr):
    """The sum of the squares of a chunk."""
    program = tl.program_id(0)
    offsets = program % chunks * CHUNK + tl.arange(0, CHUNK)
    x = load(x_ptr + (program // chunks).to(tl.int64) * numel, offsets, offsets < numel, tl.float64).to(tl.float64)
    tl.store(sums_ptr + program, tl.sum(tl.where(offsets < numel, x * x, 0.0), axis=0))


@triton.jit
def _sum_of_squares(sums_ptr, batch, chunks):
    """That of a matrix, from those of its chunks in a fixed order."""
    lanes = tl.zeros([256], tl.float64)
    for begin in range(0, chunks, 256):
        chunk = begin + tl.arange(0, 256)
        lanes += tl.load(sums_ptr + batch * chunks + chunk, mask=chunk < chunks, other=0.0)
    return tl.sum(lanes, axis=0)


@triton.jit(do_not_specialize=["scalars"])
def divide_kernel(
    x_ptr, sums_ptr, out_ptr, scalars, numel, chunks, sum_chunks, ROOTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Divides a chunk by the repeated square root of a sum of squares, or of a least one; if not positive, to zeros."""
    program = tl.program_id(0)
    batch = (program // chunks).to(tl.int64)
    divisor, least = _sum_of_squares(sums_ptr, batch, sum_chunks), read_scalar(scalars[0])
    divisor = tl.where(divisor < least, least, divisor)
    divides = (divisor > 0.0) & (divisor < float("inf"))
    divisor = tl.where(divides, divisor, 1.0)
    for _ in tl.static_range(ROOTS):
        divisor = tl.sqrt(divisor)
    offsets = program % chunks * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < numel
    quotient = load(x_ptr + batch * numel, offsets, mask, tl.float64).to(tl.float64) * (1.0 / divisor)
    quotient = tl.where(divides, quotient, 0.0)
    WIDE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    store(out_ptr + batch * numel, offsets, quotient.to(WIDE), mask)


@triton.jit
def info_kernel(sums_ptr, result_sums_ptr, info_ptr, chunks, rows):
    """0, or how many singular values of a result are zero, where all others are one; -2 where there is a NaN."""
    batch = tl.program_id(0)
    info = tl.full([], 0, tl.int32)
    if result_sums_ptr is not None:
        info = rows - tl.floor(_sum_of_squares(result_sums_ptr, batch, chunks) + 0.5).to(tl.int32)
    finite = _sum_of_squares(sums_ptr, batch, chunks) < float("inf")
    tl.store(info_ptr + batch, tl.where(finite, info, -2))


def _squares(x: Tensor) -> Tensor:
    """(batch, chunks) float64 sums of squares."""
    chunks = triton.cdiv(x[0].numel(), _CHUNK)
    sums = x.new_empty(len(x), chunks, dtype=torch.float64)
    squares_kernel[(sums.numel(),)](x, sums, x[0].numel(), chunks, CHUNK=_CHUNK)
    return sums


def _divided(x: Tensor, sums: Tensor, roots: int, dtype: torch.dtype, least: float = 0.0) -> Tensor:
    """Matrices divided by square roots of square roots of sums of squares."""
    out = torch.empty_like(x, dtype=dtype)
    chunks = triton.cdiv(x[0].numel(), _CHUNK)
    divide_kernel[(len(x) * chunks,)](
        x, sums, out, (scalar(least),), x[0].numel(), chunks, sums.shape[1], ROOTS=roots, CHUNK=_CHUNK
    )
    return out


def _info(sums: Tensor, results: Tensor | None, rows: int) -> Tensor:
    info = sums.new_empty(len(sums), dtype=torch.int32)
    info_kernel[(len(sums),)](sums, None if results is None else _squares(results), info, sums.shape[1], rows)
    return info


def _steps(batch: Tensor, coefficients: list[Step], dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """The steps on a batch."""
    sums = _squares(batch)
    x = _divided(batch, sums, 1, torch.float64 if batch.dtype == torch.float64 else dtype, eps * eps)
    for a, b, c in coefficients:
        gram = symmetric_product(x, x)
        x = product(symmetric_product(gram, gram, (0.0, b, c), gram), x, x.dtype, a)
    return x, _info(sums, None, x.shape[1])


def _spectral_steps(batch: Tensor, coefficients: list[Step], spectral: int) -> tuple[Tensor, Tensor]:
    """The steps on Gram matrices in float64: R = X X^T, P = a + b R + c R^2, R <- P R P.

    The product of all P goes over a matrix once, and in between where small singular values have grown much.
    """
    sums = _squares(batch)
    x = _divided(batch, sums, 1, torch.float64)
    r = symmetric_product(x, x)
    # The trace of the 64th power, which is the sum of squares of the 32nd, bounds the largest eigenvalue from above:
    # the root is too large by a factor of m^(1/64) at the most. It does not underflow: eigenvalues add up to one.
    power = r
    for _ in range(5):
        power = symmetric_product(power, power)
    bounds = _squares(power)
    r, x = _divided(r, bounds, 6, torch.float64), _divided(x, bounds, 7, torch.float64)
    sides = x.shape[2] / spectral
    r, x = r / sides, x / math.sqrt(sides)
    result = torch.float64 if batch.dtype == torch.float64 else torch.float32
    whole, growth = None, 1.0
    for k, step in enumerate(coefficients):
        p = symmetric_product(r, r, step, r)
        whole = p if whole is None else product(p, whole, torch.float64)
        growth *= step[0]
        if k + 1 == len(coefficients):
            x = product(whole, x, result)
        elif growth > _GROWTH:
            x, whole, growth = product(whole, x, torch.float64), None, 1.0
            r = symmetric_product(x, x)
        else:
            r = symmetric_product(symmetric_product(p, r), p)
    return x, _info(sums, x, x.shape[1])


def newton_schulz(
    matrices: list[Tensor],
    outs: list[Tensor],
    info: Tensor,
    *,
    coefficients: list[tuple[float, float, float]],
    dtype: torch.dtype,
    spectral: int,
    eps: float,
) -> None:
    """About four launches for each step and shape; see `fastcurv.ops.orthogonalize` for the arguments."""
    steps = (
        partial(_spectral_steps, coefficients=coefficients, spectral=spectral)
        if spectral
        else partial(_steps, coefficients=coefficients, dtype=dtype, eps=eps)
    )
    in_batches(matrices, outs, info, steps)
