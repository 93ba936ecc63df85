"""Newton-Schulz steps towards the polar factor of a matrix (Jordan et al., 2024; Amsel et al., 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcurv.reference._common import unit


@torch.no_grad()
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
    r"""Newton-Schulz steps on every matrix; see `fastcurv.ops.orthogonalize`.

    .. math:: X_0 = G / \max(\|G\|_F, eps), \quad X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k, \quad A = X_k X_k^T

    in a working dtype (float64 for float64 matrices). Each step maps the singular values by
    :math:`a_k s + b_k s^3 + c_k s^5`. `info` receives 0, or -2 for a matrix that is not finite, whose result is zero.
    With `spectral`, a length l, :math:`X_0 = \sqrt{l / \max(m, n)}\, G / \sigma_1`, and `info` counts singular
    values that became zero, all others being taken for one.
    """
    for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
        g = matrix.double()
        scale = unit(g)
        g = g * scale
        norm = torch.linalg.vector_norm(g)
        info[i] = 0 if norm.isfinite() else -2
        if norm == 0 or not norm.isfinite():
            out.zero_()
            info[i] = min(matrix.shape) if spectral and norm == 0 else info[i]
            continue
        if spectral:
            norm = torch.linalg.matrix_norm(g, ord=2) * math.sqrt(max(matrix.shape) / spectral)
        else:
            norm = torch.maximum(norm, eps * scale)
        x = (g / norm).to(torch.float64 if matrix.dtype == torch.float64 else dtype)
        x = x if x.shape[0] <= x.shape[1] else x.mT
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        out.copy_(x if matrix.shape[0] <= matrix.shape[1] else x.mT)
        if spectral:
            info[i] = len(x) - x.double().square().sum().round().int()
