"""The CUDA kernels compiled at run time by NVRTC, through CuPy, for a GPU that `_C` has no machine code for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# As for nvcc (csrc/CMakeLists.txt): no contraction, so that back ends agree bit for bit; division and square root are
# IEEE, and subnormals kept, by default. NVRTC takes generic lambdas inside a kernel for host functions, but for
# -default-device.
OPTIONS = ("--std=c++17", "--fmad=false", "-default-device", "--generate-line-info")

# Bytes of shared memory that a block has without asking.
_SHARED_BYTES = 48 << 10


class Compiled(NamedTuple):
    """Machine code of one kernel."""

    symbol: str
    cubin: bytes


class _Stream(NamedTuple):
    """All that CuPy's launch reads of a stream."""

    ptr: int


def unusable() -> str | None:
    """Why kernels cannot be compiled and run on the current GPU; None when they can. Compiles and launches nothing."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install 'fastcurv[cupy]'"
    try:
        version = nvrtc.getVersion()
    except Exception as error:  # CuPy has raised several types here
        return f"CuPy cannot load NVRTC ({error}): pip install 'nvidia-cuda-nvrtc>=13,<14'"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if (architecture := _architecture(torch.cuda.current_device())) not in nvrtc.getSupportedArchs():
        return f"NVRTC {'.'.join(map(str, version))} does not know sm_{architecture}; install a newer nvidia-cuda-nvrtc"
    return None


@functools.cache
def compile(name: str, architecture: int) -> Compiled:
    """Compiles one kernel; needs no GPU.

    Args:
        name: Name expression of the instance, such as the first item of a launch that `_C.adam_kernel` returns. By the
            law of one name, `fastcurv::..._kernel<fastcurv::<Op>Rule<...>>` and `fastcurv::<op>_kernel<...>` are in
            `<op>.cuh`.
        architecture: Compute capability: 90 for 9.0.

    Returns:
        Mangled name and machine code.

    Raises:
        ValueError: If `name` is not of that form.
        RuntimeError: If NVRTC reports an error, with its log.
    """
    from cupy.cuda import nvrtc

    from fastcurv import _C

    found = re.match(r"fastcurv::(\w+)_kernel<(?:fastcurv::(\w+)Rule<)?", name)
    if found is None:
        raise ValueError(f"name: expected fastcurv::..._kernel<fastcurv::<Op>Rule<...>> or another, got {name!r}")
    header = (found[2] or found[1]).lower()
    sources = _C.cuda_sources()
    texts = [text.encode() for text in sources.values()]
    includes = [file.encode() for file in sources]
    program = nvrtc.createProgram(f'#include "{header}.cuh"\n', "fastcurv.cu", texts, includes)
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{architecture}", *OPTIONS))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"NVRTC cannot compile {name} for sm_{architecture} ({error}):\n{log}") from None
        # CuPy takes the last byte for the end of a string and cuts it off. It is zero, but belongs to the last header.
        return Compiled(nvrtc.getLoweredName(program, name), nvrtc.getCUBIN(program) + b"\0")
    finally:
        nvrtc.destroyProgram(program)


def implementation(op: str) -> Callable[..., None]:
    """A function with the arguments of the op in `fastcurv._C` that launches the kernels on torch's current stream.

    The first call for a dtype on a device compiles what it launches, about half a second a kernel.

    Args:
        op: Name of the op, such as `adam`.
    """
    import numpy as np

    from fastcurv import _C

    plan = getattr(_C, f"{op.rstrip('_')}_kernel")

    def launch(first: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        device = first[0].get_device()
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
            for name, busy, threads, blocks_per_multiprocessor, shared, argument in plan(first, *args, **kwargs):
                blocks = max(1, min(busy, multiprocessors * blocks_per_multiprocessor))
                # CuPy passes an array of one element by the bytes it holds: the kernel's argument, whatever its type.
                packed = np.frombuffer(argument, dtype=np.dtype((np.void, len(argument))))
                kernel = _function(device, name)
                if shared > _SHARED_BYTES:
                    _allow_shared(kernel, shared)
                kernel((blocks,), (threads,), (packed,), shared_mem=shared, stream=stream)

    return launch


def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _function(device: int, name: str) -> Any:
    """The kernel, loaded into the context of a device, which must be the current one."""
    from cupy.cuda import function

    compiled = compile(name, _architecture(device))
    module = function.Module()
    module.load(compiled.cubin)
    return module.get_function(compiled.symbol)


def _allow_shared(kernel: Any, shared: int) -> None:
    """Lets a kernel be launched with so much dynamic shared memory."""
    from cupy_backends.cuda.api import driver

    driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
