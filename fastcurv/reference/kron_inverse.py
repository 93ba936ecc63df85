"""Damped inverses of Kronecker factors by Cholesky's decomposition (Martens, 2016, sections 6.4.2 and 6.6.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import solve_damped


@torch.no_grad()
def kron_inverse(
    factors: list[Tensor], inverses: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor
) -> None:
    r"""The inverse of every damped factor, or what takes its place; see `fastcurv.ops.kron_inverse`.

    .. math:: X = (M + \lambda I)^{-1} = L^{-T} L^{-1}, \quad L L^T = M + \lambda I.
    """
    solve_damped(_inverse, factors, inverses, previous, info, damping)


def _inverse(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower).tril()
    return inverse + inverse.tril(-1).mT
