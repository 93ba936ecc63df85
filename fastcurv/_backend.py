"""The one table that decides which implementation of an op runs, and says why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

# In place, over lists of tensors; on each matrix of a list; and on Kronecker factors.
OPS = ("adam", "lamb", "lars", "lookahead", "nero", "ranger", "sgd")
MATRIX_OPS = ("gram_schmidt", "newton_schulz", "polar")
KRON_OPS = ("kron_apply", "kron_factor", "kron_inverse", "kron_root")
# What works in place, and whose functions end in an underscore therefore.
IN_PLACE = (*OPS, "kron_factor")
BACKENDS = ("cuda", "triton", "cpp", "reference")  # best first

# What a back end has no kernel for.
WITHOUT = {("kron_inverse", "triton"): "has no Triton kernel: a factorisation is a chain of small panels"}

# Elements per chunk of the chunk table. cuda: small enough that a list of 1e8 elements gives every block a dozen chunks
# (not yet measured on a GPU). cpp splits by elements itself. triton: one program per chunk.
CHUNK_ELEMENTS = {"cuda": 16384, "triton": 8192, "cpp": 1 << 40}

# Returns whether it wrote lists that are written on some steps only, or None where that is not known.
Implementation = Callable[..., bool | None]


class Availability(NamedTuple):
    """One row of `fastcurv.backends()`."""

    op: str
    backend: str
    available: bool
    reason: str


@functools.cache
def _native_or_reason() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastcurv._C"), ""
    except ImportError as error:
        return None, f"the native extension fastcurv._C cannot be imported ({error}); build it with `pip install .`"


def native() -> Any:
    """The native extension `fastcurv._C`, or None where it was not built."""
    return _native_or_reason()[0]


def simd_fault() -> str:
    """The fault in FASTCURV_SIMD; empty without one, or without the native extension, which reads the variable."""
    try:
        if native() is not None:
            native().simd_level()
    except ValueError as error:
        return str(error)
    return ""


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cuda_unusable(device: torch.device) -> str:
    """Why the cuda back end cannot run on a device; empty when it can."""
    if device.type != "cuda":
        return f"needs tensors on an NVIDIA GPU, got {device}"
    if torch.version.cuda is None:
        return "this PyTorch is not a CUDA build"
    if native() is None:
        return _native_or_reason()[1]
    ahead = native().cuda_unusable(device.index or 0)
    if ahead is None:
        return ""
    from fastcurv import _nvrtc

    at_run_time = _nvrtc.unusable()
    return f"{ahead}, and NVRTC is no way out: {at_run_time}" if at_run_time else ""


def unusable(op: str, backend: str, device: torch.device) -> str:
    """Why a back end cannot run an op on a device; empty when it can. Launches nothing.

    Args:
        op: Name of the op.
        backend: One of `BACKENDS`.
        device: Where the tensors are.
    """
    if backend not in BACKENDS:
        return f"unknown; expected one of {', '.join(BACKENDS)}"
    if backend == "reference":
        return ""
    if (op, backend) in WITHOUT:
        return WITHOUT[op, backend]
    if backend == "cpp":
        if device.type != "cpu":
            return f"needs tensors on the CPU, got {device}"
        return _native_or_reason()[1] or simd_fault()
    if backend == "cuda":
        return _cuda_unusable(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'fastcurv[triton]'"
    if (given := os.environ.get("TRITON_INTERPRET")) not in (None, "", "0", "1"):
        return f"TRITON_INTERPRET={given!r}: expected 0 or 1"  # Triton takes other words too, our kernels do not
    if native() is None:
        return _native_or_reason()[1]
    if device.type == "cpu" and not interpreting():
        return "needs tensors on a GPU (on the CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
    return ""


@functools.cache
def _load(op: str, backend: str, device: torch.device) -> Implementation:
    if op == "polar" and backend in ("cuda", "triton"):
        op = "newton_schulz"  # with a schedule that resolves every singular value that counts: ops/polar.py
    name = f"{op}_" if op in IN_PLACE else op
    if backend in ("reference", "triton"):
        package = "fastcurv.reference" if backend == "reference" else "fastcurv.kernels"
        implementation = getattr(importlib.import_module(f"{package}.{op}"), name)
    elif backend == "cpp" or native().cuda_unusable(device.index or 0) is None:
        implementation = getattr(native(), name)
    else:
        from fastcurv import _nvrtc

        implementation = _nvrtc.implementation(op)
    return implementation


@functools.cache
def choose(op: str, device: torch.device, backend: str | None) -> tuple[str, Implementation]:
    """The back end that runs an op on a device, and its implementation.

    Args:
        op: Name of the op.
        device: Where the tensors are.
        backend: A back end by name, or None for the best that can run.

    Returns:
        Name and function.

    Raises:
        ValueError: If the named back end cannot run, with the reason, or if FASTCURV_SIMD is not understood.
    """
    if backend is not None:
        if reason := unusable(op, backend, device):
            raise ValueError(f"backend={backend!r} cannot run {op} on {device}: {reason}")
        return backend, _load(op, backend, device)
    if device.type == "cpu" and (fault := simd_fault()):
        raise ValueError(fault)  # a slip of the pen must not end in the slow reference
    reasons = {name: unusable(op, name, device) for name in BACKENDS}
    if interpreting():
        reasons["triton"] = "runs in its interpreter, which is for tests"
    best = next(name for name in BACKENDS if not reasons[name])
    if best == "reference":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        warnings.warn(f"fastcurv runs {op} on {device} by its slow pure-torch reference ({why})", stacklevel=3)
    return best, _load(op, best, device)


def backends() -> list[Availability]:
    """Which implementation of which op can run on this machine, and why not where it cannot. Launches nothing.

    Returns:
        A row (op, backend, available, reason) for each op and back end, best back end first.

    Example:
        >>> import fastcurv
        >>> all(row.available for row in fastcurv.backends() if row.backend == "reference")
        True
    """
    cpu = torch.device("cpu")
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    rows = []
    for op in OPS + MATRIX_OPS + KRON_OPS:
        for backend in BACKENDS:
            on_gpu = backend == "cuda" or (backend == "triton" and not interpreting())
            if on_gpu and gpu is None:
                reason = "torch.cuda.is_available() is False"
            else:
                reason = unusable(op, backend, gpu if on_gpu and gpu is not None else cpu)
            rows.append(Availability(op, backend, not reason, reason))
    return rows
