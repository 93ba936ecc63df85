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

CHUNK = 2048
TICKET, HEADER, RECORD = 4, 8, 4  # table.h
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


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyper_parameters_in_device_memory(name, dtype):
    """On a GPU the kernel reads a tensor hyper-parameter; here the plan holds its value, so the address is planted."""
    case = busy("adam", weight_decay=0.2)
    value = torch.tensor(case.options[name] * 0.8, dtype=dtype)
    want = by_cpp(Case("adam", case.lists, {**case.options, name: value}))
    case = case.clone()
    *plan, packed = _C.adam_kernel(*case.arguments, table_of(case), **case.options_in_full)
    # The arguments begin with a pointer to the table, then come the scalars {value, as_float, as_double} (table.h).
    start = 8 + 24 * op_of("adam").scalars.index(name)
    assert struct.unpack_from("dPP", packed, start) == (case.options[name], 0, 0)
    addresses = (value.data_ptr(), 0) if dtype == torch.float32 else (0, value.data_ptr())
    planted = packed[:start] + struct.pack("dPP", float("nan"), *addresses) + packed[start + 24 :]
    emulator.launch((*plan, planted))
    assert_same_bits(case, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**31 // CHUNK, 2**32 // CHUNK + 3, 2**31 + 1])
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elements_past_the_32_bit_limit(op, chunk, dtype):
    """The only chunk listed starts past 2^31 elements; the base pointers lie so far below real memory."""
    count, begin = CHUNK - 3, chunk * CHUNK
    case = busy(op, [(count,)], dtype)
    want = by_cpp(case)
    case, buffers = guarded(case)
    table = table_of(case)
    record = table.words[HEADER:]  # numel, rows, inner, scratch, one pointer per list, then the chunk
    record[0] += begin
    for i, (name, tensors) in enumerate(case.lists.items()):
        if name in case.shaped and tensors:
            record[RECORD + i] -= begin * tensors[0].element_size()
    record[RECORD + len(case.lists)] = chunk  # of tensor 0
    emulator.emulated(op)(*case.arguments, table, **case.options_in_full)
    assert_borders_intact(buffers)
    assert_same_bits(case, want)
