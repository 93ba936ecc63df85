"""adam.cuh in the host emulator: the same bits as the C++ back end, whatever the list, the grid and the thread order."""

import struct

import pytest
import torch
from cases import ADAM_OPTIONS, DTYPES, Case, adam_case, adam_options, bits, full
from cuda_host import emulator

from fastcurv import _C

CPU = torch.device("cpu")
CHUNK = 2048
NAMES = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"]
TICKET = 4  # table.h
ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]

# Around the widths of packs (2, 4, 8) and around one and two chunks, with nothing first, in the middle and last.
SHAPES = [(0,), (1,), (3,), (), (7,), (8,), (0, 3), (9,), (17,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (5, 821), (0,)]


def guarded(case: Case, offset: int = 0, which: tuple[str, ...] = tuple(NAMES[:5])) -> tuple[Case, list[torch.Tensor]]:
    """A copy with every tensor amid a border of its own; those of the lists in `which` start `offset` elements late."""
    buffers = []

    def embed(name, tensor):
        border = 16 + (offset if name in which else 0)  # 16 elements of any dtype keep torch's 64-byte alignment
        buffer = torch.full([tensor.numel() + 48], 1.5, dtype=tensor.dtype)
        inner = buffer[border : border + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        buffers.append((buffer, border, tensor.numel()))
        return inner

    lists = [[embed(name, t) for t in tensors] for name, tensors in zip(NAMES, case.lists, strict=True)]
    return Case(*lists, options=dict(case.options)), buffers


def assert_borders_intact(buffers):
    for buffer, start, count in buffers:
        assert (buffer[:start] == 1.5).all() and (buffer[start + count :] == 1.5).all()


def table_of(case: Case) -> torch.Tensor:
    builder = _C.ChunkTable([name != "grads" for name in NAMES])
    builder.update(case.lists, NAMES, True)
    table = torch.empty(builder.words(CHUNK), dtype=torch.int64)
    builder.write(table.data_ptr(), CHUNK)
    return table


def arguments(case: Case, table: torch.Tensor) -> tuple[list, dict]:
    return [*case.lists, table], full(case.options)


def by_cpp(case: Case) -> Case:
    case = case.clone()
    args, kwargs = arguments(case, table_of(case))
    _C.adam_(*args, **kwargs)
    return case


def by_emulator(case: Case, *, offset=0, which=tuple(NAMES[:5]), launches=1, **how) -> Case:
    case, buffers = guarded(case, offset, which)
    table = table_of(case)
    before = table.clone()
    args, kwargs = arguments(case, table)
    for _ in range(launches):
        emulator.emulated("adam", **how)(*args, **kwargs)
    assert_borders_intact(buffers)
    assert torch.equal(table, before)  # the ticket is back at zero, and nothing else was written
    return case


def assert_same_bits(got: Case, want: Case) -> None:
    for name, got_list, want_list in zip(NAMES, got.lists, want.lists, strict=True):
        for i, (x, y) in enumerate(zip(got_list, want_list, strict=True)):
            assert x.dtype == y.dtype and torch.equal(bits(x), bits(y)), f"{name}[{i}] {tuple(x.shape)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_equals_cpp(options, dtype, generator):
    case = adam_case(SHAPES, dtype, device=CPU, generator=generator, **adam_options(options, CPU))
    assert_same_bits(by_emulator(case), by_cpp(case))


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_any_grid_and_any_order_give_the_same_bits(order, seed, blocks, generator):
    case = adam_case(SHAPES, device=CPU, generator=generator, weight_decay=0.1, amsgrad=True)
    assert_same_bits(by_emulator(case, order=order, seed=seed, blocks=blocks), by_cpp(case))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_every_chunk_may_have_another_step(order, seed, generator):
    """Coefficients go from one thread to all the others once per chunk: the barriers around that are needed."""
    case = adam_case([(300,)] * 9, device=CPU, generator=generator)
    for i, step in enumerate(case.steps):
        step.fill_(7 * i % 9)
    assert_same_bits(by_emulator(case, blocks=2, order=order, seed=seed), by_cpp(case))


@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (3, 0), (0,)]])
@pytest.mark.parametrize("blocks", [None, 3])
def test_nothing_but_empty_tensors(shapes, blocks, generator):
    case = adam_case(shapes, device=CPU, generator=generator)
    result = by_emulator(case, blocks=blocks)
    assert [step.item() for step in result.steps] == [step.item() + 1 for step in case.steps]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_lists(offset, amsgrad, dtype, generator):
    case = adam_case(SHAPES, dtype, device=CPU, generator=generator, amsgrad=amsgrad)
    want = by_cpp(case)
    for which in [tuple(NAMES[:5]), *[(name,) for name in NAMES[: 5 if amsgrad else 4]]]:
        assert_same_bits(by_emulator(case, offset=offset, which=which), want)


def test_a_second_launch_goes_on_where_the_first_ended(generator):
    case = adam_case(SHAPES, device=CPU, generator=generator, amsgrad=True)
    assert_same_bits(by_emulator(case, launches=3), by_cpp(by_cpp(by_cpp(case))))


def test_as_many_tensors_as_a_model_has(generator):
    case = adam_case([(i % 23,) for i in range(700)], device=CPU, generator=generator)
    assert_same_bits(by_emulator(case), by_cpp(case))


def test_nan_and_inf_end_where_they_end_in_cpp(generator):
    case = adam_case([(64,), (9,)], device=CPU, generator=generator, amsgrad=True)
    for grad in case.grads:
        grad[2::5] = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(5)[: len(grad[2::5])]
    # Not their bits: which of two NaNs an addition returns is the compiler's choice.
    for got_list, want_list in zip(by_emulator(case).lists, by_cpp(case).lists, strict=True):
        for got, want in zip(got_list, want_list, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("found_inf", "skips"), [(1.0, True), (0.0, False)])
def test_found_inf(found_inf, skips, generator):
    case = adam_case(SHAPES, device=CPU, generator=generator, amsgrad=True, found_inf=torch.tensor(found_inf))
    if skips:
        assert_same_bits(by_emulator(case), case)
    else:
        del case.options["found_inf"]
        want = by_cpp(case)
        case.options["found_inf"] = torch.tensor(found_inf)
        assert_same_bits(by_emulator(case), want)


def test_a_skipped_launch_draws_no_ticket(generator):
    case = adam_case([(5,)], device=CPU, generator=generator, found_inf=torch.tensor(1.0))
    table = table_of(case)
    table[TICKET] = 123
    args, kwargs = arguments(case, table)
    emulator.emulated("adam", blocks=3)(*args, **kwargs)
    assert table[TICKET] == 123


@pytest.mark.parametrize("name", ["lr", "beta1", "beta2", "eps", "weight_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyper_parameters_in_device_memory(name, dtype, generator):
    """On a GPU the kernel reads a tensor hyper-parameter; here the plan holds its value, so the address is planted."""
    case = adam_case(SHAPES, device=CPU, generator=generator, weight_decay=0.2)
    value = torch.tensor(case.options[name] * 0.8, dtype=dtype)
    want = by_cpp(Case(*case.lists, options={**case.options, name: value}))
    case = case.clone()
    args, kwargs = arguments(case, table_of(case))
    *plan, packed = _C.adam_kernel(*args, **kwargs)
    # AdamArgs: table, then five Scalars {value, as_float, as_double} (table.h).
    start = 8 + 24 * ["lr", "beta1", "beta2", "eps", "weight_decay"].index(name)
    assert struct.unpack_from("dPP", packed, start) == (case.options[name], 0, 0)
    addresses = (value.data_ptr(), 0) if dtype == torch.float32 else (0, value.data_ptr())
    planted = packed[:start] + struct.pack("dPP", float("nan"), *addresses) + packed[start + 24 :]
    emulator.launch((*plan, planted))
    assert_same_bits(case, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**31 // CHUNK, 2**32 // CHUNK + 3, 2**31 + 1])
def test_elements_past_the_32_bit_limit(chunk, dtype, generator):
    """The only chunk listed starts past 2^31 elements; the base pointers lie so far below real memory."""
    count, begin = CHUNK - 3, chunk * CHUNK
    case = adam_case([(count,)], dtype, device=CPU, generator=generator, amsgrad=True)
    want = by_cpp(case)
    case, buffers = guarded(case)
    table = table_of(case)
    record = table[8:]  # numel, one pointer per list, then the chunk
    record[0] += begin
    for i, (tensor,) in enumerate(case.lists[:5]):
        record[1 + i] -= begin * tensor.element_size()
    record[7] = chunk  # of tensor 0
    args, kwargs = arguments(case, table)
    emulator.emulated("adam")(*args, **kwargs)
    assert_borders_intact(buffers)
    assert_same_bits(case, want)
