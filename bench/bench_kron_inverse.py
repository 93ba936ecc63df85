"""Cases of the op `kron_inverse`: the factors of whole models, and many equal ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastcurv import _backend
from fastcurv.ops import kron_inverse

from . import models
from .entry import pytest_generate_tests, test_step
from .harness import Case, Options
from .matrices import Implementation, MatrixCase, looped

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

LOOPED, BATCHED, EIGEN = "torch cholesky looped", "torch cholesky batched", "torch eigh looped"
# Of what is a mean over few samples of many features.
DAMPING = 0.1


def definite(shapes: Sequence[models.Shape], device: str) -> list[Tensor]:
    """Damped factors of random inputs, of twice as many samples as rows."""
    generator = torch.Generator(device).manual_seed(0)
    factors = []
    for n, _ in shapes:
        x = torch.randn(2 * n, n, generator=generator, device=device)
        factors.append((x.mT @ x).div_(2 * n))
        factors[-1].diagonal().add_(DAMPING)
    return factors


def by_cholesky(matrix: Tensor) -> Tensor:
    """The inverse of one matrix, or of a batch, by torch's best calls."""
    lower, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_inverse(lower)


def batched(matrices: list[Tensor], invert: Callable[[Tensor], Tensor] = by_cholesky) -> list[Tensor]:
    """The inverses, equal sizes together."""
    members: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        members.setdefault(len(matrix), []).append(i)
    inverses = list(matrices)
    for indices in members.values():
        results = invert(torch.stack([matrices[i] for i in indices]))
        for i, result in zip(indices, results, strict=True):
            inverses[i] = result
    return inverses


def by_eigh(matrix: Tensor) -> Tensor:
    """The inverse as libraries of K-FAC compute it."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.mm(vectors / values, vectors.mT)


def by_cupy(matrices: list[Tensor]) -> list[Tensor]:
    """The inverses by cuSOLVER's batched factorisation, which CuPy calls, and torch's inverse of what it gives."""
    import cupy

    def invert(batch: Tensor) -> Tensor:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            lower = from_dlpack(cupy.linalg.cholesky(cupy.from_dlpack(batch)))
        return torch.cholesky_inverse(lower)

    return batched(matrices, invert)


class HotStarts:
    """Newton's iteration from the inverses that the call before has left; or from Cholesky's, for other sizes."""

    def __init__(self) -> None:
        self._previous: list[Tensor] = []

    def __call__(self, matrices: list[Tensor]) -> list[Tensor]:
        """Inverts a list."""
        if [len(x) for x in self._previous] != [len(m) for m in matrices]:
            self._previous, _ = kron_inverse(matrices)
        self._previous, _ = kron_inverse(matrices, previous=self._previous, method="newton")
        return self._previous


def _implementations(has_reference: bool, options: Options) -> list[Implementation]:
    device = torch.device(options.device)
    return [
        *(
            Implementation(
                f"fastcurv {name}",
                "reference" if name == "reference" else "ours",
                # mypy cannot infer a lambda with a default.
                lambda matrices, name=name: kron_inverse(matrices, backend=name)[0],  # type: ignore[misc]
            )
            for name in ("cuda", "cpp", "reference")
            if (has_reference or name != "reference") and not _backend.unusable("kron_inverse", name, device)
        ),
        Implementation("fastcurv newton, hot", "yardstick", HotStarts()),
        Implementation(LOOPED, "torch", looped(by_cholesky)),
        Implementation(BATCHED, "torch", batched),
        Implementation(EIGEN, "torch", looped(by_eigh), model=by_eigh),
        Implementation("torch.linalg.inv looped", "torch", looped(torch.linalg.inv)),
        *([Implementation("CuPy cholesky batched", "peer", by_cupy)] if device.type == "cuda" else []),
    ]


def _case(name: str, work: str, shapes: Callable[[], list[models.Shape]]) -> MatrixCase:
    return MatrixCase(
        "kron_inverse",
        name,
        work,
        baseline=LOOPED,
        shapes=shapes,
        implementations=functools.partial(_implementations, name == "curves"),
        truth=by_cholesky,
        model=by_cholesky,
        flops=lambda m, n: float(n) ** 3,
        examples=definite,
    )


_MODELS = [
    ("curves", "CURVES", models.curves),
    ("mnist", "MNIST", models.mnist),
    ("faces", "FACES", models.faces),
    ("resnet20", "ResNet-20", models.resnet20),
    ("resnet50", "ResNet-50", models.resnet50),
    ("transformer", "12 transformer layers", models.transformer),
]


def _squares(count: int, n: int) -> list[models.Shape]:
    return [(n, n)] * count


def _factors(model: Callable[[], list[models.Shape]]) -> list[models.Shape]:
    return models.kronecker_factors(model())


CASES: list[Case] = [
    *(
        _case(f"{count}x{n}", f"{count} x {n}²", functools.partial(_squares, count, n))
        for count, n in [(200, 32), (100, 64), (100, 128), (50, 256), (30, 512), (10, 1024)]
    ),
    *(_case(name, f"factors of {work}", functools.partial(_factors, model)) for name, work, model in _MODELS),
]
