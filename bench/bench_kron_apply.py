"""Cases of the op `kron_apply`: the gradients of whole models times the inverses of their factors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcurv import _backend
from fastcurv.ops import Stein, kron_apply

from . import models
from .entry import pytest_generate_tests, test_step
from .harness import Case, Contender, Options, Prepared, Role
from .matrices import QUICK_ROWS, TOLERANCE, gemm, relative_error

__all__ = ["CASES", "pytest_generate_tests", "test_step"]

BASELINE = "torch mm + dot looped"
# Of the low-rank form: fewer than most layers have rows.
SAMPLES = 128
# What is asked of a layer: its update, <V, U> and <U, U>.
Result = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Layers:
    """The arguments of one form: `inputs` are those of the low-rank form, `steins` those of the other."""

    grads: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    inputs: list[Tensor] | None = None
    steins: list[Stein] | None = None

    def double(self) -> Layers:
        """The same in float64."""
        grads, lefts, rights = ([t.double() for t in ts] for ts in (self.grads, self.lefts, self.rights))
        inputs = None if self.inputs is None else [t.double() for t in self.inputs]
        steins = None if self.steins is None else [Stein(*(t.double() for t in s)) for s in self.steins]
        return Layers(grads, lefts, rights, inputs, steins)


def layers(form: str, shapes: Sequence[models.Shape], samples: int, device: str) -> Layers:
    """Random ones; factors have the norm of the identity and need not be inverses of anything."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    lefts = [random(d, d, scale=d**-0.5) for d, _ in shapes]
    rights = [random(a, a, scale=a**-0.5) for _, a in shapes]
    found = Layers([random(samples, d) if form == "samples" else random(d, a) for d, a in shapes], lefts, rights)
    if form == "samples":
        found.inputs = [random(samples, a) for _, a in shapes]
    elif form == "stein":
        found.steins = [
            Stein(left, right, random(len(left)).abs_(), random(len(right)).abs_())
            for left, right in zip(lefts, rights, strict=True)
        ]
    return found


def by_torch(given: Layers) -> list[Result]:
    """One layer after the other, by torch's products."""
    results = []
    for i, grad in enumerate(given.grads):
        if given.inputs is not None:
            left, right = torch.mm(given.lefts[i], grad.mT), torch.mm(given.inputs[i], given.rights[i])
            update = torch.mm(left, right).div_(len(grad))
            grams = torch.mm(grad, left), torch.mm(given.inputs[i], right.mT)
            dot = torch.dot(grams[0].flatten(), grams[1].flatten()) / len(grad) ** 2
        else:
            if given.steins is not None:
                k2, k1, s2, s1 = given.steins[i]
                quotient = torch.mm(torch.mm(k2.mT, grad), k1).div_(1 + torch.outer(s2, s1))
                update = torch.mm(torch.mm(k2, quotient), k1.mT)
            else:
                update = torch.mm(torch.mm(given.lefts[i], grad), given.rights[i])
            dot = torch.dot(grad.flatten(), update.flatten())
        results.append((update, torch.stack([dot, torch.dot(update.flatten(), update.flatten())])))
    return results


def by_us(given: Layers, backend: str) -> list[Result]:
    """All layers in one call."""
    arguments: dict[str, Any] = {"inputs": given.inputs, "backend": backend}
    if given.steins is not None:
        updates, products, _ = kron_apply(given.grads, given.steins, backend=backend)
    else:
        updates, products, _ = kron_apply(given.grads, given.lefts, given.rights, **arguments)
    return list(zip(updates, products.unbind(), strict=True))


Function = Callable[[Layers], list[Result]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApplyCase(Case):
    """The layers of a model, in one of the forms.

    Attributes:
        form: "plain", "samples" or "stein".
        shapes: The parameter list, of which weights of two or more dimensions take part.
    """

    form: str
    shapes: Callable[[], list[models.Shape]]

    def _shapes(self, options: Options) -> list[models.Shape]:
        """Of the gradients: linear layers have a bias, and so one more input."""
        most = QUICK_ROWS if options.quick else 1 << 30
        return [(min(s[0], most), min(math.prod(s[1:]) + (len(s) == 2), most)) for s in self.shapes() if len(s) > 1]

    def _samples(self, options: Options) -> int:
        return QUICK_ROWS if options.quick else SAMPLES

    def size(self, options: Options) -> dict[str, int]:
        """See `Case.size`."""
        shapes, m = self._shapes(options), self._samples(options)
        flops = {
            "plain": sum(2 * d * a * (d + a) for d, a in shapes),
            "stein": sum(4 * d * a * (d + a) for d, a in shapes),
            "samples": sum(2 * m * (d * d + a * a + d * a + m * (d + a)) for d, a in shapes),
        }
        return {"tensors": len(shapes), "elements": models.numel(shapes), "flops": flops[self.form]}

    def contenders(self, options: Options) -> list[Contender]:
        """See `Case.contenders`."""
        device = torch.device(options.device)
        found: list[tuple[str, Role, Function]] = [
            (
                f"fastcurv {name}",
                "reference" if name == "reference" else "ours",
                functools.partial(by_us, backend=name),
            )
            for name in _backend.BACKENDS
            if (name != "reference" or self.name == "curves") and not _backend.unusable("kron_apply", name, device)
        ]
        found.append((BASELINE, "torch", by_torch))
        return [
            Contender(
                name=name,
                role=role,
                verify=functools.partial(self.verify, function, options),
                prepare=functools.partial(self.prepare, function, options),
                bytes=4 * sum(2 * d * a + d * d + a * a for d, a in self._shapes(options)),
            )
            for name, role, function in found
        ]

    def verify(self, function: Function, options: Options) -> str:
        """Compares an implementation with float64, and its error with that of torch's float32."""
        shapes = sorted(set(self._shapes(options)))
        given = layers(self.form, shapes, self._samples(options), options.device)
        truths, models_, founds = by_torch(given.double()), by_torch(given), function(given)
        for what, name in enumerate(("updates", "products")):
            truth = [result[what] for result in truths]
            allowed = TOLERANCE * relative_error([result[what] for result in models_], truth)
            error = relative_error([result[what] for result in founds], truth)
            if error > allowed:
                return f"{name} off by {error:.2g}, {allowed:.2g} allowed"
        return ""

    def prepare(self, function: Function, options: Options) -> Prepared:
        """Gives an implementation layers of its own."""
        given = layers(self.form, self._shapes(options), self._samples(options), options.device)
        call = functools.partial(function, given)
        call()
        return Prepared(call, ceilings=[gemm(options)])


def _case(name: str, work: str, shapes: Callable[[], list[models.Shape]], form: str = "plain") -> ApplyCase:
    return ApplyCase("kron_apply", name, work, baseline=BASELINE, form=form, shapes=shapes)


CASES: list[Case] = [
    _case("curves", "CURVES", models.curves),
    _case("mnist", "MNIST", models.mnist),
    _case("faces", "FACES", models.faces),
    _case("resnet20", "ResNet-20", models.resnet20),
    _case("transformer", "12 transformer layers", models.transformer),
    _case(f"mnist-{SAMPLES}-samples", f"MNIST, {SAMPLES} samples", models.mnist, "samples"),
    _case("mnist-stein", "MNIST, Stein equations", models.mnist, "stein"),
]
