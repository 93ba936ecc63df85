"""Prints a digest of what every op, dtype, back end and optimizer computes from fixed inputs.

Run it before and after a change that should leave results alone, and compare: `python tests/digests.py > before.txt`.
Bits may differ between processors and versions of torch, so both runs belong on one machine.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import cases
import layers
import roots
import torch
from cases import CPU, DTYPES, OPTIONS, make_case, options_of
from torch import Tensor

import fastcurv
from fastcurv import _backend, ops
from fastcurv.ops.newton_schulz import COEFFICIENTS

MATRIX_SHAPES = [(1, 1), (3, 1), (5, 5), (17, 40), (40, 17), (4, 3, 3, 3)]
LARGE_SHAPES = [(130, 150), (300, 200)]
FACTOR_SIZES, LARGE_SIZES = [1, 2, 5, 17, 33], [65, 130]


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors, in the order of their elements."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def updates() -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """Every op over lists of tensors."""
    for op in _backend.OPS:
        for dtype, option, backend in itertools.product(DTYPES, OPTIONS[op], ["reference", *cases.backends(op, CPU)]):
            case = make_case(op, cases.SMALL_SHAPES, dtype, device=CPU, **options_of(op, option, CPU))
            run = functools.partial(cases.run, case, backend)
            yield f"{op} {option} {dtype} {backend}", lambda run=run: itertools.chain(*run().outputs.values())


def matrices(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Ordinary ones, and of each shape one with dead and equal rows."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    poor = [matrix.clone() for matrix in found]
    for matrix in poor:
        matrix[::3], matrix[1::4] = 0, matrix[-1].clone()
    return [matrix.to(dtype) for matrix in found + poor]


def orthogonal() -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """Every method of `orthogonalize`, and the CUDA kernels."""
    methods = {
        "polar": {},
        "polar complete": {"method": "polar", "rank_policy": "complete"},
        "gram_schmidt": {"method": "gram_schmidt"},
        **{f"newton_schulz {name}": {"method": "newton_schulz", "coefficients": name} for name in COEFFICIENTS},
        "newton_schulz eps": {"method": "newton_schulz", "eps": 1e-7},
    }
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for (name, options), dtype, backend in itertools.product(methods.items(), dtypes, ["reference", "cpp", "triton"]):
        given = matrices(MATRIX_SHAPES + (LARGE_SHAPES if backend != "triton" else []), dtype)

        def run(options=options, given=given, backend=backend):
            info = torch.zeros(len(given), dtype=torch.int32, device=CPU)
            return [*ops.orthogonalize(given, **options, info=info, backend=backend), info]

        yield f"orthogonalize {name} {dtype} {backend}", run
    if _backend.native() is None:
        return
    from cuda_host import emulator

    keywords: dict[str, dict[str, Any]] = {
        "gram_schmidt": {"floor": 0.0},
        "newton_schulz": {"coefficients": COEFFICIENTS["muon"] * 5, "dtype": torch.float32, "spectral": 0, "eps": 0.0},
    }
    for (op, options), dtype in itertools.product(keywords.items(), dtypes[:2]):
        given = matrices([shape for shape in MATRIX_SHAPES if len(shape) == 2], dtype)

        def run_kernel(op=op, options=options, given=given):
            outs, info = [torch.empty_like(m) for m in given], torch.zeros(len(given), dtype=torch.int32, device=CPU)
            emulator.emulated(op)(given, outs, info, **options)
            return [*outs, info]

        yield f"{op} {dtype} emulator", run_kernel


def definite(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Definite matrices, and one of each size that needs jitter."""
    generator = torch.Generator().manual_seed(1)
    found = [layers.definite(n, generator) for n in sizes]
    poor = [matrix - torch.linalg.eigvalsh(matrix)[0] * torch.eye(len(matrix)) for matrix in found]
    return [matrix.to(dtype) for matrix in found + poor]


def kronecker() -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """Every op on Kronecker factors, by every method."""
    for dtype, backend in itertools.product((torch.float32, torch.float64), roots.BACKENDS):
        sizes = FACTOR_SIZES[:4] if backend == "triton" else FACTOR_SIZES
        given = definite(sizes + (LARGE_SIZES if backend in ("cpp", "reference") else []), dtype)
        for p in roots.POWERS:
            run = functools.partial(roots.kron_root, given, 1e-3, p, backend=backend)
            yield f"kron_root {p} {dtype} {backend}", lambda run=run: _flat(run())
        for method in ("newton", "eigh"):
            run = functools.partial(roots.kron_inverse, given, 1e-3, method=method, backend=backend)
            if not (method == "eigh" and backend in ("emulator", "products")):
                yield f"kron_inverse {method} {dtype} {backend}", lambda run=run: _flat(run())
        if backend in ("cpp", "reference"):
            run = functools.partial(ops.kron_inverse, given, 1e-3, backend=backend)
            yield f"kron_inverse {dtype} {backend}", lambda run=run: _flat(run())
        if backend == "emulator":
            from cuda_host import emulator

            def by_kernel(given=given):
                inverses, info = (
                    [torch.empty_like(m) for m in given],
                    torch.ones(len(given), dtype=torch.int32, device=CPU),
                )
                damping = torch.full((len(given),), 1e-3, dtype=torch.float64, device=CPU)
                emulator.emulated("kron_inverse")(given, inverses, [], info, damping)
                return [*inverses, info]

            yield f"kron_inverse {dtype} emulator", by_kernel
    for dtype in (torch.float32, torch.float64):
        given = definite(FACTOR_SIZES + LARGE_SIZES, dtype)
        yield f"kron_eigh {dtype} torch", lambda given=given: _flat(ops.kron_eigh(given))
    for form, dtype, backend in itertools.product(layers.FORMS, (torch.float32, torch.float64), layers.BACKENDS):
        problem = layers.Problem(form, [(1, 1), (5, 3), (17, 33)], torch.Generator().manual_seed(1), dtype)
        run = functools.partial(problem.run, backend=backend)
        yield f"kron_apply {form} {dtype} {backend}", lambda run=run: _flat(run())
    for dtype, backend in itertools.product(DTYPES, ("reference", "cpp", "triton")):
        generator, kept = torch.Generator().manual_seed(1), torch.float64 if dtype == "float64" else torch.float32
        shapes = ((1, 1), (7, 5), (100, 33), (2, 3, 6, 5))
        *xs, images = (torch.randn(shape, generator=generator).to(DTYPES[dtype][0]) for shape in shapes)

        def factor(xs=xs, images=images, kept=kept, backend=backend):
            *factors, seen = (torch.eye(d, dtype=kept, device=CPU) for d in (2, 6, 34, 27))
            traces, info = ops.kron_factor_(factors, xs, 0.5, has_ones=True, backend=backend)
            ops.kron_factor_([seen], [images], 0.5, patches=[ops.Patches(3, padding=1)], backend=backend)
            return [*factors, traces, info, seen]

        yield f"kron_factor {dtype} {backend}", factor


def optimizers(
    backends: Iterable[str | None] = ("cpp", "reference"),
) -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """Parameters and state after seven steps of every optimizer."""
    classes: dict[str, Callable[..., Any]] = {
        name: getattr(fastcurv, name)
        for name in ("LAMB", "LARS", "OSGD", "SGD", "Adam", "AdamW", "Muon", "NAdam", "Nero", "RAdam", "Ranger", "Yogi")
    }
    classes["Lookahead"] = lambda params, **how: fastcurv.Lookahead(fastcurv.AdamW(params, **how), **how)
    classes["Orthogonal"] = lambda params, **how: fastcurv.Orthogonal(fastcurv.SGD(params, **how), **how)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for (name, make), dtype, backend in itertools.product(classes.items(), dtypes, backends):
        generator, shapes = torch.Generator().manual_seed(1), [(6, 5), (5,), (4, 3, 3, 3), ()]
        weights, *grads = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(8))

        def run(make=make, weights=weights, grads=grads, backend=backend):
            params = [torch.nn.Parameter(weight.clone()) for weight in weights]
            optimizer = make(params, backend=backend)
            for step in grads:
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad.clone()
                optimizer.step()
            states = [optimizer.state[param] for param in params]
            return [*params, *(state[key] for state in states for key in sorted(state) if torch.is_tensor(state[key]))]

        yield f"{name} {dtype} {backend}", run


def _flat(results: Iterable[Any]) -> list[Tensor]:
    return [tensor for item in results for tensor in ([item] if isinstance(item, Tensor) else item)]


def calls() -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """Names of calls, and the calls, which may be repeated."""
    return itertools.chain(updates(), orthogonal(), kronecker(), optimizers())


def chosen(*backends: str) -> Iterator[tuple[str, Callable[[], Iterable[Tensor]]]]:
    """The calls of some back ends, one back end after the other."""
    for backend in backends:
        yield from ((name, call) for name, call in calls() if name.endswith(f" {backend}"))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, call in calls():
        print(name, digest(call()), flush=True)


if __name__ == "__main__":
    main()
