"""Inverse roots of Kronecker factors by coupled Newton iteration (Guo and Higham, 2006; Anil et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import solve_damped, times, unit

MOST_STEPS = 80


@torch.no_grad()
def kron_root(
    factors: list[Tensor], roots: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor, p: int
) -> None:
    r"""The inverse p-th root of every damped factor, or what takes its place; see `fastcurv.ops.kron_root`.

    .. math:: X_0 = z^{1/p} I, \quad M_0 = z (M + \lambda I), \quad
        z = \frac{\min(p + 1, 5)}{2 \|M + \lambda I\|_\infty},

    .. math:: T = \frac{(p + 1) I - M_k}{p}, \quad X_{k+1} = X_k T, \quad M_{k+1} = T^p M_k,

    until :math:`M_k` is the identity; damping, jitter, `previous` and `info` are those of `kron_inverse`.
    """
    solve_damped(lambda damped: _root(damped, p), factors, roots, previous, info, damping)


def _root(matrix: Tensor, p: int) -> Tensor | None:
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    scale = unit(matrix, part=0.75)  # or a row sum may overflow, and a small X lose digits
    matrix = matrix * scale
    norm = matrix.abs().sum(dim=1).max().item() if len(matrix) else 1.0
    if norm == 0.0:
        return None
    z = min(p + 1, 5) / (2 * norm)
    x, m = z ** (1 / p) * one, z * matrix
    small = torch.finfo(matrix.dtype).eps ** 0.5 / 2
    for _ in range(MOST_STEPS):
        error = (m - one).abs().max().item() if len(matrix) else 0.0
        if not error <= p + 1:  # it grows only if an eigenvalue is below zero
            return None
        t = ((p + 1) * one - m) / p
        x = _symmetric(x @ t)
        if error < small:  # what is left is about its square
            return times(scale.item() ** (1 / p), x)
        m = _symmetric(torch.linalg.matrix_power(t, p) @ m)
    return None


def _symmetric(product: Tensor) -> Tensor:
    """A product of matrices that commute, but for rounding."""
    return product.tril() + product.tril(-1).mT
