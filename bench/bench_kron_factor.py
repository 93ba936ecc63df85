"""Cases of the op `kron_factor_`: single factors, and those of the inputs of whole models."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import unfold

from fastcurv import _backend
from fastcurv.ops import Patches, kron_factor_

from . import models
from .entry import pytest_generate_tests, test_step
from .harness import WARM_UPS, Case, Contender, Options, Prepared, Role
from .matrices import QUICK_ROWS, TOLERANCE, gemm, relative_error

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

ADDMM, CAT, UNFOLD = "torch addmm_", "torch cat, addmm_", "torch unfold, addmm_"
DECAY = 0.95
# Samples, and images: what K-FAC takes of a mini-batch for its statistics is an eighth.
SAMPLES, IMAGES = 1000, 16
VERIFIED_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the factors of a case are made of.

    Attributes:
        shapes: Of the samples of each factor: (samples, features), or images.
        patches: What a convolution sees of each of the images; empty: they are matrices.
        has_ones: Whether a one belongs behind each sample.
    """

    shapes: list[models.Shape]
    patches: Sequence[Patches] = ()
    has_ones: bool = False

    def features(self) -> list[int]:
        """Rows of each factor."""
        sizes = [p.numbers() for p in self.patches] or [[1, 1] for _ in self.shapes]
        return [s[1] * p[0] * p[1] + self.has_ones for s, p in zip(self.shapes, sizes, strict=True)]

    def rows(self, x: Tensor, number: int) -> Tensor:
        """The samples of an input, as torch would have them."""
        if self.patches:
            eight = self.patches[number].numbers()
            kernel, stride, padding, dilation = (tuple(eight[k : k + 2]) for k in range(0, 8, 2))
            x = unfold(x, kernel, dilation, padding, stride).mT.flatten(0, 1)
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self.has_ones else x

    def by_ours(self, factors: list[Tensor], inputs: list[Tensor], backend: str) -> object:
        """The op."""
        patches = self.patches or None
        return kron_factor_(factors, inputs, DECAY, has_ones=self.has_ones, patches=patches, backend=backend)

    def by_torch(self, factors: list[Tensor], inputs: list[Tensor]) -> None:
        """One product for each factor that scales and adds as well."""
        for number, (factor, x) in enumerate(zip(factors, inputs, strict=True)):
            samples = self.rows(x, number)
            factor.addmm_(samples.mT, samples, beta=DECAY, alpha=(1 - DECAY) / len(samples))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorCase(Case):
    """Moving averages of the factors of one model.

    Attributes:
        inputs: Makes what they are made of.
    """

    inputs: Callable[[], Inputs]

    def size(self, options: Options) -> dict[str, int]:
        """See `Case.size`."""
        inputs = self._inputs(options.quick)
        flops = 0
        for number, (shape, n) in enumerate(zip(inputs.shapes, inputs.features(), strict=True)):
            count = len(inputs.rows(torch.empty(1, *shape[1:]), number)) * shape[0]
            flops += count * n * (n + 1)
        return {"tensors": len(inputs.shapes), "elements": models.numel(inputs.shapes), "flops": flops}

    def contenders(self, options: Options) -> list[Contender]:
        """See `Case.contenders`."""
        device, inputs = torch.device(options.device), self._inputs(options.quick)
        return [
            self._contender(
                f"fastcurv {name}",
                "reference" if name == "reference" else "ours",
                functools.partial(Inputs.by_ours, backend=name),
                options,
            )
            for name in ("cuda", "triton", "cpp", "reference")
            if not _backend.unusable("kron_factor", name, device)
            and (name != "triton" or not _backend.interpreting())
            and (name != "reference" or len(inputs.shapes) == 1)
        ] + [self._contender(self.baseline, "torch", Inputs.by_torch, options)]

    def _contender(self, name: str, role: Role, update: Callable[..., object], options: Options) -> Contender:
        size = self.size(options)
        return Contender(
            name=name,
            role=role,
            verify=functools.partial(self.verify, update, options.device),
            prepare=functools.partial(self._prepare, update, options),
            bytes=8 * size["elements"],
        )

    def _inputs(self, is_quick: bool) -> Inputs:
        inputs = self.inputs()
        if not is_quick:
            return inputs
        if inputs.patches:
            shapes = [(VERIFIED_IMAGES, *shape[1:]) for shape in inputs.shapes]
        else:
            shapes = [tuple(min(side, QUICK_ROWS) for side in shape) for shape in inputs.shapes]
        return dataclasses.replace(inputs, shapes=shapes)

    def verify(self, update: Callable[..., object], device: str) -> str:
        """Compares an implementation with float64 products, on small inputs.

        Args:
            update: What is verified: a function of inputs, factors and samples.
            device: Where.

        Returns:
            What is wrong, or an empty string.
        """
        inputs = self._inputs(is_quick=True)
        factors, samples = _examples(inputs, device)
        truths = [factor.double() for factor in factors]
        models_ = [factor.clone() for factor in factors]
        inputs.by_torch(truths, [x.double() for x in samples])
        inputs.by_torch(models_, samples)
        update(inputs, factors, samples)
        found, allowed = relative_error(factors, truths), TOLERANCE * relative_error(models_, truths)
        return "" if found <= allowed else f"off by {found:.2g}, {allowed:.2g} allowed"

    def _prepare(self, update: Callable[..., object], options: Options) -> Prepared:
        inputs = self._inputs(options.quick)
        factors, samples = _examples(inputs, options.device)
        call = functools.partial(update, inputs, factors, samples)
        for _ in range(WARM_UPS if options.device == "cuda" else 1):
            call()
        return Prepared(call, ceilings=[gemm(options)])


def _examples(inputs: Inputs, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Factors and samples."""
    generator = torch.Generator(device).manual_seed(0)
    factors = [torch.eye(n, device=device) for n in inputs.features()]
    return factors, [torch.randn(shape, generator=generator, device=device) for shape in inputs.shapes]


def _single(features: int) -> Inputs:
    return Inputs([(SAMPLES, features)])


def _activations(model: Callable[[], list[models.Shape]]) -> Inputs:
    return Inputs([(SAMPLES, shape[1]) for shape in model() if len(shape) == 2], has_ones=True)


def resnet20_images() -> Inputs:
    """What the convolutions of ResNet-20 see of CIFAR-10's images."""
    side = 32
    shapes: list[models.Shape] = []
    seen: list[Patches] = []
    convolutions = [shape for shape in models.resnet20() if len(shape) == 4]
    for shape in convolutions:
        outputs, channels, *kernel = shape
        # The first convolution of a stage with more channels halves the sides.
        stride = 2 if outputs > channels > 3 else 1
        shapes.append((IMAGES, channels, side, side))
        seen.append(Patches((kernel[0], kernel[1]), stride, padding=kernel[0] // 2))
        side = math.ceil(side / stride)
    return Inputs(shapes, seen)


def _case(name: str, work: str, baseline: str, inputs: Callable[[], Inputs]) -> FactorCase:
    return FactorCase("kron_factor", name, work, baseline=baseline, inputs=inputs)


CASES: list[Case] = [
    *(
        _case(f"{SAMPLES}x{d}", f"{SAMPLES} samples of {d}", ADDMM, functools.partial(_single, d))
        for d in (785, 1001, 2001)
    ),
    *(
        _case(name, f"activations of {name.upper()}", CAT, functools.partial(_activations, model))
        for name, model in (("curves", models.curves), ("mnist", models.mnist), ("faces", models.faces))
    ),
    _case("resnet20", f"convolutions of ResNet-20, {IMAGES} images", UNFOLD, resnet20_images),
]
