"""Matrices whose singular values are known, and the float64 truth about them."""

from __future__ import annotations

import math

import torch
from cases import DEVICE

from fastcurv.ops.newton_schulz import COEFFICIENTS

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


def decomposed(matrix):
    """The thin singular value decomposition in float64.

    LAPACK's vectors of a singular matrix that is not wide may be off by 1e-6; those of its QR factor R, padded, are not.
    """
    q, r = torch.linalg.qr(matrix.double())
    u, sigma, vh = torch.linalg.svd(torch.nn.functional.pad(r, (0, int(len(r) == r.shape[1]))), full_matrices=False)
    return q @ u, sigma, vh[:, : r.shape[1]]


def polar_truth(matrix):
    """The polar factor, the singular values, and how many of them count as zero."""
    u, sigma, vh = decomposed(matrix)
    kept = sigma > threshold(matrix) * sigma[0]
    return u[:, kept] @ vh[kept], sigma, int((~kept).sum())


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


def steps_of(name, count):
    """Coefficients of so many Newton-Schulz steps."""
    listed = COEFFICIENTS[name]
    return [listed[min(k, len(listed) - 1)] for k in range(count)]


def steps_truth(matrix, steps):
    """Newton-Schulz steps on each singular value."""
    u, sigma, vh = decomposed(matrix)
    sigma = sigma / sigma.norm().clamp(min=1e-300)
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (u * sigma) @ vh


def steps_error(matrix, steps, unit):
    """Bound, in the Frobenius norm and to first order, on what rounding makes of Newton-Schulz steps.

    A sum of n products is off by sqrt(n) u times the norms of its factors (Higham and Mary, 2019), whatever its order;
    every intermediate matrix is rounded, and so is each of the terms that it is added up from. The truth has an error,
    too: each of its vectors is a product of some rotations for every singular value, in float64.

    Args:
        matrix: What the steps begin with, divided by its norm.
        steps: Their coefficients.
        unit: Half an ulp of one, where products are formed.
    """
    m, n = sorted(matrix.shape)
    sums = [math.sqrt(length) * unit for length in (m, n)]
    sigma = torch.linalg.svdvals(matrix.double())
    values, slopes = [sigma / sigma.norm().clamp(min=1e-300)], []
    errors = [2 * unit + 8 * math.sqrt(m * n) * UNIT[torch.float64]]
    for a, b, c in steps:
        x = values[-1]
        gram = x**2
        of_gram = sums[1] * x.norm() ** 2 + unit * gram.norm()
        of_square = sums[0] * gram.norm() ** 2 + 2 * gram.max() * of_gram
        of_polynomial = abs(b) * of_gram + abs(c) * of_square
        of_polynomial += 2 * unit * (abs(b) * gram.norm() + abs(c) * (gram**2).norm())
        of_product = x.max() * of_polynomial + sums[0] * (b * gram + c * gram**2).norm() * x.norm()
        terms = torch.stack([a * x, b * x**3, c * x**5])
        errors.append(of_product + 2 * unit * terms.norm(dim=1).sum())
        values.append(terms.sum(dim=0))
        slopes.append(a + 3 * b * x**2 + 5 * c * x**4)
    total, slope = 0.0, torch.ones_like(sigma)
    for k in reversed(range(len(values))):
        total += errors[k] * _growth(values[k], values[-1], slope)
        slope = slope * slopes[k - 1]
    return float(total)


def _growth(x, y, slope):
    """By how much a function of singular values, which makes y of x, stretches a small change of the matrix.

    Between the directions of two values that is a divided difference, or one with the opposite sign of the second; a
    wide matrix has directions of the value zero besides.
    """
    others, images = (torch.nn.functional.pad(torch.cat([z, -z]), (0, 1)) for z in (x, y))
    run, rise = x[:, None] - others, y[:, None] - images
    near = run.abs() < 1e-7
    return torch.where(near, slope[:, None], rise / run.masked_fill(near, 1.0)).abs().max()


def rounding(matrix, rows=None):
    """Bound on what rounding makes of the sums of all rows together, unless of so many.

    A sum of n products in an arithmetic of unit u is off by about sqrt(n) u times the lengths of its factors (Higham and
    Mary, 2019); eight times that stands for the few such sums that follow each other, and with k rows there are k, whose
    errors add up to sqrt(k) times as much. 16-bit numbers are worked on in float32.
    """
    sums = max(matrix.shape) * (rows or min(matrix.shape))
    return 8 * math.sqrt(sums) * min(UNIT[matrix.dtype], UNIT[torch.float32])


def rows_truth(matrix):
    """Gram-Schmidt of rows, and the pivots: how long what is left of each row is."""
    q, r = torch.linalg.qr(wide(matrix).double().mT)
    q = (q * r.diagonal().sgn()).mT
    return (q if matrix.shape[0] <= matrix.shape[1] else q.mT), r.diagonal().abs()


def assert_gram_schmidt(matrix, result, info):
    """Rows are orthonormal, and with L the lower triangle of G Q^T, G = L Q."""
    g, q = wide(matrix).double(), wide(result).double()
    pair, norms, kept = rounding(matrix, rows=1) + 2 * UNIT[matrix.dtype], g.norm(dim=1), q.any(dim=1)
    assert info == int((~kept).sum()) and not q[(g[:, None] == g).all(dim=2).tril(-1).any(dim=1) | (norms == 0)].any()
    assert (q @ q.mT - kept.double().diag()).abs().max() <= pair
    lower = g @ q.mT
    assert ((g - lower.tril() @ q).norm(dim=1) <= 2 * math.sqrt(len(g)) * pair * norms).all()
    assert (lower.triu(1).abs() <= 2 * pair * norms[:, None]).all() and (lower.diagonal() >= -2 * pair * norms).all()
    # A change of unit rows by d moves the first k directions by sqrt(2) |R_k^-1| d (Sun, 1991).
    truth, _ = rows_truth(wide(matrix)[kept])
    r = (truth @ (g[kept] / norms[kept, None]).mT).triu()
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    moved = rounding(matrix) * (2 * inverse.square().sum(dim=0).cumsum(dim=0)).sqrt()
    assert ((q[kept] - truth).norm(dim=1) <= moved.nan_to_num(math.inf, math.inf) + UNIT[matrix.dtype]).all()
