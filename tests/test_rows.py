"""Every way that rows can lie in memory, and every length: the kernels of a GPU give the bits of the C++ ones."""

import ctypes
import mmap
import sys

import cases
import pytest
import torch
from cases import CPU, OPTIONS, assert_same_bits, make_case, op_of, options_of

from fastcurv import _backend
from fastcurv._chunks import NO_ROWS

if _backend.native() is None:
    pytest.skip("fastcurv._C is not built", allow_module_level=True)

BACKENDS = [name for name in cases.backends("ranger", CPU) if name != "cpp"]
OPS = [op for op in _backend.OPS if op_of(op).rows(cases.full(op, {})) != NO_ROWS]
VARIANTS = [(op, name) for op in OPS for name in OPTIONS[op]]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_op = pytest.mark.parametrize("op", OPS)


def plain(tensor):
    return tensor


def transposed(tensor):
    """The same values with dim 0 innermost in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def middle_first(tensor):
    """Dim 1 outermost: a row is made of runs that are apart."""
    return tensor.movedim(1, 0).contiguous().movedim(0, 1)


def unaligned(tensor):
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return place.view(tensor.shape).copy_(tensor)


# Rows that share a warp or a tile, that fill one, that are longer than one, that are too long for a block; of an aligned
# and an odd number of elements; more of them than a chunk or a tile holds.
LENGTHS = [(1100, 1), (40, 9), (8, 3, 3, 3), (300, 7), (130, 27), (300, 64), (5, 264), (3, 2001), (3, 3000)]
LENGTHS += [(2, 8192), (2, 8193), (2, 33000), (1, 33001)]
SOME_LENGTHS = [(40, 27), (0,), (3, 264), (2, 2056), (1, 33000)]
LAYOUTS = [
    *[(shape, transposed) for shape in ((7, 5), (65, 33), (9, 2100), (3, 2500))],
    *[(shape, channels_last) for shape in ((6, 5, 3, 3), (2, 300, 4, 4))],
    *[(shape, middle_first) for shape in ((3, 40, 20), (2, 70, 300))],
    *[(shape, unaligned) for shape in ((4, 8), (3, 264), (2, 2048), (2, 2056), (1, 33000))],
]


def busy(op, shapes, dtype="float32", options="everything", **others):
    return make_case(op, shapes, dtype, device=CPU, **{**options_of(op, options, CPU), **others})


def laid_out(case, changes):
    """The case with the memory layout of each tensor changed by the function of that number."""
    lists = {
        name: [
            change(t.clone()) if name in case.shaped else t.clone() for t, change in zip(tensors, changes, strict=False)
        ]
        for name, tensors in case.lists.items()
    }
    return cases.Case(case.op, lists, case.options)


def assert_agrees(case, backend, layouts=None, steps=1):
    def run(backend):
        copy = laid_out(case, layouts or [plain] * len(case["params"]))
        for _ in range(steps):
            cases.call(copy, backend)
        return copy

    result = run("cpp")
    assert any(not torch.equal(x, y) for x, y in zip(result["params"], case["params"], strict=True))
    assert_same_bits(run(backend), result)


@every_backend
@pytest.mark.parametrize("op, options", VARIANTS)
def test_rows_of_all_lengths(op, options, backend):
    assert_agrees(busy(op, LENGTHS, options=options), backend)


@every_backend
@every_op
@pytest.mark.parametrize("dtype", [dtype for dtype in cases.DTYPES if dtype != "float32"])
def test_rows_of_all_lengths_in_other_dtypes(op, dtype, backend):
    assert_agrees(busy(op, SOME_LENGTHS, dtype), backend)


@every_backend
@every_op
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_in_any_layout(op, dtype, backend):
    shapes, changes = zip(*LAYOUTS, strict=True)
    assert_agrees(busy(op, shapes, dtype), backend, changes)


@every_backend
@every_op
def test_several_steps_from_zero(op, backend):
    """From the first step on: RAdam unrectified, Ranger's slow weights moving on some steps."""
    case = busy(op, [(4, 9), (300,), (2, 2100)])
    for name, tensors in case.lists.items():
        if name not in ("params", "grads", "scales", "slow_buffers"):
            for tensor in tensors:
                tensor.zero_()
    assert_agrees(case, backend, steps=5)


@every_backend
@every_op
def test_zero_rows(op, backend):
    case = busy(op, [(3, 5), (2, 2100), (1, 33000), (4, 3)])
    for i in range(3):
        for name in case.shaped:
            if "avg" in name or name == ("grads" if i % 2 else "params"):
                case[name][i].zero_()
    assert_agrees(case, backend)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("backend", ["cpp", *BACKENDS])
def test_only_steps_that_synchronise_touch_the_slow_weights(backend):
    """The pages of the slow weights cannot be accessed: an access would end the process."""
    pages = mmap.mmap(-1, mmap.PAGESIZE * 4)
    slow = torch.frombuffer(pages, dtype=torch.float32)[:3000].view(3, 1000)
    libc = ctypes.CDLL(None)
    case = busy("ranger", [(3, 1000)], options="plain", k=5, alpha=1.0, step=3.0)
    case["slow_buffers"][0] = slow
    versions = [slow._version]
    libc.mprotect(ctypes.c_void_p(slow.data_ptr()), ctypes.c_size_t(len(pages)), 0)
    cases.call(case, backend)  # step 4
    versions.append(slow._version)
    libc.mprotect(ctypes.c_void_p(slow.data_ptr()), ctypes.c_size_t(len(pages)), 3)
    cases.call(case, backend)
    versions.append(slow._version)
    assert torch.equal(slow, case["params"][0])
    if backend == "cpp":  # which knows at once; an emulated kernel is called past the versions
        assert versions[0] == versions[1] < versions[2]
