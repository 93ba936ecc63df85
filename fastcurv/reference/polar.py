"""The polar factor of a matrix: the nearest one with orthonormal rows or columns (Tuddenham, 2026, section 5.3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastcurv.reference._common import unit


@torch.no_grad()
def polar(matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    r"""The polar factor of every matrix; see `fastcurv.ops.orthogonalize`.

    With the thin singular value decomposition :math:`G = U \Sigma V^T`

    .. math:: O = U_r V_r^T,

    where r counts the singular values that do not count as zero: those above
    :math:`\sqrt{\max(m, n)}\, 2^{-24} \sigma_1` (:math:`2^{-53}` for float64). Computed in float64, rounded once.
    `info` receives the number of singular values that count as zero, or -2 for a matrix that is not finite, whose
    result is zero.
    """
    for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
        g = matrix.double()
        if not g.isfinite().all():
            out.zero_()
            info[i] = -2
            continue
        g = g * unit(g)  # or its singular values may be beyond float64
        # Dead rows and columns are left out: the vectors of tiny singular values would reach into them.
        rows, columns = ((g != 0).any(dim=dim) for dim in (1, 0))
        u, sigma, vh = _svd(g[rows][:, columns])
        rounding = 2.0**-53 if matrix.dtype == torch.float64 else 2.0**-24
        kept = sigma > math.sqrt(max(g.shape)) * rounding * sigma[:1]
        out.zero_()
        out[rows[:, None] & columns] = (u[:, kept] @ vh[kept]).to(out.dtype).flatten()
        info[i] = min(g.shape) - kept.sum()


def _svd(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition, of what has more columns than rows.

    Of other singular matrices the vectors that LAPACK's divide and conquer gives in float64, on one thread, may be as
    far from orthonormal as 1e-6 (torch 2.11 and 2.13 with MKL).
    """
    m, n = g.shape
    if m < n:
        # torch.linalg has no types.
        return torch.linalg.svd(g, full_matrices=False)
    v, sigma, uh = torch.linalg.svd(pad(g.mT, (0, int(m == n))), full_matrices=False)
    return uh[:, :m].mT, sigma, v.mT
