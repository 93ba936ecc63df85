"""The op `gram_schmidt`: Gram-Schmidt on the rows of each matrix of a list."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastcurv import _backend
from fastcurv.ops._matrices import NOT_FINITE, Work, in_groups, lone, norm, wide, widened

# On a GPU, up to this many elements a matrix is done by a block of its own.
SMALL = 1 << 18
# On a CPU a thread does a matrix by itself, unless it leaves the cache, or other threads without work.
CACHED, LONE_ROWS = 1 << 22, 128
# Of a row this is left, at the least, where a decomposition that knows no zero rows may be trusted with it.
NEARLY_ZERO = 1e-4
# Rows of a panel of a matrix that is large on a GPU; and what another projection leaves of a row that was rounding.
PANEL, ROUNDING = 32, 0.1


def gram_schmidt(matrices: list[Tensor], outs: list[Tensor], info: Tensor, *, backend: str | None) -> None:
    """Chooses and runs an implementation; see `fastcurv.ops.orthogonalize`.

    Args:
        matrices: Contiguous matrices of one dtype and device, none of them empty.
        outs: Written: their rows, or columns where there are fewer, made orthonormal one after another.
        info: Written: an int32 element for each, how many rows count as zero, or -2.
        backend: A back end by name, or None for the best that can run.
    """
    name, implementation = _backend.choose("gram_schmidt", matrices[0].device, backend)
    small: Work = functools.partial(implementation, floor=0.0)
    large: Work = small
    blocked: list[int] = []
    if name == "cuda":
        small, large = functools.partial(widened, small), functools.partial(_by_panels, implementation)
        blocked = [i for i, m in enumerate(matrices) if m.numel() > SMALL]
    elif name == "cpp":
        large, most = functools.partial(_by_qr, small), lone(matrices)
        blocked = [
            i
            for i, m in enumerate(matrices)
            if m.numel() > CACHED or (i == most and min(m.shape) >= LONE_ROWS and torch.get_num_threads() > 1)
        ]
    rest = [i for i in range(len(matrices)) if i not in set(blocked)]
    in_groups(
        {tuple(indices): work for indices, work in ((rest, small), (blocked, large)) if indices}, matrices, outs, info
    )


def _by_qr(otherwise: Work, matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    """By torch's QR decomposition, the same but for signs, unless a row may count as zero."""
    for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
        x = wide(matrix).mT
        q, r = torch.linalg.qr(x if x.dtype in (torch.float32, torch.float64) else x.float())
        diagonal = r.diagonal()
        # Of a row less its projections, and of the row; not so where there is a NaN.
        if (diagonal.abs() > NEARLY_ZERO * norm(r, dim=0)).all():
            wide(out).copy_(q.mT.mul_(diagonal.sign()[:, None]))
            info[i] = 0
        else:
            otherwise([matrix], [out], info[i : i + 1])


def _by_panels(implementation: Any, matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    """Block Gram-Schmidt: projections on earlier panels are torch's products, the rest is the compiled kernel's.

    Matrices of a shape share products, and all matrices share the kernel's launches: the longest has as many as it has
    panels, times two.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        rows, columns = wide(matrix).shape
        members.setdefault((rows, columns), []).append(i)
    # Those of many panels first: in each round, those that are not done yet are the first ones.
    batches = [members[shape] for shape in sorted(members, reverse=True)]
    scaled = [_scaled(torch.stack([wide(matrices[i]) for i in batch])) for batch in batches]
    longest = max(x.shape[1] for x, _ in scaled)
    found = torch.zeros(-(-longest // PANEL), len(matrices), dtype=torch.int32, device=info.device)
    for k, zero in enumerate(found):
        begin = k * PANEL
        active = [x for x, _ in scaled if x.shape[1] > begin]
        panels = [panel for x in active for panel in x[:, begin : begin + PANEL]]
        for least in (1.0, ROUNDING):
            for x in active if k else ():
                _project(x[:, begin : begin + PANEL], x[:, :begin])
            implementation(panels, panels, zero[: len(panels)], floor=least)
    finite = torch.cat([is_finite for _, is_finite in scaled])
    counts = torch.where(finite, found.sum(dim=0), NOT_FINITE).to(torch.int32)
    order = [i for batch in batches for i in batch]
    for i, q, count in zip(order, (q for x, _ in scaled for q in x), counts, strict=True):
        wide(outs[i]).copy_(q)
        info[i] = count


def _project(panels: Tensor, before: Tensor) -> None:
    """Takes from panels (b, p, n) their projections on earlier rows."""
    # TF32, where torch may use it, holds three digits: no projection.
    exact = torch.float64 if torch.backends.cuda.matmul.fp32_precision == "tf32" else panels.dtype
    p, q = panels.to(exact), before.to(exact)
    panels.copy_(torch.baddbmm(p, p @ q.mT, q, alpha=-1))


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (b, m, n) with rows so long that what is left of one counts from length 1 on; and which are finite."""
    exact = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    zero = math.sqrt(max(matrices.shape[2], 64)) * (2.0**-53 if exact == torch.float64 else 2.0**-24)
    x = matrices.double()
    peaks = x.abs().amax(dim=2, keepdim=True)
    finite = peaks.isfinite().all(dim=1, keepdim=True)
    x = x / peaks  # first: no square overflows or vanishes
    x = torch.where(finite & (peaks > 0), x / (zero * torch.linalg.vector_norm(x, dim=2, keepdim=True)), 0.0)
    return x.to(exact), finite.flatten()
