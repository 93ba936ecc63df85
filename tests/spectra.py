"""Matrices whose singular values are known, and the float64 truth about them."""

from __future__ import annotations

import math

import torch
from cases import DEVICE

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(16, 27), (27, 16), (64, 288), (10, 64), (5, 5), (1, 9), (9, 1), (130, 150), (200, 140)]


def orthonormal(m, k, generator):
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]


def with_singular_values(shape, values, generator, dtype=torch.float32):
    """A random matrix with given singular values, but for its rounding to a dtype."""
    m, n = shape
    values = torch.as_tensor(values, dtype=torch.float64)
    u, v = (orthonormal(size, len(values), generator) for size in (m, n))
    return ((u * values) @ v.mT).to(DEVICE, dtype)


def logarithmic(shape, decades, generator, dtype=torch.float32):
    """Singular values from one to ten to the minus `decades`."""
    k = min(shape)
    return with_singular_values(shape, torch.logspace(0, -decades, k, dtype=torch.float64), generator, dtype)


def threshold(matrix):
    """Relative to the largest singular value: what does not exceed it counts as zero."""
    unit = UNIT[torch.float64] if matrix.dtype == torch.float64 else UNIT[torch.float32]
    return math.sqrt(max(matrix.shape)) * unit


def polar_truth(matrix):
    """The polar factor, the singular values, and how many of them count as zero."""
    # Of singular matrices that are not wide LAPACK's vectors may be off by 1e-6: of a QR decomposition's R they are not.
    q, r = torch.linalg.qr(matrix.double())
    u, sigma, vh = torch.linalg.svd(torch.nn.functional.pad(r, (0, 1)), full_matrices=False)
    kept = sigma > threshold(matrix) * sigma[0]
    return q @ u[:, kept] @ vh[kept, :-1], sigma, int((~kept).sum())


def definite(n, condition, generator, dtype=torch.float32):
    """Eigenvalues from one down to 1 / condition."""
    q = orthonormal(n, n, generator)
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    matrix = (q * values) @ q.mT
    return ((matrix + matrix.mT) / 2).to(DEVICE, dtype)


def almost(n, least, generator):
    """Eigenvalues of one, and one of `least`, in float64: nothing depends on rounding."""
    q = orthonormal(n, n, generator)
    values = torch.ones(n, dtype=torch.float64)
    values[0] = least
    matrix = (q * values) @ q.mT
    return ((matrix + matrix.mT) / 2).to(DEVICE)


def tridiagonal(n, alpha, beta):
    """The matrix, float32, and its eigenvalues alpha + 2 beta cos(k pi / (n + 1)) and vectors sin(j k pi / (n + 1))."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    values = alpha + 2 * beta * torch.cos(k * math.pi / (n + 1))
    vectors = math.sqrt(2 / (n + 1)) * torch.sin(k[:, None] * k * math.pi / (n + 1))
    ones = torch.ones(n - 1)
    matrix = alpha * torch.eye(n) + beta * (torch.diag(ones, 1) + torch.diag(ones, -1))
    return matrix.to(DEVICE), values, vectors


def truth_of(matrix, p=1):
    """The inverse p-th root in float64."""
    m = matrix.double()
    if p == 1:
        return torch.linalg.solve(m, torch.eye(len(m), dtype=torch.float64, device=m.device))
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values ** (-1 / p)) @ vectors.mT


def assert_root(matrix, root, condition, p=1):
    """Symmetric to the bit; of an inverse, a residual that rounding explains; an error of 20 kappa u."""
    m, x, unit = matrix.double(), root.double(), UNIT[matrix.dtype]
    n, one = len(m), torch.eye(len(m), dtype=torch.float64, device=m.device)
    assert torch.equal(root, root.mT)
    if p == 1:
        assert (one - m @ x).norm() <= 10 * math.sqrt(n) * unit * m.norm() * x.norm()
    if condition <= 1e5 or matrix.dtype == torch.float64:
        truth = truth_of(matrix, p)
        assert (x - truth).norm() <= 20 * condition * unit * truth.norm()


def wide(matrix):
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthonormality(q):
    """Distance of the non-zero singular values from one, in the 2-norm: |Q Q^T Q - Q|."""
    q = wide(q).double()
    return torch.linalg.matrix_norm(q @ q.mT @ q - q, ord=2).item()
