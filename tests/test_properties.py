"""Properties over random lists: shapes, layouts, dtypes, list lengths, offsets, options (hypothesis)."""

import itertools
import os

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, assert_same_bits, bits, make_case, op_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from training import OURS, PAIRS, make

from fastcurv import _backend, _check

OPS = _backend.OPS
ELEMENTWISE = ("adam", "lookahead", "sgd")

# The autouse fixture that poisons allocations holds for a whole test, all its examples included.
quick = settings(
    max_examples=30,
    deadline=None,
    derandomize=not os.environ.get("FASTCURV_TEST_SEED", "").strip(),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

sizes = st.integers(0, 6)
shapes = st.lists(st.lists(sizes, max_size=4).map(tuple), min_size=1, max_size=6)
below_one = st.floats(0, 0.999)
SCALARS = {"eps": st.floats(1e-6, 1), "n_sma_threshold": st.floats(4, 6), "alpha": st.floats(0, 1)}
SCALARS |= {name: below_one for name in ("beta", "beta1", "beta2", "momentum", "dampening")}
CHOICES = {"rule": st.sampled_from(("adam", "amsgrad", "radam", "nadam", "yogi")), "k": st.integers(1, 4)}


def options(op):
    scalars = {name: SCALARS.get(name, st.floats(0, 1)) for name in op_of(op).scalars}
    choices = {name: CHOICES.get(name, st.booleans()) for name in op_of(op).options}
    return st.fixed_dictionaries({**scalars, **choices})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [*cases.backends(), "reference"])
def test_as_accurate_as_torch_and_the_same_bits_everywhere(backend, op):
    @quick
    @given(
        shapes=shapes, dtype=st.sampled_from(list(DTYPES)), options=options(op), step=st.integers(0, 9), seed=st.integers(0, 99)
    )  # fmt: skip
    def check(shapes, dtype, options, step, seed):
        generator = torch.Generator().manual_seed(seed)
        case = make_case(op, shapes, dtype, generator=generator, step=float(step), **options)
        result = cases.run(case, backend)
        cases.assert_as_accurate_as_torch(result, case)
        if backend not in ("cpp", "reference") and DEVICE.type == "cpu":  # across CPU and GPU, measured instead
            assert_same_bits(result, cases.run(case, "cpp"))

    check()


@pytest.mark.parametrize("op", ELEMENTWISE)
@quick
@given(
    length=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    offset=st.integers(0, 7),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_partition_at_any_offset_gives_the_same_bits(op, length, cuts, offset, dtype):
    rule = {"rule": "amsgrad"} if op == "adam" else {}
    whole = make_case(op, [(length,)], dtype, **rule)
    expected = cases.run(whole, None)
    edges = sorted({0, length, *(c for c in cuts if c < length)})

    def pieces(name, tensor):
        if name not in whole.shaped:
            return [tensor.clone() for _ in edges[1:]]
        moved = torch.empty(length + offset, dtype=tensor.dtype, device=DEVICE)[offset:].copy_(tensor)
        return [moved[a:b] for a, b in itertools.pairwise(edges)]

    lists = {name: pieces(name, tensors[0]) if tensors else [] for name, tensors in whole.lists.items()}
    split = cases.Case(op, lists, whole.options)
    cases.call(split, None)
    for name in set(split.outputs) & set(whole.shaped):
        if split[name]:
            assert torch.equal(bits(torch.cat(split[name])), bits(expected[name][0]))


@pytest.mark.parametrize("name", OURS)
@quick
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_permuted_layout(name, shape, seed):
    """Parameter and gradient each in a permutation of dimensions of its own; float64, for sums may change their order."""
    generator = torch.Generator().manual_seed(seed)

    def permuted(tensor):
        order = torch.randperm(tensor.dim(), generator=generator).tolist()
        inverse = [order.index(d) for d in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(inverse)

    value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2))
    p, q = nn.Parameter(permuted(value)), nn.Parameter(value.clone())
    p.grad, q.grad = permuted(grad), grad
    a, b = make(name, [p]), make(name, [q])
    for _ in range(3):
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert all(_check.layout(s) == _check.layout(p) for s in a.state[p].values() if s.shape == p.shape != ())


@quick
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    strides=st.lists(st.integers(0, 8), min_size=4, max_size=4),
)
def test_is_dense_means_each_address_once(shape, strides):
    """Against enumeration of the addresses."""
    strides = strides[: len(shape)]
    tensor = torch.empty(4 * 8 * 4 + 1).as_strided(shape, strides)
    addresses = {0}
    for n, s in zip(shape, strides, strict=True):
        addresses = {a + i * s for a in addresses for i in range(n)}
    count = 1
    for n in shape:
        count *= n
    assert _check.is_dense(tensor) == (count == 0 or addresses == set(range(count)))


@pytest.mark.parametrize("name", PAIRS)
@quick
@given(
    missing=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8),
    split=st.integers(1, 3),
)
def test_missing_gradients_and_groups_as_torch(name, missing, split):
    def parameters():
        return [nn.Parameter(torch.full((n + 1,), float(n), dtype=torch.float64, device=DEVICE)) for n in range(4)]

    other = {"momentum": 0.5, "dampening": 0.2} if name == "SGD" else {"betas": (0.5, 0.9)}
    theirs, mine = parameters(), parameters()
    a, b = (
        cls([{"params": params[:split]}, {"params": params[split:], "lr": 0.3, **other}], lr=0.01, **options)
        for cls, params, options in zip(PAIRS[name], (theirs, mine), ({"foreach": False}, {}), strict=True)
    )
    for t, absent in enumerate(missing):
        for params, optimizer in ((theirs, a), (mine, b)):
            for i, p in enumerate(params):
                p.grad = None if absent[i] else torch.full_like(p, (t + 1.0) * (-1) ** i)
            optimizer.step()
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)
        assert set(a.state[p]) == set(b.state.get(q, {}))
        for key, value in a.state[p].items():
            torch.testing.assert_close(b.state[q][key], value, rtol=1e-12, atol=1e-12, check_dtype=False)
