"""Inverse roots by coupled Newton iteration in Triton, on the matrices of each size together.

A step towards the p-th root, p a power of two, is 2 + log2 p products of which one half is formed: the algorithm is
that of csrc/cpu/kron_root.cpp. No step waits for the host: all take as many, and what is done is multiplied by the
identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._products import symmetric_product

_NOT_DEFINITE = -1


def kron_root(
    factors: list[Tensor], roots: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor, p: int
) -> None:
    """The inverse p-th root of every damped factor whose `info` is not 0; see `fastcurv.ops.kron_root`.

    That has added the jitter and what is not finite has not come here: what does not converge gets -1.
    """
    sizes: dict[int, list[int]] = {}
    for i, factor in enumerate(factors):
        sizes.setdefault(len(factor), []).append(i)
    found, shifts = list(info.unbind()), damping.unbind()
    for n, members in sizes.items():
        if n == 0:
            results, good = (
                [factors[i] for i in members],
                torch.ones(len(members), dtype=torch.bool, device=info.device),
            )
        else:
            a = torch.stack([factors[i] for i in members])
            a.diagonal(dim1=1, dim2=2).add_(torch.stack([shifts[i] for i in members])[:, None])
            results, good = _coupled(a.tril() + a.tril(-1).mT, p)
        for i, result, is_good in zip(members, results, good, strict=True):
            instead = previous[i] if previous else torch.zeros_like(result)
            roots[i].copy_(torch.where(found[i] == 0, roots[i], torch.where(is_good, result, instead)))
            found[i] = torch.where((found[i] == 0) | is_good, 0, _NOT_DEFINITE).int()
    # One launch, and no index that would have to travel to the device.
    if found:
        torch.stack(found, out=info)


def _coupled(a: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """A^(-1/p) of each matrix of a batch, and whether the iteration converged to something finite."""
    eps = torch.finfo(a.dtype).eps
    one = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    norm = a.abs().sum(dim=2).amax(dim=1)
    z = torch.where(norm > 0, min(p + 1, 5) / (2 * norm), 0.0)[:, None, None]
    x, m = z ** (1 / p) * one, z * a
    done = torch.zeros_like(norm, dtype=torch.bool)
    # What an eigenvalue takes that is rounding of the largest, and some for its square to vanish.
    for _ in range(round(-math.log2(eps)) + 12):
        error = (m - one).abs().amax(dim=(1, 2))
        t = torch.where(done[:, None, None], one, ((p + 1) * one - m) / p)
        x = symmetric_product(x, t)
        # What is left is about the square of it.
        done = done | (error < eps**0.5 / 2)
        # A GPU is not asked. The error grows only if an eigenvalue is below zero.
        if a.device.type == "cpu" and bool((done | ~(error <= p + 1)).all()):
            break
        power = p
        while power:
            if power & 1:
                m = symmetric_product(t, m)
            power >>= 1
            if power:
                t = symmetric_product(t, t)
    return x, done & x.isfinite().all(dim=2).all(dim=1)
