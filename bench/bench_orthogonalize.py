"""Cases of the ops `polar`, `gram_schmidt` and `newton_schulz`: the gradients of whole models."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastcurv
from fastcurv import _backend
from fastcurv.ops import orthogonalize
from fastcurv.ops.newton_schulz import COEFFICIENTS

from . import models
from .entry import pytest_generate_tests, test_step
from .harness import Case, Options
from .matrices import Implementation, MatrixCase, gradients, looped
from .training import Trainer, TrainingCase

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

STEPS = 5
SVD = "torch.linalg.svd"


def by_svd(matrix: Tensor) -> Tensor:
    """The polar factor as the thesis computes it."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return torch.mm(u, vh)


def by_gram(matrix: Tensor) -> Tensor:
    """The polar factor in plain torch: a float64 Gram matrix and its eigenvectors."""
    x = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    values, vectors = torch.linalg.eigh(x @ x.mT)
    result = torch.mm((vectors * values.rsqrt()) @ vectors.mT, x).to(matrix.dtype)
    return result if matrix.shape[0] <= matrix.shape[1] else result.mT


def by_qr(matrix: Tensor) -> Tensor:
    """Orthonormal rows, or columns where there are fewer, by Householder's QR decomposition."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    q, r = torch.linalg.qr(matrix.mT if is_wide else matrix)
    q = torch.mul(q, r.diagonal().sgn())
    return q.mT if is_wide else q


def by_steps(matrix: Tensor) -> Tensor:
    """The steps of Muon as published, in the dtype of the matrix."""
    ((a, b, c),) = COEFFICIENTS["muon"]
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm()
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


def _implementations(
    method: str, others: list[Implementation], has_reference: bool, options: Options
) -> list[Implementation]:
    device = torch.device(options.device)
    ours = [
        Implementation(
            f"fastcurv {name}",
            "reference" if name == "reference" else "ours",
            functools.partial(orthogonalize, method=method, backend=name),
        )
        for name in _backend.BACKENDS
        if (has_reference or name != "reference") and not _backend.unusable(method, name, device)
    ]
    compiled = options.compile and importlib.util.find_spec("triton") is not None
    return [*ours, *(other for other in others if compiled or not other.compiled)]


@dataclasses.dataclass(frozen=True)
class _Method:
    """A way to orthogonalise: what else does it, the first being the baseline, and what is right."""

    name: str
    work: str
    others: list[Implementation]
    function: Callable[[Tensor], Tensor]
    flops: Callable[[int, int], float]

    def case(self, name: str, work: str, shapes: Callable[[], list[models.Shape]]) -> MatrixCase:
        """Its case for a list of matrices; the reference takes its time, and part in the smallest one only."""
        return MatrixCase(
            "orthogonalize",
            f"{self.name.replace('_', '-')}-{name}",
            f"{self.work}, {work}",
            baseline=self.others[0].name,
            shapes=shapes,
            implementations=functools.partial(_implementations, self.name, self.others, name == "resnet20"),
            truth=self.function,
            model=self.function,
            flops=self.flops,
            examples=gradients,
        )


_METHODS = [
    _Method(
        "polar",
        "polar",
        [
            Implementation(SVD, "torch", looped(by_svd)),
            Implementation("torch eigh of the Gram matrix", "torch", looped(by_gram)),
        ],
        by_svd,
        lambda m, n: 3 * m * m * n + 9 * m**3,
    ),
    _Method(
        "gram_schmidt",
        "Gram-Schmidt",
        [Implementation("torch.linalg.qr", "torch", looped(by_qr))],
        by_qr,
        lambda m, n: 4 * m * m * n,
    ),
    _Method(
        "newton_schulz",
        f"Newton-Schulz {STEPS} steps",
        [
            Implementation("torch eager", "torch", looped(by_steps)),
            Implementation("torch compile", "torch", looped(by_steps), compiled=True),
        ],
        by_steps,
        lambda m, n: STEPS * (3 * m * m * n + m**3),
    ),
]


_LISTS: list[tuple[str, str, Callable[[], list[models.Shape]]]] = [
    ("resnet20", "ResNet-20", models.resnet20),
    ("resnet50", "ResNet-50", models.resnet50),
    ("vit-b", "ViT-B", models.vit_b16),
    ("gpt2", "GPT-2 124M", lambda: models.gpt2()[2:]),  # without the embeddings
]


class _BySvd(torch.optim.SGD):
    """Orthogonal-SGDM as the thesis computes it: the decomposition of one gradient after the other."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    p.grad = by_svd(p.grad.flatten(1)).view_as(p)
        return super().step(closure)


def _trainers(options: Options) -> list[Trainer]:
    return [
        Trainer("fastcurv OSGD", "ours", lambda model: fastcurv.OSGD(model.parameters(), lr=0.01)),
        Trainer(f"OSGD by {SVD}", "torch", lambda model: _BySvd(model.parameters(), lr=0.01, momentum=0.9)),
        Trainer(
            "torch SGD", "yardstick", lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), "SGD"
        ),
    ]


CASES: list[Case] = [
    *(
        TrainingCase(
            "orthogonalize",
            f"step-resnet20-{batch}",
            f"training step of ResNet-20, mini-batch {batch}",
            devices=(device,),
            baseline=f"OSGD by {SVD}",
            batch=batch,
            trainers=_trainers,
        )
        for batch, device in [(128, "cpu"), (1024, "cuda")]
    ),
    *(method.case(*given) for method in _METHODS for given in _LISTS),
]
