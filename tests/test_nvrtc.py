"""The device code under NVRTC: it compiles without a single CUDA header, and is launched as planned."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CPU, DTYPES, make_case, op_of

from fastcurv import _C, _nvrtc

ARCHITECTURES = (80, 90, 100, 120)


def nvrtc_missing():
    reason = _nvrtc.unusable() or ""
    return reason if "CuPy" in reason else ""


needs_nvrtc = pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing())


def call(dtype="float32", amsgrad=False, shapes=((3,), (5,))):
    """Positional and keyword arguments of `_C.adam_`, on the CPU."""
    case = make_case("adam", shapes, dtype, device=CPU, rule="amsgrad" if amsgrad else "adam")
    space = op_of("adam").workspace()
    space.prepare(case.arguments)
    return [*case.arguments, space.table(2048, CPU)], case.options_in_full


def kernel_name(dtype, amsgrad):
    args, kwargs = call(dtype, amsgrad)
    return _C.adam_kernel(*args, **kwargs)[0]


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_to_machine_code(dtype, amsgrad, architecture):
    compiled = _nvrtc.compile(kernel_name(dtype, amsgrad), architecture)
    assert compiled.cubin.startswith(b"\x7fELF")
    headers, size, count = struct.unpack_from("Q14xHH", compiled.cubin, 32)  # e_phoff, e_phentsize, e_phnum
    assert headers + size * count == len(compiled.cubin)  # complete, to the last byte
    assert compiled.symbol.startswith("_ZN8fastcurv11adam_kernel")
    assert compiled.symbol.encode() in compiled.cubin


def test_sources_are_complete_and_those_of_the_tree():
    sources = _C.cuda_sources()
    csrc = Path(__file__).parents[1] / "csrc"
    for name, text in sources.items():
        (file,) = csrc.rglob(name)
        assert text == file.read_text(), f"{name} has changed since fastcurv._C was built"
    included = {name for text in sources.values() for name in re.findall(r'#include\s+["<]([^">]+)[">]', text)}
    assert "adam.cuh" in sources and included <= set(sources)


@needs_nvrtc
@pytest.mark.compile
def test_errors_show_the_log():
    with pytest.raises(RuntimeError, match=r"no_such_type"):
        _nvrtc.compile("fastcurv::adam_kernel<no_such_type, float, fastcurv::SecondMoment::adam>", 90)
    with pytest.raises(ValueError, match=r"expected fastcurv::<op>_kernel"):
        _nvrtc.compile("adam", 90)


def test_says_what_is_missing(monkeypatch):
    if not torch.cuda.is_available() and not nvrtc_missing():
        assert _nvrtc.unusable() == "torch.cuda.is_available() is False"
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "pip install 'fastcurv[cupy]'" in _nvrtc.unusable()


def test_import_needs_no_cupy():
    code = "import sys; sys.modules['cupy'] = None; from fastcurv import _nvrtc; assert 'cupy' in _nvrtc.unusable()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("elements", "blocks"), [(0, 1), (2048 * 3 - 1, 3), (2048 * 5000, 7 * 3)])
def test_launches_as_planned(elements, blocks, monkeypatch):
    """The launch itself, with a GPU that only writes down what it is asked to do."""
    args, kwargs = call(shapes=[(elements,)])
    plan = _C.adam_kernel(*args, **kwargs)
    launched = []

    def function(device, name):
        assert (device, name) == (-1, plan[0])  # get_device() of a CPU tensor
        return lambda *launch, stream: launched.append((*launch, stream))

    class Properties:
        multi_processor_count = 7

    class Stream:
        cuda_stream = 1234

    monkeypatch.setattr(_nvrtc, "_function", function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    _nvrtc.implementation("adam")(*args, **kwargs)
    ((grid, block, (packed,), stream),) = launched
    assert (grid, block, stream.ptr) == ((blocks,), (256,), 1234)
    assert packed.size == 1 and packed.tobytes() == plan[4]


@needs_nvrtc
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_adam runs the launch itself")
def test_cupy_takes_our_argument_and_stream():
    """Without a driver CuPy gets as far as asking for one: it has read the stream and taken the argument's address."""
    from cupy.cuda import function, runtime

    launch = function.Function.__new__(function.Function)
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInsufficientDriver"):
        launch((1,), (32,), (np.frombuffer(bytes(152), dtype=np.dtype((np.void, 152))),), stream=_nvrtc._Stream(0))
    with pytest.raises(TypeError):
        launch((1,), (32,), (bytes(152),), stream=_nvrtc._Stream(0))
