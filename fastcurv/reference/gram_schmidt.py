"""Gram-Schmidt on the rows of a matrix, each projection done twice (Giraud et al., 2005: "twice is enough")."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def gram_schmidt(matrices: list[Tensor], outs: list[Tensor], info: Tensor, *, floor: float) -> None:
    r"""Gram-Schmidt on the rows, or columns where there are fewer, of every matrix; see `fastcurv.ops.orthogonalize`.

    .. math:: r_i = g_i - \sum_{j < i} \langle g_i, q_j \rangle q_j, \quad q_i = r_i / \|r_i\|,

    the projection done twice. A row counts as zero, and its :math:`q_i` is zero, where :math:`\|r_i\|` is not above
    :math:`\sqrt{\max(m, n, 64)}\, 2^{-24} \|g_i\|` (:math:`2^{-53}` for float64) and above `floor`, or where the second
    projection leaves less than a tenth, so that it was rounding of the first.
    `info` receives the number of such rows, or -2 for a matrix that is not finite, whose result is zero.
    """
    for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
        exact = matrix.dtype == torch.float64
        g = matrix.to(torch.float64 if exact else torch.float32)
        if not g.isfinite().all():
            out.zero_()
            info[i] = -2
            continue
        g = g if g.shape[0] <= g.shape[1] else g.mT
        zero = math.sqrt(max(g.shape[1], 64)) * (2.0**-53 if exact else 2.0**-24)
        q = torch.zeros_like(g, memory_format=torch.contiguous_format)
        for k, row in enumerate(g):
            # Scaled first, so that no square overflows or vanishes.
            largest = row.abs().max()
            r = row / largest if largest > 0 else row
            norm = torch.linalg.vector_norm(r, dtype=torch.float64)
            r = r / norm.to(g.dtype) if norm > 0 else r
            for repeated in (False, True):
                r = r - (q[:k] @ r) @ q[:k]
                length = torch.linalg.vector_norm(r)
                counts = length > 0.1 if repeated else length > zero and length * norm * largest > floor
                if not counts:
                    r = torch.zeros_like(r)
                    break
                r = r / length
            q[k] = r
        out.copy_(q if matrix.shape[0] <= matrix.shape[1] else q.mT)
        info[i] = (q == 0).all(dim=1).sum()
