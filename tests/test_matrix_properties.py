"""Properties of the ops on matrices over random lists: shapes, layouts, dtypes, ranks, conditions, scales (hypothesis)."""

import math

import pytest
import torch
from cases import DEVICE, bits, matrix_backends
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from spectra import (
    UNIT,
    assert_gram_schmidt,
    orthonormality,
    polar_truth,
    rounding,
    steps_error,
    steps_of,
    steps_truth,
    threshold,
    wide,
    with_singular_values,
)
from test_orthogonalize import two_threads  # noqa: F401
from test_properties import quick

from fastcurv.ops import gram_schmidt, newton_schulz, orthogonalize, polar

thorough = settings(quick, max_examples=80)
BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Up to here a kernel of the CPU's works on a matrix, whatever else is in the list.
ALONE = {"polar": polar.SMALL, "gram_schmidt": gram_schmidt.LONE_ROWS - 1, "newton_schulz": newton_schulz.SMALL}

LAYOUTS = ("contiguous", "transposed", "sliced", "channels_last")
sides, large = st.integers(1, 12) | st.integers(1, 150), st.sampled_from((64, 65, 128, 129, 150))
few, pairs, dtypes = st.integers(1, 3), st.tuples(sides, sides) | st.tuples(large, large), st.sampled_from(list(UNIT))
finite, spoilt = st.just(0.0), st.sampled_from((0.0, 0.0, 0.0, 0.0, math.nan, math.inf, -math.inf))


def make(dtype, *, shape, rank, decades, scale, layout, dead, same, bad, seed):
    """A tensor with singular values down to 10^-decades of the first, the last of them zero, lines dead or twice."""
    flat = shape[0], math.prod(shape[1:])
    kept = torch.logspace(0, -decades, min(flat), dtype=torch.float64)[: round(rank * min(flat))]
    matrix = with_singular_values(flat, kept, torch.Generator().manual_seed(seed), torch.float64)
    matrix *= 10 ** (scale / 10 if dtype == torch.float16 else scale)
    wide(matrix)[-1] = wide(matrix)[0 if same else -1]
    for dim in dead:
        matrix.select(dim, flat[dim] // 2).zero_()
    matrix[0, 0] += bad
    tensor = matrix.to(dtype).view(shape)
    if layout == "transposed":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        around = tensor.new_full((shape[0] + 1, *shape[1:-1], 2 * shape[-1]), math.nan)
        return around[1:, ..., 1::2].copy_(tensor)
    formats = {"channels_last": torch.channels_last} if len(shape) == 4 else {}
    return tensor.contiguous(memory_format=formats.get(layout, torch.contiguous_format))


def drawn(dtype, bad=finite):
    return st.builds(
        make, st.just(dtype), bad=bad, seed=st.integers(0, 99), scale=st.floats(-30, 30), same=st.booleans(),
        shape=pairs | st.tuples(sides, st.integers(1, 50), few) | st.tuples(sides, few, few, few),
        rank=st.just(1.0) | st.floats(0, 1), decades=st.floats(0, 8) | st.just(8.0),
        dead=st.sampled_from(((), (0,), (1,), (0, 1))), layout=st.sampled_from(LAYOUTS),
    )  # fmt: skip


lists = dtypes.flatmap(lambda dtype: st.lists(drawn(dtype, spoilt), max_size=8))


def run(matrices, method, backend, **options):
    """Of each its matrix, the result and info, after what every call promises."""
    before = [bits(matrix).clone() for matrix in matrices]
    info = torch.full((len(matrices),), 99, dtype=torch.int32, device=DEVICE)
    results = orthogonalize(matrices, method=method, info=info, backend=backend, **options)
    for matrix, was, result, found in zip(matrices, before, results, info.tolist(), strict=True):
        assert torch.equal(bits(matrix), was)
        assert result.dtype == matrix.dtype and result.shape == matrix.shape
        assert result.stride() == torch.empty_like(matrix).stride()
        assert (found == -2 and not result.any()) if not matrix.isfinite().all() else found >= 0
    return [(m.flatten(1), r.flatten(1), i) for m, r, i in zip(matrices, results, info.tolist(), strict=True)]


def by_gram(matrix, backend):
    return matrix.dtype != torch.float64 and backend != "reference"


def polar_bound(matrix, backend):
    """Of what is orthonormal: rounding in float64, once in storing, and what polar calls orthonormal."""
    enough = by_gram(matrix, backend) * 4 * math.sqrt(max(matrix.shape)) * polar.ORTHONORMAL
    return rounding(matrix.double()) + 2 * math.sqrt(min(matrix.shape)) * UNIT[matrix.dtype] + enough


def polar_error(matrix, sigma, rank, backend):
    """Error of the factor: rounding over the gap below the smallest singular value kept, squared in a Gram matrix.

    Singular vectors add their own, in the result and in the truth: LAPACK applies about four rotations to each vector
    for every singular value, each rotation is off by 6 u (Higham, 2002, lemma 19.8), and their sum exceeds four times
    its standard deviation with negligible probability.
    """
    gap = sigma[rank - 1] - (sigma[rank] if rank < len(sigma) else 0)
    grown = (sigma[0] / gap) ** (1 + by_gram(matrix, backend))
    turned = 4 * 6 * math.sqrt(4 * 4 * rank) * UNIT[torch.float64]
    return rounding(matrix.double()) * grown + turned + math.sqrt(rank) * UNIT[matrix.dtype]


def assert_polar(matrix, result, info, backend):
    g, o, rank, bound = matrix.double(), result.double(), min(matrix.shape) - info, polar_bound(matrix, backend)
    (truth, sigma, zero), slack, power = polar_truth(matrix), rounding(g), 1 + by_gram(matrix, backend)
    assert all(rank <= int((g != 0).any(dim=dim).sum()) for dim in (0, 1))
    if not g.any():
        return
    # As close to the threshold rounding decides; of a Gram matrix the eigenvalues are squares.
    over = (sigma / sigma[0]) ** power - threshold(matrix) ** power
    assert int((over <= -slack).sum()) <= info <= int((over <= slack).sum())
    assert torch.linalg.matrix_rank(o, rtol=0.5) == rank and orthonormality(o) <= bound
    inner, tail = (o * g).sum() / sigma.sum(), sigma[rank:].sum() / sigma.sum()
    assert 1 - bound - tail <= inner <= 1 + bound
    root = wide(o) @ wide(g).mT
    assert torch.linalg.matrix_norm(root - root.mT, ord=2) <= 2 * bound * sigma[0]
    assert torch.linalg.eigvalsh(root + root.mT).min() >= -2 * bound * sigma[0]
    assert not o[(g == 0).all(dim=1)].any() and not o[:, (g == 0).all(dim=0)].any()
    if info == zero:
        assert torch.linalg.matrix_norm(o - truth, ord=2) <= polar_error(matrix, sigma, rank, backend)


# Of which torch's singular value decomposition has vectors that are 6e-7 from orthonormal.
half = make(
    torch.float64, shape=(129, 128), rank=51 / 128, decades=8.0, scale=5.0, layout="sliced", dead=(), same=True, bad=0.0,
    seed=43,
)  # fmt: skip
# The vectors of its smallest singular values reach into the dead row and column: those values are nearly rounding.
dead = make(
    torch.float64, shape=(64, 65), rank=1.0, decades=15.0, scale=0.0, layout="contiguous", dead=(0, 1), same=True,
    bad=0.0, seed=0,
)  # fmt: skip


@every_backend
@thorough
@example(matrices=[half])
@example(matrices=[dead])
@given(matrices=lists)
def test_polar_is_the_nearest_isometry(backend, matrices):
    for matrix, result, info in run(matrices, "polar", backend):
        if info != -2:
            assert_polar(matrix, result, info, backend)


@every_backend
@thorough
@given(matrix=dtypes.flatmap(drawn), seed=st.integers(0, 99))
def test_polar_of_what_is_permuted_transposed_or_twice_as_large(backend, matrix, seed):
    matrix = matrix.flatten(1)
    order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    _, results, info = zip(*run([matrix, matrix[order], matrix.mT, 2 * matrix], "polar", backend), strict=True)
    sigma, rank = torch.linalg.svdvals(matrix.double()), min(matrix.shape) - info[0]
    for found, other in zip(info[1:], (results[1], results[2].mT[order], results[3][order]), strict=True):
        if found == info[0] and rank:
            error = torch.linalg.matrix_norm(other.double() - results[0][order].double(), ord=2)
            assert error <= 2 * polar_error(matrix, sigma, rank, backend)


@pytest.mark.parametrize(
    "method, backend",
    # The reference has polar factors of LAPACK's singular value decomposition.
    [(method, name) for method in ALONE for name in BACKENDS if (method, name) != ("polar", "reference")],
)
@thorough
@given(matrix=dtypes.flatmap(drawn), exponents=st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_powers_of_two_change_no_bit(backend, method, matrix, exponents):
    """A factor of the matrix, or of each row in Gram-Schmidt, scales sums without rounding."""
    matrix, by_row = matrix.flatten(1), method == "gram_schmidt"
    assume(method != "polar" or matrix.dtype != torch.float64)  # LAPACK's singular value decomposition
    assume(method == "newton_schulz" or min(matrix.shape) <= ALONE[method])  # others take roots, and mix rows
    factors = matrix.new_tensor([[2.0 ** exponents[by_row * i % len(exponents)]] for i in range(min(matrix.shape))])
    scaled = matrix * (factors if len(matrix) == len(factors) else factors.mT)
    assume(torch.equal(wide(scaled) / factors, wide(matrix)))  # nothing has vanished
    (_, result, info), (_, other, found) = run([matrix, scaled], method, backend)
    assert info == found and torch.equal(result, other)


@pytest.mark.usefixtures("two_threads")  # which take another way with what is most of the work
@every_backend
@thorough
@given(matrices=lists)
@example(matrices=[with_singular_values((129, 150), range(1, 130), torch.Generator().manual_seed(0))])
def test_gram_schmidt_is_a_triangular_factorisation(backend, matrices):
    for matrix, result, info in run(matrices, "gram_schmidt", backend):
        if info != -2:
            assert_gram_schmidt(matrix, result, info)


@every_backend
@thorough
@given(row=st.lists(st.integers(-40, 40), min_size=2, max_size=20).filter(any), dtype=dtypes)
def test_a_row_that_is_there_twice_counts_once(backend, row, dtype):
    matrix = torch.tensor([row, row], dtype=dtype, device=DEVICE)
    ((_, result, info),) = run([matrix], "gram_schmidt", backend)
    assert info == 1 and not result[1].any()


@every_backend
@pytest.mark.parametrize("coefficients", newton_schulz.COEFFICIENTS)
@thorough
@given(matrices=lists, count=st.integers(1, 9))
def test_newton_schulz_as_polynomials_of_singular_values(backend, coefficients, matrices, count):
    steps = steps_of(coefficients, count)
    for matrix, result, info in run(matrices, "newton_schulz", backend, coefficients=coefficients, steps=count):
        assert info in (0, -2) and not result[(matrix == 0).all(dim=1)].any()
        if info == 0:
            truth, unit = steps_truth(matrix, steps), UNIT[matrix.dtype]
            # 16-bit numbers are worked on in float32.
            bound = steps_error(matrix, steps, min(unit, UNIT[torch.float32]))
            assert (result - truth).norm() <= bound + unit * truth.norm()


@every_backend
@pytest.mark.parametrize("method", ALONE)
@thorough
@given(matrices=lists)
def test_others_in_the_list_change_nothing(backend, method, matrices):
    """To the bit, where no product of torch's is in the way; what is in the way the tests above bound."""
    done = run(matrices, method, backend)
    again = run(matrices, method, None if backend == BACKENDS[0] else backend)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(done, again, strict=True))
    left = run([m for m, (_, _, info) in zip(matrices, done, strict=True) if info != -2], method, backend)
    for one, other in zip([one for one in done if one[2] != -2], left, strict=True):
        if backend == "cpp" and (method == "gram_schmidt" or one[0].dtype != torch.float64):
            assert min(one[0].shape) > ALONE[method] or (one[2] == other[2] and torch.equal(one[1], other[1]))


@every_backend
@pytest.mark.parametrize("method", ["polar", "gram_schmidt"])
@thorough
@given(matrices=lists)
def test_completed_sets_are_whole(backend, method, matrices):
    done, again = (run(matrices, method, backend, rank_policy="complete") for _ in range(2))
    assert all(torch.equal(one[1], other[1]) for one, other in zip(done, again, strict=True))
    for matrix, result, info in done:
        bound = polar_bound(matrix, backend) + (rounding(matrix) if method == "gram_schmidt" else 0.0)
        if info != -2:
            assert orthonormality(result) <= bound and torch.linalg.svdvals(result.double()).min() > 0.5
