"""Compiles the CUDA kernels with the host compiler, and launches them on CPU tensors as a GPU would be asked to."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcurv import _C

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ORDERS = ("ascending", "descending", "random")  # the values of cuda_host::Order

# The arithmetic flags are those of the C++ back end, whose bits the kernels must reproduce. Fortified longjmp refuses to
# switch stacks; tensors are seen as int64 here and as float there, so no aliasing rules.
FLAGS = [
    "-O1",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing",
    "-fsanitize=alignment,null",
]


@functools.cache
def library(source: str) -> ctypes.PyDLL:
    """Compiles a list of kernels, unless that has been done for the same text, and loads it.

    Args:
        source: File name in this directory. It defines `cuda_host::kernels`.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("the host emulator needs a C++ compiler: set CXX, or install g++")
    texts = [HERE / source, *sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc").rglob("*.h"))]
    texts += sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    flags = [*FLAGS, f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    key = hashlib.sha256(b"\0".join([compiler.encode(), *map(str.encode, flags), *(t.read_bytes() for t in texts)]))
    built = ROOT / "build" / "cuda_host" / f"{Path(source).stem}-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is complete: another test process may be doing the same.
        with tempfile.TemporaryDirectory(dir=built.parent) as directory:
            compiled, partial = Path(directory) / "kernels.o", Path(directory) / built.name
            subprocess.run([compiler, *flags, "-c", str(HERE / source), "-o", str(compiled)], check=True)
            # On its own: with -fsanitize the linker would ask for the sanitizer's library.
            subprocess.run([compiler, "-shared", str(compiled), "-o", str(partial)], check=True)
            partial.replace(built)
    loaded = ctypes.PyDLL(str(built))  # keeps the GIL: the emulator has one state for all
    loaded.cuda_host_launch.restype = ctypes.c_char_p
    loaded.cuda_host_launch.argtypes = [
        ctypes.c_char_p,
        *[ctypes.c_int] * 3,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    return loaded


def run(
    name: str,
    blocks: int,
    threads: int,
    args: bytes,
    *,
    shared: int = 0,
    order: str = "ascending",
    seed: int = 0,
    source: str = "kernels.cpp",
) -> None:
    """Runs a kernel to its end.

    Args:
        name: Name expression, as it is listed in `source`.
        blocks: Grid size.
        threads: Block size.
        args: The bytes of the kernel's one argument.
        shared: Bytes of dynamic shared memory.
        order: In which the threads of a block take turns, and the blocks follow each other: one of `ORDERS`.
        seed: Of the random order.
        source: The list of kernels.

    Raises:
        RuntimeError: If threads wait for each other for ever, or there is no such kernel.
    """
    launch = library(source).cuda_host_launch
    error = launch(name.encode(), blocks, threads, shared, args, len(args), ORDERS.index(order), seed)
    if error is not None:
        raise RuntimeError(error.decode())


Launch = tuple[str, int, int, int, int, bytes]


def launch(plan: list[Launch], *, blocks: int | None = None, order: str = "ascending", seed: int = 0) -> None:
    """Runs what a `fastcurv._C.<op>_kernel` has planned.

    Args:
        plan: For each kernel, in order: name, blocks that have something to do, threads, blocks per multiprocessor,
            bytes of dynamic shared memory, bytes of the argument.
        blocks: Grid size; by default that of a GPU with two multiprocessors.
        order: See `run`.
        seed: See `run`.
    """
    for name, busy, threads, blocks_per_multiprocessor, shared, args in plan:
        grid = max(1, min(busy, 2 * blocks_per_multiprocessor)) if blocks is None else blocks
        run(name, grid, threads, args, shared=shared, order=order, seed=seed)


def emulated(op: str, *, blocks: int | None = None, order: str = "ascending", seed: int = 0) -> Callable[..., None]:
    """A function with the signature of the op in `fastcurv._C` that runs its CUDA kernels in the emulator.

    Args:
        op: Name of the op, such as `adam`.
        blocks: See `launch`.
        order: See `run`.
        seed: See `run`.
    """
    plan = getattr(_C, f"{op}_kernel")

    def implementation(*args: object, **kwargs: object) -> None:
        launch(plan(*args, **kwargs), blocks=blocks, order=order, seed=seed)

    return implementation
