"""Cases that measure ops on each matrix of a list."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .harness import WARM_UPS, Case, Contender, Options, Prepared, Role
from .models import Shape, numel

Function = Callable[[list[Tensor]], Sequence[Tensor]]
# Verification takes a float64 decomposition of every matrix: sides are no longer than this.
VERIFIED_SIDE = 512
QUICK_ROWS = 24
DECADES = 4
# The most that an error may be, relative to that of the case's model.
TOLERANCE = 2.0
# Of the float32 matrices whose product is the ceiling.
GEMM_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A function of a list of matrices that takes part in a case.

    Attributes:
        name: As printed.
        role: See `Contender`.
        function: What is timed.
        compiled: Whether the function goes through torch.compile.
        model: What its error is measured by, if not by that of the case's model: a way that is known to be less exact.
    """

    name: str
    role: Role
    function: Function
    compiled: bool = False
    model: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixCase(Case):
    """A function of the matrices of a model, such as its gradients.

    Attributes:
        shapes: The parameter list, of which tensors of two or more dimensions take part, as matrices.
        implementations: Who takes part.
        truth: In float64, of one matrix.
        model: A float32 implementation by torch whose error others are measured by.
        flops: Of a matrix of m rows and n >= m columns.
        examples: Makes matrices of given shapes on a device.
    """

    shapes: Callable[[], list[Shape]]
    implementations: Callable[[Options], list[Implementation]]
    truth: Callable[[Tensor], Tensor]
    model: Callable[[Tensor], Tensor]
    flops: Callable[[int, int], float]
    examples: Callable[[Sequence[Shape], str], list[Tensor]]

    def size(self, options: Options) -> dict[str, int]:
        """See `Case.size`."""
        shapes = self._matrices(options)
        flops = sum(self.flops(min(shape), max(shape)) for shape in shapes)
        return {"tensors": len(shapes), "elements": numel(shapes), "flops": round(flops)}

    def contenders(self, options: Options) -> list[Contender]:
        """See `Case.contenders`."""
        return [
            Contender(
                name=implementation.name,
                role=implementation.role,
                verify=functools.partial(self.verify, implementation, options.device),
                prepare=functools.partial(self.prepare, implementation, options),
                bytes=8 * self.size(options)["elements"],
            )
            for implementation in self.implementations(options)
        ]

    def _matrices(self, options: Options) -> list[Shape]:
        most = QUICK_ROWS if options.quick else 1 << 30
        return [(min(s[0], most), min(math.prod(s[1:]), most)) for s in self.shapes() if len(s) > 1]

    def verify(self, implementation: Implementation, device: str) -> str:
        """Compares an implementation with the truth, on matrices that are not too large to decompose in float64.

        Args:
            implementation: What is verified.
            device: Where.

        Returns:
            What is wrong, or an empty string.
        """
        shapes = list(
            dict.fromkeys((min(m, VERIFIED_SIDE), min(n, VERIFIED_SIDE)) for m, n in self._matrices(Options(device)))
        )
        matrices = self.examples(shapes, device)
        truths = [self.truth(m.double()) for m in matrices]
        function = _compiled(implementation)
        found = relative_error(function(matrices), truths)
        allowed = TOLERANCE * relative_error([(implementation.model or self.model)(m) for m in matrices], truths)
        return "" if found <= allowed else f"off by {found:.2g}, {allowed:.2g} allowed"

    def prepare(self, implementation: Implementation, options: Options) -> Prepared:
        """Gives an implementation matrices of its own.

        Args:
            implementation: What is prepared.
            options: Device, and whether the work is shrunk.
        """
        matrices = self.examples(self._matrices(options), options.device)
        call = functools.partial(_compiled(implementation), matrices)
        for _ in range(WARM_UPS if options.device == "cuda" else 1):
            call()
        return Prepared(call, ceilings=[gemm(options)])


def gemm(options: Options) -> tuple[str, Callable[[], object], int]:
    """The ceiling of what multiplies matrices: name, call and flops of one large product."""
    rows = QUICK_ROWS if options.quick else GEMM_ROWS
    x = torch.ones(rows, rows, device=options.device)
    return f"float32 product of {rows} x {rows}", functools.partial(torch.mm, x, x), 2 * rows**3


def looped(function: Callable[[Tensor], Tensor]) -> Function:
    """A function of one matrix, on each of a list."""
    return lambda matrices: [function(matrix) for matrix in matrices]


def _compiled(implementation: Implementation) -> Function:
    if not implementation.compiled:
        return implementation.function
    torch.compiler.reset()
    return torch.compile(implementation.function)


def gradients(shapes: Sequence[Shape], device: str) -> list[Tensor]:
    """Random matrices whose singular values fall, as those of gradients do, over some decades."""
    generator = torch.Generator(device).manual_seed(0)

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator, device=device)).Q

    matrices = []
    for m, n in shapes:
        k = min(m, n)
        matrices.append((orthonormal(m, k) * torch.logspace(0, -DECADES, k, device=device)) @ orthonormal(n, k).mT)
    return matrices


def relative_error(found: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest relative distance, in the Frobenius norm."""
    return max(
        float((x.double() - t).norm() / t.norm()) if bool(x.isfinite().all()) else math.inf
        for x, t in zip(found, truths, strict=True)
    )
