"""Inverses of sums and differences of two Kronecker products, as `kron_apply` takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcurv import _check
from fastcurv.ops import _kron

# How far below one the eigenvalues of a difference are kept, so that no divisor is zero.
_BELOW_ONE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Stein(NamedTuple):
    """(A kron B + sign C kron D)^-1 in factors: U = left [(left^T V right) / (1 + left_values right_values^T)] right^T.

    Attributes:
        left: K_2, (d, d).
        right: K_1, (a, a).
        left_values: sign s_2, (d,).
        right_values: s_1, (a,).
    """

    left: Tensor
    right: Tensor
    left_values: Tensor
    right_values: Tensor


@torch.no_grad()
def stein(a: Tensor | float, b: Tensor | float, c: Tensor, d: Tensor, sign: int = 1) -> Stein:
    """Factors the inverse of A kron B + C kron D, or of A kron B - C kron D.

    The inverse takes V to the U that solves the generalised Stein equation B U A + sign D U C = V. It is had by two
    Cholesky decompositions and two of eigenvalues, once; `kron_apply` then takes four products and a division for each
    V, and many layers together. With numbers for A and B it is exact Tikhonov damping, by eigenvalues alone.

    Args:
        a: Symmetric positive definite, (n, n), or a number above zero that stands for so many times the identity: a
            float, or a tensor of one element, which is read where it is.
        b: The same, (m, m).
        c: Symmetric positive semi-definite, (n, n), float32 or float64. Made symmetric, for rounded products are not.
        d: The same, (m, m), of the dtype and device of `c`.
        sign: 1, or -1: then the eigenvalues of A^-1 C and of B^-1 D are taken to be below one, as they are in a
            block-tridiagonal inverse, and are kept 1e-6 below it (float64: 1e-12).

    Returns:
        The factors. Where A or B is not positive definite, or anything is not finite, they are NaN: `kron_apply` gives
        that layer a zero update and says so.

    Raises:
        TypeError, ValueError: Naming the argument, what was expected and what was found.

    Source: Martens (2016), appendix B.2; spec kfac 5, whose Cholesky form needs no square roots of matrices.

    Cost: About 10 (n^3 + m^3) flops.

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_apply, stein
        >>> factors = stein(1.0, 2.0, 2 * torch.eye(2), 3 * torch.eye(2))  # of 8 times the identity
        >>> (update,), _, _ = kron_apply([torch.tensor([[8.0, 16.0], [24.0, 32.0]])], [factors])
        >>> update.round(decimals=4)
        tensor([[1., 2.],
                [3., 4.]])
    """
    if isinstance(sign, Tensor) or sign not in (1, -1):
        raise ValueError(f"sign: expected 1 or -1, got {sign!r}")
    (c,) = _kron.factors([c], "c")
    (d,) = _kron.factors([d], "d")
    if d.dtype != c.dtype or d.device != c.device:
        raise ValueError(f"d: expected {c.dtype} on {c.device} like c, got {d.dtype} on {d.device}")
    right, right_values = _generalised(a, c, "a", "c")
    left, left_values = _generalised(b, d, "b", "d")
    if sign < 0:
        most = 1 - _BELOW_ONE[c.dtype]
        right_values, left_values = right_values.clamp(max=most), -left_values.clamp(max=most)
    return Stein(left, right, left_values, right_values)


def _generalised(whole: Tensor | float, part: Tensor, name: str, like: str) -> tuple[Tensor, Tensor]:
    """K and s with K^T whole K = I and K^T part K = diag(s)."""
    part = _symmetric(part)
    if isinstance(whole, Tensor) and whole.numel() != 1:
        (whole,) = _kron.factors([whole], name)
        if whole.shape != part.shape or whole.dtype != part.dtype or whole.device != part.device:
            raise ValueError(
                f"{name}: expected {part.dtype} of shape {tuple(part.shape)} on {part.device} like {like}, or a "
                f"number, got {whole.dtype} of shape {tuple(whole.shape)} on {whole.device}"
            )
        lower, failed = torch.linalg.cholesky_ex(whole)
        half = torch.linalg.solve_triangular(lower, part, upper=False)
        reduced = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        reduced, usable = _symmetric(reduced), failed == 0
    else:
        _check.number(name, whole)
        number = torch.as_tensor(whole, dtype=part.dtype, device=part.device).reshape(())
        lower, reduced, usable = None, part / number, number > 0
    usable = usable & reduced.isfinite().all()
    # What is not finite would make eigh raise, after waiting for the device.
    values, vectors = torch.linalg.eigh(torch.where(usable, reduced, 0.0))
    if lower is not None:
        vectors = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    basis = torch.where(usable, vectors if lower is not None else vectors / number.sqrt(), torch.nan)
    return basis, torch.where(usable, values.clamp(min=0.0), torch.nan)


def _symmetric(x: Tensor) -> Tensor:
    total = x + x.mT
    return torch.where(total.isfinite(), total / 2, x / 2 + x.mT / 2)
