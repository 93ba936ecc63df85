"""Runs one instance of a kernel a few times and checks what it did: what compute-sanitizer and ncu are given to watch.

`python -m fastcurv.bench.exercise adam/float32/float32/amsgrad --device cuda [--elements N]`
`python -m fastcurv.bench.exercise newton_schulz/float32/polar --device cuda`
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fastcurv
from fastcurv import _check
from fastcurv.cli import program
from fastcurv.ops import Patches, kron_apply, kron_factor_, kron_inverse, kron_root

from .models import Shape

# RAdam rectifies from the sixth step on.
STEPS, LR = 7, 0.1
# Empty, one element, a vector and a bit, an exact number of vectors, more than one chunk of the chunk table; rows that
# are short, not aligned, and longer than a chunk; a convolution.
SHAPES: tuple[Shape, ...] = ((0,), (1,), (17,), (1024,), (40_003,), (3, 5), (7, 130), (2, 40_003), (4, 3, 3, 3))
ROW = 10_000
# Wide, tall and square; one row; more than a launch takes; what is too large for a kernel of one block.
MATRICES: tuple[Shape, ...] = ((16, 27), (64, 3, 3, 3), (10, 64), (5, 5), (1, 9), (64, 576), *[(7, 9)] * 64, (70, 90))

# Draws a tensor of some shape on the CPU.
Draw = Callable[..., Tensor]
WIDE = (torch.float32, torch.float64)

_Adam, _Ranger = fastcurv.Adam, functools.partial(fastcurv.Ranger, k=2, weight_decay=0.01)


def _lookahead(params: list[Parameter], lr: float, backend: str) -> Optimizer:
    return fastcurv.Lookahead(torch.optim.SGD(params, lr=lr, foreach=False), k=2, backend=backend)


# By op and variant: the optimizer, and whether it has state of the dtype of moments.
VARIANTS: dict[str, dict[str, tuple[Callable[..., Optimizer], bool]]] = {
    "adam": {
        "adam": (functools.partial(_Adam, weight_decay=0.01), True),
        "amsgrad": (functools.partial(_Adam, weight_decay=0.01, amsgrad=True), True),
        "radam": (fastcurv.RAdam, True),
        "nadam": (fastcurv.NAdam, True),
        "yogi": (fastcurv.Yogi, True),
    },
    "lamb": {"lamb": (fastcurv.LAMB, True)},
    "lars": {"lars": (functools.partial(fastcurv.LARS, trust_coefficient=1.0), True)},
    "lookahead": {"lookahead": (_lookahead, False)},
    "nero": {"nero": (fastcurv.Nero, False)},
    "ranger": {"ranger": (_Ranger, True), "plain": (functools.partial(_Ranger, use_gc=False), True)},
    "sgd": {"momentum": (functools.partial(fastcurv.SGD, momentum=0.9), True), "plain": (fastcurv.SGD, False)},
}


# The same of the ops on matrices: options of `fastcurv.ops.orthogonalize`.
MATRIX_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gram_schmidt": {"rows": {"method": "gram_schmidt"}},
    "newton_schulz": {"steps": {"method": "newton_schulz"}, "polar": {"method": "polar"}},
}


# Rows of Kronecker factors: one, odd numbers, a tile and a bit, beyond shared memory; more than a launch takes.
FACTORS = (1, 6, 17, 64, 65, 130, 340, *[9] * 64)


def _kron_inverse(draw: Draw, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    factors = [_factor(draw, n).to(device, dtype) for n in FACTORS]
    return kron_inverse(factors, 0.5, backend=backend)[0]


def _kron_root(draw: Draw, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    factors = [_factor(draw, n).to(device, dtype) for n in FACTORS if n <= 130]
    return kron_root(factors, 0.5, p=4, backend=backend)[0]


def _kron_factor(draw: Draw, samples: torch.dtype, device: str, backend: str, **options: Any) -> list[Tensor]:
    shapes = [(5, 3, 9, 11), (64, 4, 16, 16)] if "patches" in options else [(700, n) for n in FACTORS[:7]]
    inputs = [draw(*shape).to(device, samples) for shape in shapes]
    sizes = [9 * shape[1] if "patches" in options else shape[1] for shape in shapes]
    wide = torch.float64 if samples == torch.float64 else torch.float32
    factors = [torch.eye(n + 1, dtype=wide, device=device) for n in sizes]
    if "patches" in options:
        options["patches"] = options["patches"] * len(shapes)
    kron_factor_(factors, inputs, 0.5, has_ones=True, backend=backend, **options)
    return factors


def _kron_apply(draw: Draw, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    shapes = [(6, 17), (65, 130), (1, 5), (128, 64)]
    grads = [draw(*shape).to(device, dtype) for shape in shapes]
    lefts, rights = ([_factor(draw, shape[k]).to(device, dtype) for shape in shapes] for k in range(2))
    updates, products, _ = kron_apply(grads, lefts, rights, backend=backend)
    return [*updates, products]


# The same of the ops on Kronecker factors: what they make of numbers that are drawn.
KRON_VARIANTS: dict[str, dict[str, Callable[[Draw, torch.dtype, str, str], list[Tensor]]]] = {
    "kron_apply": {"plain": _kron_apply},
    "kron_factor": {
        "samples": _kron_factor,
        "in_double": functools.partial(_kron_factor, dtype=torch.float64),
        "patches": functools.partial(_kron_factor, patches=[Patches(3, 2, 1)]),
    },
    "kron_inverse": {"cholesky": _kron_inverse},
    "kron_root": {"newton": _kron_root},
}


def instances() -> list[str]:
    """Every instance of every kernel, as op/parameter dtype/state dtype/variant, or op/dtype/variant."""
    of_matrices: dict[str, Iterable[str]] = {**MATRIX_VARIANTS, **KRON_VARIANTS}
    return [
        f"{op}/{_name(dtype)}/{variant}"
        for op, variants in of_matrices.items()
        for dtype in (_check.STATE_DTYPES if op in MATRIX_VARIANTS or op == "kron_factor" else WIDE)
        for variant in variants
    ] + [
        f"{op}/{_name(param)}/{_name(state)}/{variant}"
        for op, variants in VARIANTS.items()
        for param, states in _check.STATE_DTYPES.items()
        for variant, (_, has_state) in variants.items()
        for state in (states if has_state else states[:1])
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _params(shapes: Sequence[Shape], dtype: torch.dtype, device: str) -> list[Parameter]:
    """Parameters of given shapes with gradients; every second one starts an element after an aligned address."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Shape, offset: int) -> torch.Tensor:
        base = torch.randn(math.prod(shape) + offset, generator=generator).to(device, dtype)
        return base[offset:].view(shape)

    params = []
    for k, shape in enumerate(shapes):
        params.append(Parameter(draw(shape, k % 2)))
        params[-1].grad = draw(shape, k % 2)
    return params


def exercise(instance: str, device: str, shapes: Sequence[Shape], backend: str) -> str:
    """Takes a few steps on a device and compares them with those of the reference on the CPU.

    Args:
        instance: One of `instances()`.
        device: Where to run.
        shapes: Of the tensors.
        backend: Which to run.

    Returns:
        What is wrong, or an empty string.
    """
    op, param, *state_dtypes, variant = instance.split("/")
    if op in MATRIX_VARIANTS:
        return _exercise_matrices(MATRIX_VARIANTS[op][variant], getattr(torch, param), device, backend)
    if op in KRON_VARIANTS:
        return _exercise_factors(KRON_VARIANTS[op][variant], getattr(torch, param), device, backend)
    (state,) = state_dtypes
    make, _ = VARIANTS[op][variant]
    dtype, state_dtype = getattr(torch, param), getattr(torch, state)
    # Only a choice that is not the default has to be made.
    options: dict[str, Any] = {}
    if state_dtype != _check.STATE_DTYPES[dtype][0]:
        options["state_dtype"] = state_dtype
        if "exp_avg_sqs" in getattr(fastcurv.ops, f"{op}_").lists:
            options["betas"] = (0.9, 0.95)  # averages that move in bfloat16
    found, expected = _params(shapes, dtype, device), _params(shapes, dtype, "cpu")
    watched = make(found, lr=LR, backend=backend, **options)
    checked = make(expected, lr=LR, backend="reference", **options)
    for _ in range(STEPS):
        watched.step()
        checked.step()
    # The moments are rounded once a step and the parameters too; each may be off by an ulp at a step.
    ulps = 2 * STEPS * max(torch.finfo(dtype).eps, torch.finfo(state_dtype).eps)
    has_sums = getattr(fastcurv.ops, f"{op}_")._rows is not None
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        # Two orders of summation of n numbers differ by about sqrt(n) ulp, of which the learning rate is taken.
        allowed = ulps * (1 + LR * math.sqrt(a.numel()) if has_sums else 1)
        x, y = a.detach().cpu().double(), b.detach().double()
        error = float(((x - y).abs() / y.abs().clamp(min=1)).max()) if a.numel() else 0.0
        if not error <= allowed:
            return f"params[{k}] is off by {error:.2g}, {allowed:.2g} allowed"
        if float(watched.state[a].get("step", STEPS)) != STEPS:
            return f"the step count of params[{k}] was not advanced"
    return ""


def _exercise_matrices(options: dict[str, Any], dtype: torch.dtype, device: str, backend: str) -> str:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in MATRICES]
    found = fastcurv.ops.orthogonalize([matrix.to(device) for matrix in matrices], backend=backend, **options)
    expected = fastcurv.ops.orthogonalize(matrices, backend="reference", **options)
    # Of two ways in float32 each loses what the condition number of a random matrix takes, some hundreds at the most.
    allowed = max(torch.finfo(dtype).eps, 1e-4 if dtype != torch.float64 else 1e-10)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a.cpu().double() - b.double()).abs().max())
        if not error <= allowed:
            return f"matrices[{k}] is off by {error:.2g}, {allowed:.2g} allowed"
    return ""


def _factor(draw: Draw, n: int) -> Tensor:
    """A definite matrix, which is well conditioned with some damping."""
    x = draw(2 * n, n).double()
    return x.mT @ x / (2 * n)


def _exercise_factors(
    run: Callable[[Draw, torch.dtype, str, str], list[Tensor]], dtype: torch.dtype, device: str, backend: str
) -> str:
    def draw() -> Draw:
        return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))

    found, expected = run(draw(), dtype, device, backend), run(draw(), dtype, "cpu", "reference")
    # Two orders of summation of hundreds of numbers, and condition numbers below ten.
    allowed = 1e-4 if dtype != torch.float64 else 1e-12
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a.cpu().double() - b.double()).norm() / b.double().norm())
        if not error <= allowed:
            return f"result {k} is off by {error:.2g}, {allowed:.2g} allowed"
    return ""


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        1 if the kernel was wrong, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.exercise", description=__doc__)
    parser.add_argument("instance", choices=instances())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, help=f"a matrix of about this many in rows of {ROW} instead")
    options = parser.parse_args(argv)
    shapes = [(options.elements // ROW, ROW)] if options.elements else SHAPES
    backend = "cuda" if options.device == "cuda" else "cpp"
    wrong = exercise(options.instance, options.device, shapes, backend)
    print(f"{options.instance}: {wrong or 'right'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
