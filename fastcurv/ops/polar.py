"""The op `polar`: the polar factor of each matrix of a list."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastcurv import _backend
from fastcurv.ops._matrices import NOT_FINITE, Work, each, in_groups, symmetric_product, wide
from fastcurv.ops.newton_schulz import newton_schulz

# Up to this many rows (or columns, if fewer) a matrix is done by a thread of its own, in its cache.
SMALL = 128
# Columns that are widened to float64 at a time.
PANEL = 2048
# As far as a product of two rows may be off.
ORTHONORMAL = 1e-7
# Lower bound of a step's interval, relative to its upper bound. A smaller one would let the best polynomial map large
# singular values to tiny ones, whose digits a Gram matrix loses; with this one none falls below a third.
CUSHION = 0.05


def polar(matrices: list[Tensor], outs: list[Tensor], info: Tensor, *, backend: str | None) -> None:
    """Chooses and runs an implementation; see `fastcurv.ops.orthogonalize`.

    Args:
        matrices: Contiguous matrices of one dtype and device, none of them empty.
        outs: Written: their polar factors.
        info: Written: an int32 element for each, how many singular values count as zero, or -2.
        backend: A back end by name, or None for the best that can run.
    """
    name, implementation = _backend.choose("polar", matrices[0].device, backend)
    if name == "reference":
        implementation(matrices, outs, info)
        return
    groups: dict[tuple[int, ...], Work] = {}
    if matrices[0].dtype == torch.float64:
        groups[tuple(range(len(matrices)))] = functools.partial(each, _by_svd)
    elif name == "cpp":
        small = [i for i, matrix in enumerate(matrices) if min(matrix.shape) <= SMALL]
        large = [i for i, matrix in enumerate(matrices) if min(matrix.shape) > SMALL]
        groups = {tuple(small): implementation, tuple(large): functools.partial(each, _by_gram)}
    else:  # on a GPU by steps that are the same for all, so that those which fit a kernel take one launch
        shortest = min(max(matrix.shape) for matrix in matrices)
        groups[tuple(range(len(matrices)))] = functools.partial(
            newton_schulz, coefficients=schedule(shortest), dtype=torch.float32, spectral=shortest, backend=name
        )
    in_groups({indices: work for indices, work in groups.items() if indices}, matrices, outs, info)


def _by_svd(matrix: Tensor, out: Tensor) -> int:
    """For float64, whose Gram matrix would need more digits than there are; a GPU makes the host wait."""
    _, reference = _backend.choose("polar", matrix.device, "reference")
    info = torch.empty(1, dtype=torch.int32, device=matrix.device)
    reference([matrix], [out], info)
    return int(info.item())


def _by_gram(matrix: Tensor, out: Tensor) -> int:
    """The algorithm of csrc/cpu/polar.cpp in torch's products and decomposition, which large matrices are worth."""
    x, result = wide(matrix), wide(out)
    panels = [slice(begin, begin + PANEL) for begin in range(0, x.shape[1], PANEL)]
    gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for panel in panels:
        part = x[None, :, panel].double()
        gram = symmetric_product(part, part, gram[None])[0]
    trace = gram.diagonal().sum().item()
    if not math.isfinite(trace) or trace == 0.0:
        out.zero_()
        return NOT_FINITE if trace else len(x)
    values, vectors = torch.linalg.eigh(gram)
    first = int((values <= x.shape[1] * 2.0**-48 * values[-1]).sum())
    kept, basis = values[first:], vectors[:, first:]
    scaled = (basis * kept.pow(-0.25))[None]
    factor = symmetric_product(scaled, scaled)[0]
    # Rounding of the Gram matrix leaves rows i and j of lambda^-1/2 V^T G this far from orthonormal:
    lost = torch.finfo(torch.float64).eps * values[-1] / (kept * kept[0]).sqrt()
    few = basis[:, : int((lost > ORTHONORMAL).sum())]
    if few.shape[1]:
        rows = (few * kept[: few.shape[1]].rsqrt()).mT
        products = torch.cat([rows @ x[:, panel].double() for panel in panels], dim=1)
        factor += few @ (_mending(products, lost[0].item()) @ rows)
    # Dead rows stay exactly zero.
    factor[gram.diagonal() == 0] = 0
    for panel in panels:
        part = x[:, panel].double()
        result[:, panel] = torch.mm(factor, part, out=torch.empty_like(part))  # in its layout: nothing is transposed
    return first


def _mending(rows: Tensor, loss: float) -> Tensor:
    """What to add to the identity for a factor that makes rows orthonormal which nearly are."""
    unit = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    mending = unit
    while loss > ORTHONORMAL:
        step = 1.5 * unit - 0.5 * (rows @ rows.mT)
        mending, rows, loss = step @ mending, step @ rows, loss**2
    return mending - unit


@functools.cache
def schedule(length: int, filters: int = 14) -> list[tuple[float, float, float]]:
    """Newton-Schulz coefficients that make one of each singular value that counts, and zero of the others.

    First the best polynomials (Amsel et al., 2025, Algorithm 1, with a cushion as they advise) until the smallest that
    counts has grown to a little more than sqrt(2/3), which x^3 (5 - 3 x^2) / 2 neither raises nor lowers; then that
    polynomial, which drives what is above to one and what is below to zero.

    Args:
        length: max(m, n).
        filters: How often the last polynomial is applied: 14 tell apart what is off the threshold by a hundredth.

    Returns:
        (a, b, c) of each step, for matrices divided by their largest singular value.
    """
    threshold = math.sqrt(length) * 2.0**-24
    # The best polynomials are at their least all over their interval: it must not begin at the threshold.
    lower, upper, image = 1.25 * threshold, 1.0, threshold
    steps: list[tuple[float, float, float]] = []
    while not steps or upper / image > 1.12 / math.sqrt(2 / 3):
        begin = max(lower, CUSHION * upper)
        a, b, c = _best_quintic(begin, upper)
        lower, begin, image = (a * x + b * x**3 + c * x**5 for x in (lower, begin, image))
        upper = 2.0 - begin
        steps.append((a, b, c))
    scale = math.sqrt(2 / 3) / image
    a, b, c = steps.pop()
    return [*steps, (a * scale, b * scale, c * scale), *[(0.0, 2.5, -1.5)] * filters]


def _best_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """The a x + b x^3 + c x^5 that is closest to one on an interval, by Remez's algorithm."""
    if lower > (1 - 5e-6) * upper:
        return 1.875 / upper, -1.25 / upper**3, 0.375 / upper**5
    q, r, error = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, math.inf
    for _ in range(100):
        rows = [[x, x**3, x**5, sign] for x, sign in ((lower, 1), (q, -1), (r, 1), (upper, -1))]
        system = torch.tensor(rows, dtype=torch.float64, device="cpu")
        a, b, c, found = torch.linalg.solve(system, torch.ones_like(system[0])).tolist()
        if abs(error - found) < 1e-15:
            break
        error = found
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c
