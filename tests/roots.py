"""Inverse roots on every back end, and on what stands for one: shared by the tests of `kron_root` and of methods."""

import sys

import pytest
from cases import DEVICE

from fastcurv import _backend, ops

module = sys.modules["fastcurv.ops.kron_root"]
IS_CPU = DEVICE.type == "cpu"
HAS_NATIVE = _backend.native() is not None
BACKENDS = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable("kron_root", name, DEVICE)]
# The CUDA kernel in the host emulator, and what a GPU does with matrices that are too large for it.
BACKENDS += ["reference", *(["emulator"] if HAS_NATIVE and IS_CPU else []), *(["products"] if IS_CPU else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Rows that a back end takes, in a time that tests have.
MOST = {"emulator": 64} | ({"triton": 40} if IS_CPU else {})
# A product takes Triton's interpreter milliseconds: it has fewer sizes.
SLOW = ["triton"] if IS_CPU else []
# Around blocks of 16 rows, and around strips of 16 and 32.
SIZES = [1, 2, 5, 15, 16, 17, 33, 40, 64, 65, 130]
POWERS = [1, 2, 3, 4, 8]


def sizes(*all_sizes):
    """Each back end with each size that it takes."""
    pairs = [(name, n) for name in BACKENDS for n in all_sizes if n <= MOST.get(name, n)]
    pairs = [(name, n) for name, n in pairs if name not in SLOW or n in (1, 3, 17)]
    return pytest.mark.parametrize("backend, n", pairs)


def on(backend, op, *args, order="ascending", **options):
    """An op, on a back end or what stands for one."""
    if backend not in ("emulator", "products"):
        return op(*args, backend=backend, **options)
    with pytest.MonkeyPatch.context() as patch:
        if backend == "emulator":
            from cuda_host import emulator

            run = emulator.emulated("kron_root", order=order, seed=1)
        else:
            patch.setattr(module, "SMALL", 0)
            _, run = _backend.choose("kron_root", DEVICE, "reference")  # for empty ones
        patch.setattr(_backend, "choose", lambda *_: ("cuda" if backend == "products" else backend, run))
        return op(*args, **options)


def kron_root(factors, damping=0.0, p=4, *, backend=None, **options):
    return on(backend, ops.kron_root, factors, damping, p, **options)


def kron_inverse(factors, damping=0.0, *, backend=None, **options):
    return on(backend, ops.kron_inverse, factors, damping, **options)
