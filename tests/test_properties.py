"""Properties over random lists: shapes, layouts, dtypes, list lengths, offsets, options (hypothesis)."""

import itertools

import cases
import pytest
import torch
from cases import DEVICE, DTYPES, adam_case, assert_same_bits, bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastcurv
from fastcurv import _check

# The autouse fixture that poisons allocations holds for a whole test, all its examples included.
quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

sizes = st.integers(0, 6)
shapes = st.lists(st.lists(sizes, max_size=4).map(tuple), min_size=1, max_size=6)
unit = st.floats(0, 0.999)
options = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "beta1": unit,
        "beta2": unit,
        "eps": st.floats(1e-6, 1),
        "weight_decay": st.floats(0, 1),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("backend", cases.backends())
@quick
@given(
    shapes=shapes, dtype=st.sampled_from(list(DTYPES)), options=options, amsgrad=st.booleans(), seed=st.integers(0, 99)
)
def test_as_accurate_as_torch(backend, shapes, dtype, options, amsgrad, seed):
    generator = torch.Generator().manual_seed(seed)
    case = adam_case(shapes, dtype, generator=generator, amsgrad=amsgrad, **options)
    cases.assert_as_accurate_as_torch(cases.run_adam(case, backend), case)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="across CPU and GPU, measured instead")
@pytest.mark.parametrize("backend", [b for b in cases.backends() if b != "cpp"])
@quick
@given(
    shapes=shapes, dtype=st.sampled_from(list(DTYPES)), options=options, amsgrad=st.booleans(), seed=st.integers(0, 99)
)
def test_back_ends_agree_bit_for_bit(backend, shapes, dtype, options, amsgrad, seed):
    generator = torch.Generator().manual_seed(seed)
    case = adam_case(shapes, dtype, generator=generator, amsgrad=amsgrad, **options)
    assert_same_bits(cases.run_adam(case, backend), cases.run_adam(case, "cpp"))


@quick
@given(
    length=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=12),
    offset=st.integers(0, 7),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_partition_at_any_offset_gives_the_same_bits(length, cuts, offset, dtype):
    whole = adam_case([(length,)], dtype, amsgrad=True, weight_decay=0.1)
    expected = cases.run_adam(whole, None)
    edges = sorted({0, length, *(c for c in cuts if c < length)})

    def pieces(tensor):
        moved = torch.empty(length + offset, dtype=tensor.dtype, device=DEVICE)[offset:].copy_(tensor)
        return [moved[a:b] for a, b in itertools.pairwise(edges)]

    lists = [pieces(tensors[0]) for tensors in whole.lists[:5]]
    steps = [whole.steps[0].clone() for _ in edges[1:]]
    fastcurv.ops.adam_(*lists, steps, **whole.options)
    for got, want in zip((lists[0], *lists[2:]), expected.outputs, strict=False):
        assert torch.equal(bits(torch.cat(got)), bits(want[0]))


@quick
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_permuted_layout(shape, seed):
    """Parameter and gradient each in a permutation of dimensions of its own."""
    generator = torch.Generator().manual_seed(seed)

    def permuted(tensor):
        order = torch.randperm(tensor.dim(), generator=generator).tolist()
        inverse = [order.index(d) for d in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(inverse)

    value, grad = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    p, q = nn.Parameter(permuted(value)), nn.Parameter(value.clone())
    p.grad, q.grad = permuted(grad), grad
    a, b = fastcurv.Adam([p], lr=0.1), fastcurv.Adam([q], lr=0.1)
    for _ in range(2):
        a.step()
        b.step()
    assert torch.equal(p, q)


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


@quick
@given(
    missing=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6),
    split=st.integers(1, 3),
)
def test_missing_gradients_and_groups_as_torch(missing, split):
    def parameters():
        return [nn.Parameter(torch.full((n + 1,), float(n), dtype=torch.float64, device=DEVICE)) for n in range(4)]

    def groups(params):
        return [{"params": params[:split]}, {"params": params[split:], "lr": 0.3, "amsgrad": True}]

    theirs, mine = parameters(), parameters()
    a, b = torch.optim.AdamW(groups(theirs), foreach=False), fastcurv.AdamW(groups(mine))
    for t, absent in enumerate(missing):
        for params, optimizer in ((theirs, a), (mine, b)):
            for i, p in enumerate(params):
                p.grad = None if absent[i] else torch.full_like(p, (t + 1.0) * (-1) ** i)
            optimizer.step()
    for p, q in zip(theirs, mine, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)
        assert set(a.state[p]) == set(b.state[q])
        assert all(torch.allclose(a.state[p][k].double(), b.state[q][k].double(), rtol=1e-13) for k in a.state[p])
