"""Damped inverses of Kronecker factors by Cholesky's decomposition (Martens, 2016, sections 6.4.2 and 6.6.3)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kron_inverse(
    factors: list[Tensor], inverses: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor
) -> None:
    r"""The inverse of every damped factor, or what takes its place; see `fastcurv.ops.kron_inverse`.

    .. math:: X = (M + \lambda I)^{-1} = L^{-T} L^{-1}, \quad L L^T = M + \lambda I.

    Where there is no such :math:`L`, or where :math:`X` is not finite, :math:`\lambda` grows by :math:`10^{-6}` times
    the mean of the diagonal of :math:`M`, then by ten and a hundred times that. Where `info` is 0, nothing is done.
    Elsewhere it receives the number of these tries; -1 where all failed, or -2 where :math:`M + \lambda I` is not
    finite: X is then the previous inverse, or zero if there is none.
    """
    for i, (factor, inverse) in enumerate(zip(factors, inverses, strict=True)):
        if info[i] == 0:
            continue
        info[i] = _invert(factor, inverse, damping[i].item())
        if info[i] < 0:
            inverse.copy_(previous[i] if previous else torch.zeros_like(factor))


def _invert(factor: Tensor, out: Tensor, damping: float) -> int:
    mean = factor.diagonal().double().mean().item()
    for tries in range(4):
        jitter = 10.0 ** (tries - 7) * mean if tries else 0.0
        damped = factor.clone()
        damped.diagonal().add_(damping + jitter)
        if not damped.isfinite().all():
            return -2
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower).tril()
            out.copy_(inverse + inverse.tril(-1).mT)
            if out.isfinite().all():
                return tries
    return -1
