"""The device code under NVRTC: it compiles without a single CUDA header, and is launched as planned."""

import itertools
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcurv import _C, _nvrtc, ops

ARCHITECTURES = (80, 90, 100, 120)


def nvrtc_missing():
    reason = _nvrtc.unusable() or ""
    return reason if "CuPy" in reason else ""


needs_nvrtc = pytest.mark.skipif(bool(nvrtc_missing()), reason=nvrtc_missing())


PAIRS = [
    "float, float",
    "double, double",
    "fastcurv::bfloat16, float",
    "fastcurv::float16, float",
    "float, fastcurv::bfloat16",
]
VARIANTS = {"Adam": 5, "Lamb": 1, "Lars": 1, "Lookahead": 1, "Nero": 1, "Ranger": 1, "Sgd": 2}
WITH_SUMS = {"Lamb", "Lars", "Nero", "Ranger"}


def instances():
    """Every rule with every dtype, and every variant, for one architecture; one of each rule for the others."""
    for (rule, variants), pair, architecture in itertools.product(VARIANTS.items(), PAIRS, ARCHITECTURES):
        if architecture == 90 or pair == PAIRS[0]:
            for variant in range(variants if architecture == 90 and pair == PAIRS[0] else 1):
                yield f"fastcurv::{rule}Rule<{pair}, {variant}>", architecture


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize(("rule", "architecture"), list(instances()))
def test_compiles_to_machine_code(rule, architecture):
    for kernel in ("partials", "rows", "update") if re.search(r"(\w+)Rule", rule)[1] in WITH_SUMS else ("update",):
        compiled = _nvrtc.compile.__wrapped__(f"fastcurv::{kernel}_kernel<{rule}>", architecture)
        assert compiled.cubin.startswith(b"\x7fELF")
        headers, size, count = struct.unpack_from("Q14xHH", compiled.cubin, 32)  # e_phoff, e_phentsize, e_phnum
        assert headers + size * count == len(compiled.cubin)  # complete, to the last byte
        assert re.match(rf"_ZN8fastcurv\d+{kernel}_kernelI", compiled.symbol)
        assert compiled.symbol.encode() in compiled.cubin


@needs_nvrtc
@pytest.mark.compile
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [
    "newton_schulz_kernel<fastcurv::bfloat16>", "gram_schmidt_kernel<double>", "kron_apply_kernel<float>",
    "kron_factor_kernel<fastcurv::float16, float, false>", "kron_factor_kernel<double, double, true>",
    "kron_root_kernel<float>",
])  # fmt: skip
def test_kernels_on_matrices_compile_to_machine_code(kernel, architecture):
    compiled = _nvrtc.compile.__wrapped__(f"fastcurv::{kernel}", architecture)
    assert compiled.cubin.startswith(b"\x7fELF") and compiled.symbol.encode() in compiled.cubin


def ranger_call(shapes):
    """Positional and keyword arguments of `_C.ranger_`, on the CPU."""
    lists = [[torch.zeros(s) for s in shapes] for _ in range(5)] + [[torch.zeros(()) for _ in shapes]]
    keywords = {name: 0.5 for name in ops.ranger_.scalars} | {name: 1 for name in ops.ranger_.options}
    keywords |= {"grad_scale": None, "found_inf": None}
    space = ops.ranger_.workspace()
    space.prepare(lists)
    return [*lists, space.table(2048, torch.device("cpu"), 2)], keywords


def test_what_is_planned_has_the_names_that_are_compiled():
    args, kwargs = ranger_call([(3, 4), (2, 40000)])
    names = [launch[0] for launch in _C.ranger_kernel(*args, **kwargs)]
    rule = f"fastcurv::RangerRule<{PAIRS[0]}, 0>"
    assert names == [f"fastcurv::{kernel}_kernel<{rule}>" for kernel in ("partials", "rows", "update")]
    assert (rule, 90) in list(instances())


def test_sources_are_complete_and_those_of_the_tree():
    sources = _C.cuda_sources()
    csrc = Path(__file__).parents[1] / "csrc"
    for name, text in sources.items():
        (file,) = csrc.rglob(name)
        assert text == file.read_text(), f"{name} has changed since fastcurv._C was built"
    included = {name for text in sources.values() for name in re.findall(r'#include\s+["<]([^">]+)[">]', text)}
    assert {"adam.cuh", "schedule.h"} <= set(sources) and included <= set(sources)


@needs_nvrtc
@pytest.mark.compile
def test_errors_show_the_log():
    with pytest.raises(RuntimeError, match=r"no_such_type"):
        _nvrtc.compile("fastcurv::update_kernel<fastcurv::AdamRule<no_such_type, float, 0>>", 90)
    with pytest.raises(ValueError, match=r"expected fastcurv::\.\.\._kernel"):
        _nvrtc.compile("adam", 90)


def test_says_what_is_missing(monkeypatch):
    if not torch.cuda.is_available() and not nvrtc_missing():
        assert _nvrtc.unusable() == "torch.cuda.is_available() is False"
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "pip install 'fastcurv[cupy]'" in _nvrtc.unusable()


def test_import_needs_no_cupy():
    code = "import sys; sys.modules['cupy'] = None; from fastcurv import _nvrtc; assert 'cupy' in _nvrtc.unusable()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("shape", "busy"), [((0, 3), [0]), ((2048 * 3 - 1,), [3]), ((2048 * 5000,), [5000]), ((4, 40000), [10, 10, 79])]
)
def test_launches_as_planned(shape, busy, monkeypatch):
    """The launches themselves, with a GPU that only writes down what it is asked to do."""
    args, kwargs = ranger_call([shape])
    plan = _C.ranger_kernel(*args, **kwargs)
    assert [launch[1] for launch in plan] == busy
    launched = []

    def function(device, name):
        assert device == -1  # get_device() of a CPU tensor
        return lambda *launch, shared_mem, stream: launched.append((name, *launch, stream))

    class Properties:
        multi_processor_count = 7

    class Stream:
        cuda_stream = 1234

    monkeypatch.setattr(_nvrtc, "_function", function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    _nvrtc.implementation("ranger")(*args, **kwargs)
    for (name, blocks, *_, argument), (launched_name, *sizes, (packed,), stream) in zip(plan, launched, strict=True):
        assert launched_name == name
        assert (*sizes, stream.ptr) == ((min(max(blocks, 1), 7 * 3),), (256,), 1234)
        assert packed.size == 1 and packed.tobytes() == argument


def test_asks_for_shared_memory_where_a_block_needs_more_than_it_has(monkeypatch):
    class Stream:
        cuda_stream = 1234

    class Properties:
        multi_processor_count = 7

    asked, launched = [], []
    monkeypatch.setattr(_nvrtc, "_function", lambda device, name: lambda *launch, **how: launched.append((launch, how)))
    monkeypatch.setattr(_nvrtc, "_allow_shared", lambda kernel, shared: asked.append(shared))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    run = _nvrtc.implementation("newton_schulz")
    for side, bytes_ in ((16, 3 * 8 * 16 * 17), (64, 3 * 8 * 64 * 65)):
        matrices = [torch.zeros(side, 100)] * 9
        info = torch.zeros(9, dtype=torch.int32)
        run(matrices, matrices, info, coefficients=[(1.0, 0.0, 0.0)], dtype=torch.float32, spectral=0, eps=0.0)
        (blocks, threads, _), how = launched.pop()
        assert (blocks, threads, how["shared_mem"]) == ((9,), (256,), bytes_)
        assert asked == ([bytes_] if bytes_ > 48 << 10 else [])


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
