"""csrc/cuda in the host emulator: the bits of the C++ back end, whatever the op, the list, the grid and the order."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cuda_host import emulator
from torch import Tensor

from fastcurv import _C, _check, ops

CPU = torch.device("cpu")
CHUNK = 2048
RECORD, TICKET = 4, 4  # table.h
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
}

# Every instance of every kernel, and every way of dividing tensors into rows.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adam", {"weight_decay": 0.2}),
    "amsgrad": ("adam", {"rule": "amsgrad", "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    "radam": ("adam", {"rule": "radam"}),
    "nadam": ("adam", {"rule": "nadam", "mu_decay": 0.99}),
    "yogi": ("adam", {"rule": "yogi"}),
    "sgd": ("sgd", {"weight_decay": 0.1}),
    "momentum": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "lookahead": ("lookahead", {"alpha": 0.3}),
    "ranger": ("ranger", {"k": 2, "beta2": 0.9, "weight_decay": 0.1}),  # synchronises some tensors, and not others
    "ranger-conv": ("ranger", {"k": 4, "gc_conv_only": True, "maximize": True}),
    "nero": ("nero", {}),
    "nero-free": ("nero", {"constraints": False}),
    "lars": ("lars", {"trust_coefficient": 0.1, "weight_decay": 0.1}),
    "lars-plain": ("lars", {"adaptive": False, "nesterov": True}),
    "lamb": ("lamb", {"weight_decay": 0.1}),
    "lamb-plain": ("lamb", {"adaptive": False}),
}
NEEDED = {  # optional lists, by what asks for them
    "max_exp_avg_sqs": lambda options: options.get("rule") == "amsgrad",
    "mu_products": lambda options: options.get("rule") == "nadam",
    "momentum_buffers": lambda options: "momentum" in options,
}

# Around the widths of packs (2, 4, 8) and around one and two chunks, with nothing first, in the middle and last.
FLAT = [(0,), (1,), (3,), (), (7,), (8,), (0, 3), (9,), (17,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, 821), (0,)]
# Rows that share a warp, a tile, that fill one, that are longer than one, and that are too long for a block.
ROWS = [(1100, 1), (40, 9), (8, 3, 3, 3), (9, 64), (300, 7), (5, 2001), (3, 3000), (2, 8192), (2, 8193), (2, 33001)]


@dataclass
class Call:
    """One call of an op on CPU tensors."""

    op: Any
    lists: dict[str, list[Tensor]]
    options: dict[str, Any]  # all keyword arguments of the implementations

    def clone(self) -> Call:
        return Call(self.op, {k: [t.clone() for t in v] for k, v in self.lists.items()}, dict(self.options))

    def arguments(self) -> list[list[Tensor]]:
        return list(self.lists.values())

    def table(self) -> tuple[Tensor, int, int]:
        names = list(self.lists)
        builder = _C.ChunkTable(list(self.op.mutated))
        builder.update(self.arguments(), names, True)
        rows = self.op.rows(self.options)
        words, written, chunks, partials = builder.size(CHUNK, rows)
        table = torch.full([words], -(1 << 40))  # scratch is not read before it is written
        builder.write(table.data_ptr(), CHUNK, rows)
        self.written = written
        return table, chunks, partials


def transposed(*shape: int) -> Tensor:
    return torch.empty(shape[::-1]).t()


def models(shapes: Sequence[tuple[int, ...] | Tensor]) -> list[Tensor]:
    return [s if isinstance(s, Tensor) else torch.empty(s) for s in shapes]


LAYOUTS = [
    transposed(6, 5),
    transposed(70, 300),
    transposed(2100, 9),
    transposed(3, 5000),
    torch.empty(6, 5, 3, 2).to(memory_format=torch.channels_last),
    torch.empty(40, 3, 20).permute(1, 0, 2),  # runs of 20, three rows
]


def build(name: str, shapes: Sequence[tuple[int, ...] | Tensor], dtype: str = "float32", **more: Any) -> Call:
    """A call in the middle of training: state that is not zero, steps that differ from tensor to tensor."""
    op_name, options = CALLS[name]
    op = getattr(ops, f"{op_name}_")
    options = {**options, **more}
    param_dtype, state_dtype = DTYPES[dtype]
    generator = torch.Generator().manual_seed(7)
    params = [torch.empty_like(m, dtype=param_dtype) for m in models(shapes)]

    def draw(kind: str, param: Tensor, list_name: str, i: int) -> Tensor:
        shape, dtype = _check.template(kind, param, state_dtype)
        if kind == "count":
            return torch.tensor(3.0 + i % 4 if list_name == "steps" else 0.25 + i % 2)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "sq" in list_name or kind == "one":
            values = values.square()
        same = torch.empty_like(param, dtype=dtype) if shape == tuple(param.shape) else torch.empty(shape, dtype=dtype)
        return same.copy_(values)

    lists = {}
    for list_name in op.lists:
        wanted = list_name not in op.optional or NEEDED[list_name](options)
        kind = "param" if list_name == "grads" else _check.kind(list_name)
        lists[list_name] = [draw(kind, p, list_name, i) for i, p in enumerate(params)] if wanted else []
    if "lr" in op.scalars:
        options = {"lr": 0.1, **options}
    bound = inspect.signature(op.__wrapped__).bind(*lists.values(), **options)
    bound.apply_defaults()
    return Call(op, lists, {k: v for k, v in bound.arguments.items() if k not in lists and k != "backend"})


def big_lists(call: Call) -> list[str]:
    """Those whose tensors have the shapes of parameters."""
    return [k for k, v in call.lists.items() if v and _check.kind(k) in ("param", "grad", "state", "exact")]


def guarded(call: Call, offset: int = 0, which: Sequence[str] = ()) -> tuple[Call, list[tuple[Tensor, int, int]]]:
    """A copy with every tensor amid a border of its own; those of the lists in `which` start `offset` elements late."""
    buffers = []

    def embed(name: str, tensor: Tensor) -> Tensor:
        border = 64 + (offset if name in which else 0)
        buffer = torch.full([tensor.numel() + 128], 1.5, dtype=tensor.dtype)
        inner = buffer[border : border + tensor.numel()].as_strided(tensor.shape, tensor.stride())
        inner.copy_(tensor)
        buffers.append((buffer, border, tensor.numel()))
        return inner

    lists = {name: [embed(name, t) for t in tensors] for name, tensors in call.lists.items()}
    return Call(call.op, lists, dict(call.options)), buffers


def assert_borders_intact(buffers: list[tuple[Tensor, int, int]]) -> None:
    for buffer, start, count in buffers:
        assert (buffer[:start] == 1.5).all() and (buffer[start + count :] == 1.5).all()


def by_cpp(call: Call, launches: int = 1) -> Call:
    call = call.clone()
    for _ in range(launches):
        getattr(_C, f"{call.op.name}_")(*call.arguments(), call.table(), **call.options)
    return call


def by_emulator(call: Call, *, offset: int = 0, which: Sequence[str] = (), launches: int = 1, **how: Any) -> Call:
    call, buffers = guarded(call, offset, which)
    table = call.table()
    before = table[0].clone()
    for _ in range(launches):
        emulator.emulated(call.op.name, **how)(*call.arguments(), table, **call.options)
    assert_borders_intact(buffers)
    # The ticket is back at zero, and but for the scratch nothing else was written.
    assert torch.equal(table[0][: call.written], before[: call.written])
    return call


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got: Call, want: Call) -> None:
    for name, tensors in got.lists.items():
        for i, (x, y) in enumerate(zip(tensors, want.lists[name], strict=True)):
            assert x.dtype == y.dtype and torch.equal(bits(x), bits(y)), f"{name}[{i}] {tuple(x.shape)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_equals_cpp(name, dtype):
    call = build(name, [*FLAT, *ROWS, *LAYOUTS], dtype)
    want = by_cpp(call)
    assert not all(torch.equal(x, y) for x, y in zip(want.lists["params"], call.lists["params"], strict=True))
    assert_same_bits(by_emulator(call), want)


SMALL = [(0,), (5,), (70, 9), (), (4, 2001), (2, 9000), (1, 33001), transposed(70, 40), (2100,), (3, 0)]


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", ["amsgrad", "ranger", "nero", "lamb"])
def test_any_grid_and_any_order_give_the_same_bits(name, order, seed, blocks):
    call = build(name, SMALL)
    assert_same_bits(by_emulator(call, order=order, seed=seed, blocks=blocks), by_cpp(call))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("name", ["adam", "nadam", "ranger", "lars"])
def test_every_chunk_may_have_another_step(name, order, seed):
    """Coefficients go from one thread to all the others once per chunk, and so do rows: barriers are needed."""
    call = build(name, [(3, 100)] * 9)
    for i, step in enumerate(call.lists.get("steps", [])):
        step.fill_(7 * i % 9)
    assert_same_bits(by_emulator(call, blocks=2, order=order, seed=seed), by_cpp(call))


@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (3, 0), (0,)]])
@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_but_empty_tensors(name, blocks, shapes):
    call = build(name, shapes)
    result = by_emulator(call, blocks=blocks)
    if "steps" in call.lists:
        assert [s.item() for s in result.lists["steps"]] == [s.item() + 1 for s in call.lists["steps"]]
    assert_same_bits(result, by_cpp(call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["amsgrad", "momentum", "lookahead", "ranger", "nero", "lars", "lamb"])
@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_lists(offset, name, dtype):
    call = build(name, [(9,), (2100,), (30, 9), (5, 2001), transposed(7, 40)], dtype)
    want = by_cpp(call)
    for which in [big_lists(call), *[[one] for one in big_lists(call)]]:
        assert_same_bits(by_emulator(call, offset=offset, which=which), want)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_launch_goes_on_where_the_first_ended(name):
    call = build(name, SMALL)
    assert_same_bits(by_emulator(call, launches=3), by_cpp(call, 3))


@pytest.mark.parametrize("name", ["amsgrad", "ranger"])
def test_as_many_tensors_as_a_model_has(name):
    call = build(name, [(i % 23, 3) for i in range(700)])
    assert_same_bits(by_emulator(call), by_cpp(call))


@pytest.mark.parametrize("name", ["amsgrad", "ranger", "lars", "lamb"])
def test_nan_and_inf_end_where_they_end_in_cpp(name):
    call = build(name, [(64,), (9,), (3, 700)])
    for grad in call.lists["grads"]:
        flat = grad.view(-1)[2::5]
        flat.copy_(torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(150)[: len(flat)])
    got, want = by_emulator(call), by_cpp(call)
    # Not their bits: which of two NaNs an addition returns is the compiler's choice.
    for key, tensors in got.lists.items():
        for x, y in zip(tensors, want.lists[key], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_found_inf_and_grad_scale(name):
    call = build(name, SMALL)
    call.options["found_inf"] = torch.tensor(1.0)
    assert_same_bits(by_emulator(call), call)
    call.options["found_inf"] = torch.tensor(0.0)
    if "grad_scale" in call.options:
        call.options["grad_scale"] = torch.tensor(3.0)
    assert_same_bits(by_emulator(call), by_cpp(call))


def test_a_skipped_launch_draws_no_ticket():
    call = build("adam", [(5,)], found_inf=torch.tensor(1.0))
    table = call.table()
    table[0][TICKET] = 123
    emulator.emulated("adam", blocks=3)(*call.arguments(), table, **call.options)
    assert table[0][TICKET] == 123


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "scalar"), [("adam", "lr"), ("adam", "eps"), ("ranger", "n_sma_threshold"), ("nero", "beta")]
)
def test_hyper_parameters_in_device_memory(name, scalar, dtype):
    """On a GPU the kernel reads a tensor hyper-parameter; here the plan holds its value, so the address is planted."""
    call = build(name, SMALL)
    before = call.options[scalar]
    value = torch.tensor(before * 0.8, dtype=dtype)
    want = by_cpp(Call(call.op, call.lists, {**call.options, scalar: value}))
    table = call.table()
    plan = getattr(_C, f"{call.op.name}_kernel")(*call.arguments(), table, **call.options)
    # Args: table, then eight Scalars {value, as_float, as_double} (table.h).
    start = 8 + 24 * call.op.scalars.index(scalar)
    addresses = (value.data_ptr(), 0) if dtype == torch.float32 else (0, value.data_ptr())
    planted = []
    for *launch, packed in plan:
        assert struct.unpack_from("dPP", packed, start) == (before, 0, 0)
        changed = packed[:start] + struct.pack("dPP", float("nan"), *addresses) + packed[start + 24 :]
        planted.append((*launch, changed))
    emulator.launch(planted)
    assert_same_bits(call, want)


# ---- past 2^31 elements: the base pointers lie so far below real memory ----


def far_table(
    call: Call, begin: int, numel: int, rows: tuple[int, int, int], chunks: list[int], partials: list[int], scratch: int
) -> tuple[Tensor, int, int]:
    """A table by hand, whose only tensor begins `begin` elements before the memory of its lists."""
    head = [1, len(chunks), len(call.lists), CHUNK, 0, len(partials), 0, 0]
    words = [*head, numel, *rows]
    for name, tensors in call.lists.items():
        one = tensors[0] if tensors else None
        shift = begin if name in big_lists(call) else rows[0] - one.numel() if name == "row_exp_avg_sqs" else 0
        words.append(one.data_ptr() - shift * one.element_size() if tensors else 0)
    words += [*chunks, *partials]
    table = torch.full([len(words) + scratch], -(1 << 40))
    table[: len(words)] = torch.tensor(words)
    return table, len(chunks), len(partials)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**31 // CHUNK, 2**32 // CHUNK + 3, 2**31 + 1])
@pytest.mark.parametrize("name", ["amsgrad", "momentum", "lamb-plain"])
def test_elements_past_the_32_bit_limit(name, chunk, dtype):
    count, begin = CHUNK - 3, chunk * CHUNK
    call = build(name, [(count,)], dtype)
    want = by_cpp(call)
    call, buffers = guarded(call)
    table = far_table(call, begin, begin + count, (0, 0, 0), [chunk], [], 0)
    emulator.emulated(call.op.name)(*call.arguments(), table, **call.options)
    assert_borders_intact(buffers)
    assert_same_bits(call, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nero", "ranger"])
def test_rows_past_the_32_bit_limit(name, dtype):
    rows, length = 5, 1001
    chunk = 2**31 // (8 * length) + 1  # of eight rows
    call = build(name, [(rows, length)], dtype)
    want = by_cpp(call)
    call, buffers = guarded(call)
    all_rows = 8 * chunk + rows
    table = far_table(call, 8 * chunk * length, all_rows * length, (all_rows, length, 0), [chunk], [], 0)
    emulator.emulated(call.op.name)(*call.arguments(), table, **call.options)
    assert_borders_intact(buffers)
    assert_same_bits(call, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nero", "ranger"])
def test_long_rows_past_the_32_bit_limit(name, dtype):
    rows, length, before = 2, 33000, 1 << 16
    segments = -(-length // 2048)
    call = build(name, [(rows, length)], dtype)
    want = by_cpp(call)
    call, buffers = guarded(call)
    begin, end = before * length, (before + rows) * length
    chunks = list(range(begin // CHUNK, -(-end // CHUNK)))
    partials = list(range(before * segments // 8, -(-(before + rows) * segments // 8)))
    size = (rows * segments + before + rows) * 5
    table = far_table(call, begin, end, (before + rows, length, 0), chunks, partials, size)
    table[0][8 + 3] = table[0].numel() - size - before * segments * 5
    emulator.emulated(call.op.name)(*call.arguments(), table, **call.options)
    assert_borders_intact(buffers)
    assert_same_bits(call, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [2**31 - 700, 2**31 + 5000, 2**33 + 100])
def test_a_run_of_more_than_2_31_elements_ends_within_a_chunk(inner, dtype):
    """Two rows, of which the update knows no more than their means; none, where the gradients have lost them."""
    chunk = inner // CHUNK
    call = build("ranger", [(CHUNK,)], dtype)
    means = torch.tensor([0.5, -0.25])
    split = inner - chunk * CHUNK
    (grad,) = call.lists["grads"]
    grad.copy_(torch.randint(-8, 8, (CHUNK,)) / 8)  # exact without their means
    row = (torch.arange(CHUNK) >= split).long()
    plain = call.clone()
    plain.lists["grads"] = [(grad - means[row]).to(grad.dtype)]
    plain.options["use_gc"] = False
    want = by_cpp(plain)
    table = far_table(call, chunk * CHUNK, 2 * inner, (2, inner, 0), [chunk], [], 10)
    first = table[0].numel() - 10
    table[0][8 + 3] = first - 2 * -(-inner // 2048) * 5
    for r in range(2):
        table[0][first + 5 * r : first + 5 * r + 1].view(torch.float32)[0] = means[r]
    emulator.emulated("ranger")(*call.arguments(), table, **call.options)
    call.lists["grads"] = want.lists["grads"]
    assert_same_bits(call, want)
