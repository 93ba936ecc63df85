"""What holds for every op: accuracy, the same bits everywhere, any list, any layout, nothing written that should not be."""

import functools
import itertools
import warnings

import cases
import pytest
import torch
import truths
from cases import CPU, DEVICE, DTYPES, OPTIONS, assert_same_bits, bits, make_case, op_of, options_of

from fastcurv import _backend, _check

OPS = _backend.OPS
ELEMENTWISE = ("adam", "lookahead", "sgd")
ROW_OPS = tuple(op for op in OPS if op not in ELEMENTWISE)
COMPILED = cases.backends()
EVERY = [*COMPILED, "reference"]
VARIANTS = [(op, name) for op in OPS for name in OPTIONS[op]]
# One row of options per op in which everything that reads or writes memory does so.
BUSY = {"adam": "everything", "lookahead": "plain"}

every_op = pytest.mark.parametrize("op", OPS)
every_backend = pytest.mark.parametrize("backend", EVERY)


def busy(op, shapes=cases.AWKWARD_SHAPES, dtype="float32", **options):
    return make_case(op, shapes, dtype, **{**options_of(op, BUSY.get(op, "everything")), **options})


@functools.lru_cache(maxsize=2)
def known(op, options, dtype, shapes):
    """A case and its bounds, and the bits of cpp where it runs: they serve several back ends."""
    case = make_case(op, shapes, dtype, **options_of(op, options))
    return case, cases.bounds(case), cases.run(case, "cpp") if "cpp" in COMPILED else None


# The back end varies fastest, so that `known` is.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, options", VARIANTS)
@pytest.mark.parametrize("backend", EVERY)
def test_as_accurate_as_torch_and_the_same_bits_everywhere(backend, op, options, dtype):
    slow = backend == "triton" and _backend.interpreting()
    case, bounds, by_cpp = known(op, options, dtype, cases.SMALL_SHAPES if slow else cases.AWKWARD_SHAPES)
    result = cases.run(case, backend)
    cases.assert_as_accurate_as_torch(result, case, bounds)
    if backend in ("triton", "cuda_host") and by_cpp is not None:
        assert_same_bits(result, by_cpp)
    elif DEVICE.type == "cuda" and backend != "reference":
        # On a GPU the same is reported, not demanded: pytest's summary shows the warning.
        host = make_case(op, dtype=dtype, device=CPU, **options_of(op, options, CPU))
        if count := cases.differing(result, cases.run(host, "cpp")):
            warnings.warn(f"{backend} {op} {dtype} {options}: {count} elements differ in bits from cpp", stacklevel=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, options", VARIANTS)
def test_the_reference_is_the_published_formula(op, options, dtype):
    """No more than 64 roundings of the largest value, and one to the storage dtype; sums in torch lose little more.

    LAMB reads the moments back as they are stored, so that theirs counts too.
    """
    case = make_case(op, dtype=dtype, **options_of(op, options))
    result, wanted = cases.by_reference(case), cases.truth(case)
    scale = max(float(t.double().abs().max()) for t in itertools.chain(*case.arguments) if t.numel())
    for name, tensors in result.outputs.items():
        for i, (got, want) in enumerate(zip(tensors, wanted[name], strict=True)):
            stored = DTYPES[dtype][1] if op == "lamb" else got.dtype
            arithmetic = torch.float64 if dtype == "float64" else torch.float32
            eps = 64 * torch.finfo(arithmetic).eps + torch.finfo(got.dtype).eps + torch.finfo(stored).eps
            assert got.numel() == 0 or abs(truths.long(got) - want).max() <= eps * scale, (name, i)


# Around the elements that a block, a program or a cache holds: 2048, 8192, 32768; (2, 3) x (3, 2) rows in two tensors.
LONG_ROWS = ((3, 5), (2, 2049), (1, 8193), (2, 3, 1400), (2, 33000), (4, 1), (32769,))


@every_op
@every_backend
def test_long_rows(op, backend):
    case = busy(op, LONG_ROWS)
    result = cases.run(case, backend)
    cases.assert_as_accurate_as_torch(result, case)
    if backend in ("triton", "cuda_host"):
        assert_same_bits(result, cases.run(case, "cpp"))


@pytest.mark.parametrize("op", ELEMENTWISE)
@every_backend
def test_many_small_equal_one_large_and_unaligned(op, backend):
    whole = busy(op, [(40001,)])
    result = cases.run(whole, backend)
    edges = [0, 1, 4, 7, 300, 301, 16384, 16385, 33333, 40001]  # most pieces start at an unaligned address
    split = whole.clone()

    def pieces(name, tensor):
        if name in whole.shaped:
            return [tensor[a:b] for a, b in itertools.pairwise(edges)]
        return [tensor.clone() for _ in edges[1:]]

    parts = {name: pieces(name, tensors[0]) if tensors else [] for name, tensors in split.lists.items()}
    cases.call(cases.Case(op, parts, split.options), backend)
    for name in set(whole.shaped) & set(result.outputs):
        for got, want in zip(split[name], result[name], strict=True):
            assert torch.equal(bits(got), bits(want)), name


@pytest.mark.parametrize("op", ROW_OPS)
@every_backend
def test_neither_neighbours_nor_addresses_change_the_bits(op, backend):
    """A tensor alone, and the same tensor amid others, some elements past an aligned address."""
    shapes = [(5, 411), (2057,), (3, 2, 5, 7), (2, 5000), (3, 3)]
    together = busy(op, shapes)
    expected = cases.run(together, backend)
    for i, offset in itertools.product(range(len(shapes)), (0, 1, 3)):

        def moved(tensor, offset=offset):
            if tensor.dim() == 0:
                return tensor.clone()
            place = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=DEVICE)[offset:]
            return place.view(tensor.shape).copy_(tensor)

        alone = {name: tensors[i : i + 1] for name, tensors in together.lists.items()}
        case = cases.Case(op, alone, together.options).map(moved)
        cases.call(case, backend)
        wanted = {name: tensors[i : i + 1] for name, tensors in expected.lists.items()}
        assert_same_bits(case, cases.Case(op, wanted, together.options))


@every_op
@every_backend
def test_threads_and_repeats_give_the_same_bits(op, backend):
    slow = backend == "triton" and _backend.interpreting()
    case = busy(op, [(4001,), (3,), (3, 1500)] if slow else [(70001,), (3,), (5, 14000), (300, 99)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = cases.run(case, backend), cases.run(case, backend)
        torch.set_num_threads(2)
        two = cases.run(case, backend)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(one, again)
    if backend != "reference":  # torch's reductions depend on the number of threads
        assert_same_bits(one, two)


@every_op
@every_backend
def test_found_inf_writes_nothing(op, backend):
    case = busy(op, cases.SMALL_SHAPES, found_inf=torch.ones((), device=DEVICE))
    assert_same_bits(cases.run(case, backend), case)
    case.options["found_inf"] = torch.zeros((), device=DEVICE)
    result = cases.run(case, backend)
    case.options["found_inf"] = None
    assert_same_bits(result, cases.run(case, backend))
    assert not torch.equal(result["params"][1], case["params"][1])


@every_op
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_hyper_parameters(op, backend, dtype):
    case = busy(op, cases.SMALL_SHAPES)
    # Values that float32 holds exactly.
    numbers = {name: max(1, round(case.options_in_full[name] * 1024)) / 1024 for name in op_of(op).scalars}
    if op == "sgd":
        numbers["dampening"] = 0.0  # nesterov
    case.options.update(numbers)
    tensors = case.clone()
    tensors.options.update({name: torch.tensor(x, dtype=dtype, device=DEVICE) for name, x in numbers.items()})
    assert_same_bits(cases.run(tensors, backend), cases.run(case, backend))
    tensors.options.update({name: torch.tensor([x], dtype=dtype) for name, x in numbers.items()})  # in host memory
    assert_same_bits(cases.run(tensors, backend), cases.run(case, backend))


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def transposed(tensor):
    """The same values with dim 0 innermost in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def with_gaps(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def relaid(case, change, names=None):
    shape = case["params"][0].shape
    return case.map(lambda t: change(t) if t.shape == shape else t.clone(), case.shaped if names is None else names)


LAYOUTS = {
    "channels_last": ((6, 5, 4, 3), channels_last),
    "transposed": ((17, 9), transposed),
    "transposed-4d": ((6, 5, 4, 3), transposed),
    "long-rows-transposed": ((3, 2500), transposed),
}


@every_op
@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_dense_layout(op, backend, layout):
    shape, change = LAYOUTS[layout]
    plain = busy(op, [shape, (7,)])
    case = relaid(plain, change)
    assert not case["params"][0].is_contiguous()
    result = cases.run(case, backend)
    assert all(result[name][0].stride() == case[name][0].stride() for name in case.shaped if case[name])
    cases.assert_as_accurate_as_torch(result, plain)
    if op in ELEMENTWISE:
        assert_same_bits(result, cases.run(plain, backend))


@pytest.mark.parametrize("op", [op for op in OPS if "grads" in op_of(op).lists])
@every_backend
@pytest.mark.parametrize(
    "shape, change", [((6, 5, 4, 3), channels_last), ((17, 9), transposed), ((4, 1, 3), with_gaps)]
)
def test_gradients_are_read_only_and_may_have_another_layout(op, backend, shape, change):
    plain = busy(op, [shape])
    other = relaid(plain, change, ["grads"])
    grad = other["grads"][0]
    copy, strides, version = grad.clone(), grad.stride(), grad._version
    cases.call(other, backend)
    assert other["grads"][0] is grad and grad.stride() == strides != plain["grads"][0].stride()
    assert torch.equal(bits(grad), bits(copy)) and grad._version == version
    assert_same_bits(other, cases.run(plain, backend))


@every_op
def test_size_one_dimensions_may_have_any_stride(op):
    case = busy(op, [(100, 100, 1)])
    names = [name for name in ("grads", "slow_buffers", "exp_avgs") if name in case.lists]
    noisy = case.map(lambda t: t.clone().as_strided((100, 100, 1), (100, 1, 77)), names)
    cases.call(noisy, None)
    assert_same_bits(noisy, cases.run(case, None))


@every_op
@every_backend
@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (0, 3)], [(0,), (5,)], [(5,), (3, 0)], [(5,), (0,), (2, 5)]])
def test_empty_tensors_anywhere(op, backend, shapes):
    case = busy(op, shapes)
    result = cases.run(case, backend)
    cases.assert_as_accurate_as_torch(result, case)
    assert all(a == b + 1 for a, b in zip(result.lists.get("steps", ()), case.lists.get("steps", ()), strict=True))


@every_op
def test_empty_list(op):
    op_of(op)(*[[] for _ in op_of(op).lists], **({"momentum": 0.0} if op == "sgd" else {}))


@every_op
@pytest.mark.parametrize("backend", COMPILED)
def test_lists_longer_than_any_by_value_table(op, backend):
    count = 100 if backend == "triton" and _backend.interpreting() else 1000
    case = busy(op, [(n % 5,) if n % 3 else (n % 4, 3) for n in range(count)])
    cases.assert_as_accurate_as_torch(cases.run(case, backend), case)


@every_op
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_end_where_torch_arithmetic_puts_them(op, backend, dtype):
    case = busy(op, [(3, 8), (40,), (2, 3, 2, 2), (4, 6)], dtype)
    source = "grads" if "grads" in case.lists else "params"
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        case[source][i].view(-1)[i::7] = value
    result, expected = cases.run(case, backend), cases.by_reference(case)
    for name, tensors in result.outputs.items():
        for got, want in zip(tensors, expected[name], strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(got), kind(want)), (name, kind)


@every_op
@every_backend
def test_version_counters_advance_where_something_was_written(op, backend):
    if backend == "cuda_host":
        pytest.skip("calls the kernel, not the op")
    case = busy(op, [(3, 4), (5,)], **({"k": 1} if op == "ranger" else {}))
    before = {name: [t._version for t in tensors] for name, tensors in case.lists.items()}
    cases.call(case, backend)
    for name, tensors in case.lists.items():
        for tensor, version in zip(tensors, before[name], strict=True):
            assert (tensor._version > version) == (name in case.outputs), name


@every_op
def test_states_beside_a_parameter(op):
    """The table of kinds, which factories and optimizers go by, says of every list what the op then accepts."""
    case = busy(op, [(3, 4), (5,), ()])
    for name in case.lists:
        assert _check.kind(name) in ("param", "grad", "state", "exact", "row", "one", "count")
    cases.call(case, None)
