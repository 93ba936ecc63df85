"""The Triton kernels of all multi-tensor ops against the C++ ones, bit for bit, over every way that rows can lie."""

import os

import pytest
import torch

from fastcurv import _backend, _check, ops

pytestmark = [
    pytest.mark.skipif(
        bool(_backend.unusable("adam", "triton", torch.device("cpu"))), reason="needs Triton's interpreter"
    ),
    # As in C++: 0 / 0 and overflow are values.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
}

# Options, and the optional lists they need.
OPTIONS = {
    "adam": ("adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, ()),
    "amsgrad": ("adam", {"rule": "amsgrad"}, ("max_exp_avg_sqs",)),
    "radam": ("adam", {"rule": "radam"}, ()),
    "nadam": ("adam", {"rule": "nadam", "weight_decay": 0.1}, ("mu_products",)),
    "yogi": ("adam", {"rule": "yogi", "maximize": True}, ()),
    "sgd": ("sgd", {"weight_decay": 0.1}, ()),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True, "dampening": 0.25}, ("momentum_buffers",)),
    "sgd-first": ("sgd", {"momentum": 0.9, "dampening": 0.25, "is_first_step": True}, ("momentum_buffers",)),
    "lookahead": ("lookahead", {"alpha": 0.3}, ()),
    "ranger": ("ranger", {"k": 2, "weight_decay": 0.1}, ()),
    "ranger-scaled": ("ranger", {"k": 3, "weight_decay": 0.1, "scaled_weight_decay": True, "maximize": True}, ()),
    "ranger-plain": ("ranger", {"k": 2, "use_gc": False}, ()),
    "ranger-conv": ("ranger", {"k": 2, "gc_conv_only": True}, ()),
    "nero": ("nero", {}, ()),
    "nero-free": ("nero", {"constraints": False, "maximize": True}, ()),
    "lars": ("lars", {"trust_coefficient": 0.1, "weight_decay": 0.1}, ()),
    "lars-plain": ("lars", {"adaptive": False, "nesterov": True}, ()),
    "lamb": ("lamb", {"weight_decay": 0.1}, ()),
    "lamb-plain": ("lamb", {"weight_decay": 0.1, "adaptive": False}, ()),
}
WITH_ROWS = ("ranger", "nero", "lars", "lamb")

SMALL = ((0,), (), (1,), (7,), (3, 0), (5, 1), (1, 5), (4, 3, 3), (6, 3, 3, 3), (9, 64))
# Rows of several tiles, of an aligned and of an odd number of elements; of several segments; too long for one block;
# more rows than a chunk or a tile holds.
LARGE = ((130, 27), (3, 2001), (3, 3000), (2, 8200), (2, 33000), (1, 33001), (1030, 9), (300, 64), (5, 264))


def awkward(shape, kind):
    """An uninitialised layout that is not the plain one."""
    if kind == "transposed":
        return lambda d: torch.empty(shape[::-1], dtype=d).t()
    if kind == "channels_last":
        return lambda d: torch.empty(shape, dtype=d).to(memory_format=torch.channels_last)
    return lambda d: torch.empty(torch.Size(shape).numel() + 1, dtype=d)[1:].view(shape)  # unaligned


AWKWARD = (
    *(awkward(shape, "transposed") for shape in ((7, 5), (65, 33), (3, 2500))),
    *(awkward(shape, "channels_last") for shape in ((6, 5, 3, 3), (2, 300, 4, 4))),
    *(awkward(shape, "unaligned") for shape in ((4, 8), (3, 264), (2, 2048), (2, 2056), (1, 33000))),
)


def plain(shapes):
    return tuple(lambda d, s=s: torch.empty(s, dtype=d) for s in shapes)


def arguments(name, layouts, dtype, generator, present, step=3.0):
    """The lists of an op, in the middle of training."""
    op = getattr(ops, f"{name}_")
    param, state = DTYPES[dtype]

    def drawn(tensor):
        return tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    params = [drawn(make(param)) for make in layouts]
    lists = []
    for list_name in op.lists:
        if list_name in op.optional and list_name not in present:
            lists.append([])
            continue
        tensors = []
        for i, (p, make) in enumerate(zip(params, layouts, strict=True)):
            kind = "param" if list_name == "grads" else _check.kind(list_name)
            shape, d = _check.template(kind, p, state)
            tensor = drawn(make(d) if tuple(shape) == tuple(p.shape) else torch.empty(shape, dtype=d))
            if list_name == "steps":
                tensor.fill_(step + i % 4)
            elif list_name == "mu_products":
                tensor.fill_(0.3)
            elif "sq" in list_name or list_name == "scales":
                tensor.square_()
            tensors.append(tensor)
        lists.append(params if list_name == "params" else tensors)
    return op, lists


def copies(lists):
    """The same tensors at other addresses, as far off a multiple of 16 bytes as they are."""
    return [[_copy(t) for t in x] for x in lists]


def _copy(t):
    offset = t.storage_offset()
    memory = torch.empty(offset + t.numel(), dtype=t.dtype)
    return memory.as_strided(t.shape, t.stride(), offset).copy_(t)


def bits(x):
    return x.reshape(-1).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(op, lists, other):
    for name, x, y in zip(op.lists, lists, other, strict=True):
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            assert torch.equal(bits(a), bits(b)), f"{name}[{i}] {tuple(a.shape)} {a.stride()}"


def assert_agrees(case, layouts, dtype, generator, **more):
    name, options, present = OPTIONS[case]
    op, lists = arguments(name, layouts, dtype, generator, present)
    options = {**({"lr": 0.1} if "lr" in op.scalars else {}), **options, **more}
    expected, got = copies(lists), copies(lists)
    op(*expected, **options, backend="cpp")
    op(*got, **options, backend="triton")
    assert_same(op, got, expected)
    assert any(not torch.equal(bits(a), bits(b)) for a, b in zip(lists[0], got[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OPTIONS)
def test_small_tensors(case, dtype, generator):
    assert_agrees(case, plain(SMALL), dtype, generator)


@pytest.mark.parametrize("case", WITH_ROWS)
def test_rows_of_all_lengths(case, generator):
    assert_agrees(case, plain(LARGE), "float32", generator)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("case", WITH_ROWS)
def test_rows_of_all_lengths_in_other_dtypes(case, dtype, generator):
    assert_agrees(case, plain(((40, 27), (3, 264), (2, 2056), (1, 33000))), dtype, generator)


@pytest.mark.parametrize("case", ["adam", "lookahead", *WITH_ROWS])
def test_awkward_layouts(case, generator):
    assert_agrees(case, AWKWARD, "float32", generator)


@pytest.mark.parametrize("case", WITH_ROWS)
def test_awkward_layouts_in_bfloat16(case, generator):
    assert_agrees(case, (AWKWARD[1], AWKWARD[4], AWKWARD[6], AWKWARD[8]), "bfloat16", generator)


SOME = plain(((3, 5), (0,), (2, 300), (1, 33000)))


@pytest.mark.parametrize("case", OPTIONS)
def test_tensors_for_numbers(case, generator):
    name, options, _ = OPTIONS[case]
    op = getattr(ops, f"{name}_")
    values = {"lr": 0.125, "beta1": 0.75, "beta2": 0.875, "beta": 0.875, "eps": 2.0**-10, "n_sma_threshold": 4.0}
    more = {s: torch.tensor(values.get(s, options.get(s, 0.25)), dtype=torch.float32) for s in op.scalars}
    more |= {"grad_scale": torch.tensor(3.0)} if name != "lookahead" else {}
    assert_agrees(case, SOME, "float32", generator, **more, found_inf=torch.zeros(()))


@pytest.mark.parametrize("case", ["nadam", "nesterov", "lookahead", *WITH_ROWS])
def test_found_inf_writes_nothing(case, generator):
    name, options, present = OPTIONS[case]
    op, lists = arguments(name, SOME, "float32", generator, present)
    got = copies(lists)
    op(*got, **({"lr": 0.1} if "lr" in op.scalars else {}), **options, found_inf=torch.ones(()), backend="triton")
    assert_same(op, got, lists)


@pytest.mark.parametrize("case", ["radam", "nadam", *WITH_ROWS])
def test_several_steps_from_zero(case, generator):
    """From the first step on: RAdam unrectified, NAdam's product 1, Ranger's slow weights moving on every second."""
    name, options, present = OPTIONS[case]
    op, lists = arguments(name, plain(((4, 9), (300,), (2, 2100))), "float32", generator, present, step=0.0)
    for list_name, tensors in zip(op.lists, lists, strict=True):
        for t in tensors:
            if list_name == "mu_products":
                t.fill_(1.0)
            elif list_name not in ("params", "grads", "scales", "slow_buffers"):
                t.zero_()
    expected, got = copies(lists), copies(lists)
    for _ in range(5):
        op(*expected, lr=0.1, **options, backend="cpp")
        op(*got, lr=0.1, **options, backend="triton")
    assert_same(op, got, expected)


@pytest.mark.parametrize("case", WITH_ROWS)
def test_zero_rows(case, generator):
    name, options, present = OPTIONS[case]
    op, lists = arguments(name, plain(((3, 5), (2, 2100), (1, 33000))), "float32", generator, present)
    for i, tensors in enumerate(zip(*lists, strict=True)):
        for list_name, t in zip(op.lists, tensors, strict=True):
            if list_name == ("grads" if i % 2 else "params") or "avg" in list_name:
                t.zero_()
    expected, got = copies(lists), copies(lists)
    op(*expected, lr=0.1, **options, backend="cpp")
    op(*got, lr=0.1, **options, backend="triton")
    assert_same(op, got, expected)


def test_only_synchronising_steps_touch_the_slow_weights(generator):
    """The pages of the slow weights cannot be accessed: an access would end the process."""
    if os.name != "posix":
        pytest.skip("mprotect")
    import ctypes
    import mmap

    pages = mmap.mmap(-1, mmap.PAGESIZE * 4)
    slow = torch.frombuffer(pages, dtype=torch.float32)[:3000].view(3, 1000)
    libc = ctypes.CDLL(None)
    op, lists = arguments("ranger", plain(((3, 1000),)), "float32", generator, ())
    lists[4] = [slow]
    libc.mprotect(ctypes.c_void_p(slow.data_ptr()), ctypes.c_size_t(len(pages)), 0)
    op(*lists, lr=0.1, k=5, backend="triton")  # step 4
    libc.mprotect(ctypes.c_void_p(slow.data_ptr()), ctypes.c_size_t(len(pages)), 3)
    op(*lists, lr=0.1, k=5, backend="triton")
    assert torch.equal(slow, lists[0][0])
