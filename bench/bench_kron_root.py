"""Cases of the op `kron_root`: the factors of Shampoo, and many equal ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastcurv import _backend
from fastcurv.ops import kron_root

from . import models
from .bench_kron_inverse import definite
from .entry import pytest_generate_tests, test_step
from .harness import Case, Options
from .matrices import Implementation, MatrixCase, looped

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

EIGEN, NEWTON = "torch eigh looped", "torch coupled Newton looped"
# Steps of the yardstick: it asks after each whether it is done.
STEPS = 80


def by_eigh(matrix: Tensor, p: int) -> Tensor:
    """The root as Shampoo's libraries compute it."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.mm(vectors * values.pow(-1 / p), vectors.mT)


def by_newton(matrix: Tensor, p: int) -> Tensor:
    """The root by coupled Newton iteration, by whole products."""
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    z = min(p + 1, 5) / (2 * torch.linalg.matrix_norm(matrix, math.inf))
    x: Tensor = z ** (1 / p) * one
    m = z * matrix
    small = torch.finfo(matrix.dtype).eps ** 0.5 / 2
    for _ in range(STEPS):
        is_done = bool((m - one).abs().max() < small)
        t = ((p + 1) * one - m) / p
        x = x @ t
        if is_done:
            break
        m = torch.linalg.matrix_power(t, p) @ m
    return x


def _implementations(p: int, options: Options) -> list[Implementation]:
    device = torch.device(options.device)
    return [
        *(
            Implementation(
                f"fastcurv {name}",
                "reference" if name == "reference" else "ours",
                # mypy cannot infer a lambda with a default.
                lambda matrices, name=name: kron_root(matrices, p=p, backend=name)[0],  # type: ignore[misc]
            )
            for name in _backend.BACKENDS
            if not _backend.unusable("kron_root", name, device) and not (name == "triton" and _backend.interpreting())
        ),
        Implementation("fastcurv eigh", "yardstick", lambda matrices: kron_root(matrices, p=p, method="eigh")[0]),
        Implementation(EIGEN, "torch", looped(functools.partial(by_eigh, p=p))),
        Implementation(NEWTON, "torch", looped(functools.partial(by_newton, p=p))),
    ]


def _case(name: str, work: str, p: int, shapes: Callable[[], list[models.Shape]]) -> MatrixCase:
    truth = functools.partial(by_eigh, p=p)
    return MatrixCase(
        "kron_root",
        f"{name}-p{p}",
        f"{work}, p = {p}",
        baseline=EIGEN,
        shapes=shapes,
        implementations=functools.partial(_implementations, p),
        truth=truth,
        model=truth,
        # One step: how many there are depends on the condition number.
        flops=lambda m, n: (2 + math.floor(math.log2(p))) * float(n) ** 3,
        examples=definite,
    )


def _resnet20() -> list[models.Shape]:
    return models.shampoo_factors(models.resnet20())


def _squares(count: int, n: int) -> list[models.Shape]:
    return [(n, n)] * count


CASES: list[Case] = [
    case
    for p in (4, 2)
    for case in (
        _case("resnet20", "Shampoo's factors of ResNet-20", p, _resnet20),
        *(
            _case(f"{count}x{n}", f"{count} x {n}²", p, functools.partial(_squares, count, n))
            for count, n in [(100, 64), (30, 256)]
        ),
    )
]
