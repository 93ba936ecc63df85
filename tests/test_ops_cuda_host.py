"""The CUDA kernels in the host emulator: the bits of the C++ back end, whatever the list, the grid and the thread order.

That each variant of each op agrees at all is in test_every_op.py; here is what only the emulator can show.
"""

import struct

import cases
import pytest
import torch
from cases import CPU, DTYPES, Case, assert_same_bits, make_case, op_of, options_of

from fastcurv import _backend

if _backend.native() is None:
    pytest.skip("fastcurv._C is not built", allow_module_level=True)

from cuda_host import emulator

from fastcurv import _C
from fastcurv._chunks import Table

CHUNK = 2048
# table.h
TICKET, HEADER = 4, 8
ROW_WORDS, SEGMENT, GROUP = 5, 2048, 8
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]
OPS = _backend.OPS
ELEMENTWISE = ("adam", "lookahead", "sgd")

# Around the widths of packs (2, 4, 8) and around one and two chunks, with nothing first, in the middle and last.
SHAPES = [(0,), (1,), (3,), (), (7,), (8,), (0, 3), (9,), (17,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, 821), (0,)]


def busy(op, shapes=SHAPES, dtype="float32", **options):
    name = "everything" if "everything" in cases.OPTIONS[op] else "plain"
    return make_case(op, shapes, dtype, device=CPU, **{**options_of(op, name, CPU), **options})


def guarded(case: Case, offset: int = 0, which: tuple[str, ...] | None = None) -> tuple[Case, list]:
    """A copy with every tensor amid a border of its own; those of the lists in `which` start `offset` elements late."""
    which = tuple(case.shaped) if which is None else which
    buffers = []

    def embed(name, tensor):
        border = 16 + (offset if name in which else 0)  # 16 elements of any dtype keep torch's 64-byte alignment
        buffer = torch.full([tensor.numel() + 48], 1.5, dtype=tensor.dtype)
        inner = buffer[border : border + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        buffers.append((buffer, border, tensor.numel()))
        return inner

    lists = {name: [embed(name, t) for t in tensors] for name, tensors in case.lists.items()}
    return Case(case.op, lists, dict(case.options)), buffers


def assert_borders_intact(buffers):
    for buffer, start, count in buffers:
        assert (buffer[:start] == 1.5).all() and (buffer[start + count :] == 1.5).all()


def table_of(case: Case):
    """A table of its own for each call, so that a test may write into it."""
    space = op_of(case.op).workspace()
    space.prepare(case.arguments)
    return space.table(CHUNK, CPU, op_of(case.op).rows(case.options_in_full))


def by_emulator(case: Case, *, offset=0, which=None, launches=1, **how) -> Case:
    case, buffers = guarded(case, offset, which)
    table = table_of(case)
    before = table.words.clone()
    for _ in range(launches):
        emulator.emulated(case.op, **how)(*case.arguments, table, **case.options_in_full)
    assert_borders_intact(buffers)
    assert table.words[TICKET] == 0
    if not table.partials:  # there is no scratch then: nothing at all was written
        assert torch.equal(table.words, before)
    return case


def by_cpp(case: Case) -> Case:
    return cases.run(case, "cpp")


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("op", OPS)
def test_any_grid_and_any_order_give_the_same_bits(op, order, seed, blocks):
    case = busy(op, [*SHAPES, (3, 2100), (300, 4)])
    assert_same_bits(by_emulator(case, order=order, seed=seed, blocks=blocks), by_cpp(case))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("op", [op for op in OPS if "steps" in op_of(op).lists])
def test_every_chunk_may_have_another_step(op, order, seed):
    """Coefficients go from one thread to all the others once per chunk: the barriers around that are needed."""
    case = busy(op, [(300,), (3, 100)] * 5)
    for i, step in enumerate(case["steps"]):
        step.fill_(7 * i % 9)
    assert_same_bits(by_emulator(case, blocks=2, order=order, seed=seed), by_cpp(case))


@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (3, 0), (0,)]])
@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_nothing_but_empty_tensors(op, shapes, blocks):
    case = busy(op, shapes)
    assert_same_bits(by_emulator(case, blocks=blocks), by_cpp(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("op", OPS)
def test_unaligned_lists(op, offset, dtype):
    case = busy(op, SHAPES, dtype)
    want = by_cpp(case)
    for which in [tuple(case.shaped), *[(name,) for name in case.shaped if case[name]]]:
        assert_same_bits(by_emulator(case, offset=offset, which=which), want)


@pytest.mark.parametrize("op", OPS)
def test_a_second_launch_goes_on_where_the_first_ended(op):
    case = busy(op, [*SHAPES, (2, 33000)])
    assert_same_bits(by_emulator(case, launches=3), by_cpp(by_cpp(by_cpp(case))))


@pytest.mark.parametrize("op", OPS)
def test_as_many_tensors_as_a_model_has(op):
    case = busy(op, [(i % 23,) if i % 2 else (i % 5, 7) for i in range(700)])
    assert_same_bits(by_emulator(case), by_cpp(case))


@pytest.mark.parametrize("op", OPS)
def test_a_skipped_launch_draws_no_ticket(op):
    case = busy(op, [(5,), (3, 4)], found_inf=torch.tensor(1.0))
    table = table_of(case)
    table.words[TICKET] = 123
    emulator.emulated(op, blocks=3)(*case.arguments, table, **case.options_in_full)
    assert table.words[TICKET] == 123


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "op, name",
    [("adam", "lr"), ("adam", "eps"), ("adam", "weight_decay"), ("ranger", "n_sma_threshold"), ("nero", "beta")],
)
def test_hyper_parameters_in_device_memory(op, name, dtype):
    """On a GPU the kernel reads a tensor hyper-parameter; here the plan holds its value, so the address is planted."""
    case = busy(op, [*SHAPES, (2, 33001)])
    before = case.options_in_full[name]
    value = torch.tensor(before * 0.8, dtype=dtype)
    want = by_cpp(Case(op, case.lists, {**case.options, name: value}))
    case = case.clone()
    table = table_of(case)
    # The arguments begin with a pointer to the table, then come the scalars {value, as_float, as_double} (table.h).
    start = 8 + 24 * op_of(op).scalars.index(name)
    addresses = (value.data_ptr(), 0) if dtype == torch.float32 else (0, value.data_ptr())
    planted = []
    for *launch, packed in getattr(_C, f"{op}_kernel")(*case.arguments, table, **case.options_in_full):
        assert struct.unpack_from("dPP", packed, start) == (before, 0, 0)
        changed = packed[:start] + struct.pack("dPP", float("nan"), *addresses) + packed[start + 24 :]
        planted.append((*launch, changed))
    emulator.launch(planted)
    assert_same_bits(case, want)


# ---- Past 2^31 elements: the only tensor begins so far below its memory that just its last chunks lie in it. ----


def far_table(case, begin, numel, rows=(0, 0, 0), chunks=(), partials=(), scratch=0):
    """A table whose tensor has `begin` elements before those in memory, and the scratch of `rows` that long before."""
    words = [1, len(chunks), len(case.lists), CHUNK, 0, len(partials), 0, 0, numel, *rows]
    for name, tensors in case.lists.items():
        before = begin if name in case.shaped else rows[0] - tensors[0].numel() if name.startswith("row_") else 0
        words.append(tensors[0].data_ptr() - before * tensors[0].element_size() if tensors else 0)
    words += [*chunks, *partials]
    memory = torch.full([len(words) + scratch], -(1 << 40))
    memory[: len(words)] = torch.tensor(words)
    return Table(memory, len(chunks), len(partials))


def assert_agrees_far_away(case, *where, scratch_before=0, **more):
    want = by_cpp(case)
    case, buffers = guarded(case)
    table = far_table(case, *where, **more)
    if "scratch" in more:
        table.words[HEADER + 3] = table.words.numel() - more["scratch"] - scratch_before
    emulator.emulated(case.op)(*case.arguments, table, **case.options_in_full)
    assert_borders_intact(buffers)
    assert_same_bits(case, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**31 // CHUNK, 2**32 // CHUNK + 3, 2**31 + 1])
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elements_past_the_32_bit_limit(op, chunk, dtype):
    count, begin = CHUNK - 3, chunk * CHUNK
    assert_agrees_far_away(busy(op, [(count,)], dtype), begin, begin + count, chunks=[chunk])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["nero", "ranger"])
def test_rows_past_the_32_bit_limit(op, dtype):
    count, length = 5, 1001
    chunk = 2**31 // (8 * length) + 1  # of eight rows
    rows = 8 * chunk + count
    case = busy(op, [(count, length)], dtype)
    assert_agrees_far_away(case, 8 * chunk * length, rows * length, (rows, length, 0), chunks=[chunk])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["nero", "ranger"])
def test_long_rows_past_the_32_bit_limit(op, dtype):
    count, length, before = 2, 33000, 1 << 16
    segments = -(-length // SEGMENT)
    begin, end = before * length, (before + count) * length
    assert_agrees_far_away(
        busy(op, [(count, length)], dtype),
        begin,
        end,
        (before + count, length, 0),
        chunks=range(begin // CHUNK, -(-end // CHUNK)),
        partials=range(before * segments // GROUP, -(-(before + count) * segments // GROUP)),
        scratch=(count * segments + before + count) * ROW_WORDS,
        scratch_before=before * segments * ROW_WORDS,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [2**31 - 700, 2**31 + 5000, 2**33 + 100])
def test_a_run_of_more_than_2_31_elements_ends_within_a_chunk(inner, dtype):
    """Two rows, of which the update knows no more than their means; none, where the gradients have lost them."""
    chunk = inner // CHUNK
    case = make_case("ranger", [(CHUNK,)], dtype, device=CPU)
    means = torch.tensor([0.5, -0.25])
    row = (torch.arange(CHUNK) >= inner - chunk * CHUNK).long()
    grad = case["grads"][0]
    grad.copy_(torch.randint(-8, 8, (CHUNK,)) / 8)  # exact without their means
    want = case.clone()
    want["grads"][0] -= means[row].to(grad.dtype)
    want.options["use_gc"] = False
    cases.call(want, "cpp")
    table = far_table(case, chunk * CHUNK, 2 * inner, (2, inner, 0), chunks=[chunk], scratch=2 * ROW_WORDS)
    first = table.words.numel() - 2 * ROW_WORDS
    table.words[HEADER + 3] = first - 2 * -(-inner // SEGMENT) * ROW_WORDS
    for r in range(2):
        table.words[first + ROW_WORDS * r :][:1].view(torch.float32)[0] = means[r]
    emulator.emulated("ranger")(*case.arguments, table, **case.options_in_full)
    assert_same_bits(case, want)
