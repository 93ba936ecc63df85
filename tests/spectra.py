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
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = sigma > threshold(matrix) * sigma[0]
    return u[:, kept] @ vh[kept], sigma, int((~kept).sum())


def wide(matrix):
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthonormality(q):
    """Distance of the non-zero singular values from one, in the 2-norm: |Q Q^T Q - Q|."""
    q = wide(q).double()
    return torch.linalg.matrix_norm(q @ q.mT @ q - q, ord=2).item()
