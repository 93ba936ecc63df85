"""The op `polar` against the singular value decomposition in float64."""

import math

import pytest
import spectra
import torch
from cases import DEVICE, matrix_backends
from spectra import SHAPES, UNIT, logarithmic, orthonormality, polar_truth, with_singular_values

from fastcurv.ops import orthogonalize
from fastcurv.ops.newton_schulz import _in_gram_space, newton_schulz
from fastcurv.ops.polar import SMALL, schedule

BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def polar(matrix, backend, **options):
    info = torch.full((1,), 99, dtype=torch.int32, device=DEVICE)
    (result,) = orthogonalize([matrix], info=info, backend=backend, **options)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype and result.stride() == matrix.stride()
    return result, info.item()


@every_backend
@every_shape
@pytest.mark.parametrize("decades", [0.3, 2, 4, 5])
def test_error_up_to_condition_1e5(backend, shape, decades, generator):
    matrix = logarithmic(shape, decades, generator)
    truth, sigma, _ = polar_truth(matrix)
    result, info = polar(matrix, backend)
    condition = (sigma[0] / sigma[-1]).item()
    error = torch.linalg.matrix_norm(result.double() - truth, ord=2)
    # Of float64's Gram matrix the smallest eigenvalue has lost condition^2 roundings; storing rounds each entry once.
    stored = UNIT[torch.float32] * math.sqrt(min(shape))
    assert error <= 2 * stored + 20 * condition**2 * UNIT[torch.float64] and error <= max(1e-6, 20 * condition * 2**-24)
    assert info == 0 and orthonormality(result) <= 5e-7


@every_backend
@every_shape
@pytest.mark.parametrize("decades", [6, 7, 9])
def test_invariants_beyond_condition_1e5(backend, shape, decades, generator):
    matrix = logarithmic(shape, decades, generator)
    _, sigma, _ = polar_truth(matrix)
    result, info = polar(matrix, backend)
    limit = spectra.threshold(matrix) * sigma[0]
    # Of singular values within a hundredth of the threshold rounding decides.
    least, most = (int((sigma <= limit * factor).sum()) for factor in (0.99, 1.01))
    assert least <= info <= most
    rank = min(shape) - info
    assert torch.linalg.matrix_rank(result.double(), rtol=0.5) == rank and orthonormality(result) <= 1e-5
    inner = (result.double() * matrix.double()).sum() / sigma.sum()
    assert 1 - 1e-6 - sigma[rank:].sum() / sigma.sum() <= inner <= 1 + 1e-6
    symmetric = result.double() @ matrix.double().mT if shape[0] <= shape[1] else matrix.double().mT @ result.double()
    assert torch.linalg.eigvalsh((symmetric + symmetric.mT) / 2).min() >= -1e-5 * sigma[0]
    assert torch.linalg.matrix_norm(symmetric - symmetric.mT) <= 1e-4 * sigma[0]


@every_backend
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (150, 180)], ids=str)
@pytest.mark.parametrize("policy", ["isometry", "complete"])
def test_ranks(backend, shape, policy, generator):
    rank = 3
    matrix = with_singular_values(shape, [3.0, 2.0, 1.0], generator)
    truth, _, _ = polar_truth(matrix)
    result, info = polar(matrix, backend, rank_policy=policy)
    assert info == min(shape) - rank
    values = torch.linalg.svdvals(result.double())
    expected = torch.zeros(min(shape), dtype=torch.float64)
    expected[: rank if policy == "isometry" else None] = 1
    assert torch.allclose(values, expected.to(DEVICE), atol=1e-6, rtol=0)
    if policy == "isometry":
        assert torch.linalg.matrix_norm(result.double() - truth) <= 1e-6
    else:  # what was added is orthogonal to what was there, on both sides
        more = result.double() - truth
        assert torch.linalg.matrix_norm(more @ truth.mT) <= 1e-5 and torch.linalg.matrix_norm(more.mT @ truth) <= 1e-5
        assert torch.equal(polar(matrix, backend, rank_policy=policy)[0], result)


@every_backend
def test_rows_that_are_dead_or_the_same(backend, generator):
    matrix = torch.randn(12, 40, generator=generator).to(DEVICE)
    matrix[3] = 0
    matrix[7] = matrix[5]
    result, info = polar(matrix, backend)
    assert info == 2 and not result[3].any()
    torch.testing.assert_close(result[7], result[5])
    torch.testing.assert_close(result[5].norm(), torch.tensor(0.5**0.5, device=DEVICE))
    everything, info = polar(torch.zeros(4, 6, device=DEVICE), backend)
    assert info == 4 and not everything.any()
    completed, _ = polar(torch.zeros(4, 6, device=DEVICE), backend, rank_policy="complete")
    torch.testing.assert_close(completed @ completed.mT, torch.eye(4, device=DEVICE), atol=1e-6, rtol=0)


@every_backend
def test_a_permutation_of_rows_permutes_the_result_and_a_factor_changes_nothing(backend, generator):
    matrix = logarithmic((24, 50), 3, generator)
    order = torch.randperm(24, generator=generator)
    result, _ = polar(matrix, backend)
    permuted, _ = polar(matrix[order].contiguous(), backend)
    torch.testing.assert_close(permuted, result[order], atol=1e-6, rtol=0)
    for factor in (2.0**60, 2.0**-100, 3.7):
        scaled, info = polar(matrix * factor, backend)
        assert info == 0
        # A factor that is no power of two rounds the matrix: so much may change at this condition.
        torch.testing.assert_close(scaled, result, atol=1e-6 if factor != 3.7 else 1e3 * 2.0**-24, rtol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend, dtype, generator):
    for shape in [(16, 40), (40, 16), (140, 150)]:
        matrix = logarithmic(shape, 2, generator, dtype)
        truth, sigma, _ = polar_truth(matrix)
        result, info = polar(matrix, backend)
        assert info == 0
        bound = UNIT[dtype] * (math.sqrt(min(shape)) if dtype != torch.float64 else 20 * sigma[0] / sigma[-1])
        assert torch.linalg.matrix_norm(result.double() - truth, ord=2) <= 2 * bound


@every_backend
@pytest.mark.parametrize("decades", [8, 12])
def test_float64_resolves_more(backend, decades, generator):
    matrix = logarithmic((12, 30), decades, generator, torch.float64)
    result, info = polar(matrix, backend)
    assert info == 0 and orthonormality(result) <= 1e-13
    inner = (result * matrix).sum() / torch.linalg.svdvals(matrix).sum()
    assert abs(inner - 1) <= 1e-13


def test_the_schedule_makes_one_or_zero_of_a_singular_value():
    """In exact arithmetic: what is above the threshold by a hundredth becomes one, what is below it zero."""
    for length in (1, 27, 4608, 10**7):
        threshold = math.sqrt(length) * 2.0**-24
        above = torch.cat([torch.logspace(math.log10(1.01 * threshold), 0, 10**5, dtype=torch.float64), torch.ones(1)])
        below = torch.logspace(-12, math.log10(0.99 * threshold), 10**5, dtype=torch.float64)
        for a, b, c in schedule(length):
            above, below = (x * (a + x * x * (b + x * x * c)) for x in (above, below))
        assert (above - 1).abs().max() <= 1e-8 and below.abs().max() <= 1e-8


def test_no_step_of_the_schedule_makes_a_large_singular_value_small():
    """The Gram matrix has lost the digits of those that have been small."""
    for length in (1, 27, 4608, 10**7):
        begin = torch.logspace(math.log10(1.01 * math.sqrt(length)) - 24 * math.log10(2), 0, 10**5, dtype=torch.float64)
        values = begin.clone()
        for a, b, c in schedule(length):
            values = values * (a + values**2 * (b + values**2 * c))
            assert (values >= begin.clamp(max=1 / 3)).all()


@pytest.mark.parametrize("decades", [0.3, 3, 5, 6, 9])
@pytest.mark.parametrize("shortest", [5, 10**9])
def test_as_newton_schulz_steps(decades, shortest, generator):
    """What GPUs do: compiled for small matrices, in torch's products for batches of large ones."""
    for shape in [(16, 27), (27, 16), (60, 200), (5, 5), (1, 9)]:
        length = min(shortest, max(shape))
        matrices = [logarithmic(shape, d, generator) for d in (decades, 1)] + [torch.zeros(shape, device=DEVICE)]
        matrices.append(torch.full(shape, torch.nan, device=DEVICE))
        batch, found = _in_gram_space(torch.stack([spectra.wide(m) for m in matrices]), schedule(length), length)
        results = [(list(batch if shape[0] <= shape[1] else batch.mT), found)]
        if "cpp" in BACKENDS:
            outs, info = [torch.empty_like(m) for m in matrices], torch.zeros(4, dtype=torch.int32)
            options = {"coefficients": schedule(length), "dtype": torch.float32, "spectral": length, "eps": 0.0}
            newton_schulz(matrices, outs, info, backend="cpp", **options)
            results.append((outs, info))
        for outs, info in results:
            assert info[1:].tolist() == [0, min(shape), -2] and not outs[2].any() and not outs[3].any()
            for i in range(2):
                truth, sigma, zero = polar_truth(matrices[i])
                resolved = sigma[: min(shape) - zero]
                condition = (sigma[0] / resolved[-1]).item()
                near = ((sigma / sigma[0] / spectra.threshold(matrices[i]) - 1).abs() < 0.02).any()
                if near:  # rounding decides
                    continue
                assert info[i] == zero
                error = torch.linalg.matrix_norm(outs[i].double() - truth, ord=2)
                stored = UNIT[outs[i].dtype] * math.sqrt(min(shape))
                assert error <= 2 * stored + 200 * condition**2 * UNIT[torch.float64]


def test_sizes_on_both_sides_of_where_large_begins(generator):
    if DEVICE.type != "cpu":
        pytest.skip("a choice of the CPU's")
    for m in (SMALL, SMALL + 1):
        matrix = logarithmic((m, m + 30), 4, generator)
        truth, _, _ = polar_truth(matrix)
        result, _ = polar(matrix, "cpp")
        assert torch.linalg.matrix_norm(result.double() - truth, ord=2) <= 1e-6


@every_backend
@pytest.mark.parametrize("shape", [(64, 576), (100, 150), (200, 80)], ids=str)
def test_gradients_of_few_examples(backend, shape, generator):
    """Sums of a few outer products, whose other singular values are rounding."""
    matrices = [
        torch.relu(torch.randn(shape[0], rank, generator=generator)) @ torch.randn(rank, shape[1], generator=generator)
        for rank in (4, 8, 16, 32, 48)
    ]
    matrices = [matrix.to(DEVICE) for matrix in matrices]
    info = torch.full((len(matrices),), 99, dtype=torch.int32, device=DEVICE)
    results = orthogonalize(matrices, info=info, backend=backend)
    assert info.tolist() == [min(shape) - rank for rank in (4, 8, 16, 32, 48)]
    for matrix, result in zip(matrices, results, strict=True):
        truth, sigma, zero = polar_truth(matrix)
        condition = (sigma[0] / sigma[: min(shape) - zero][-1]).item()
        assert torch.linalg.matrix_norm(result.double() - truth, ord=2) <= 20 * condition * UNIT[torch.float32]


@every_backend
def test_completed_float64_sets(backend, generator):
    for shape in [(2, 3), (2, 4), (3, 4), (4, 4), (20, 20)]:
        for _ in range(20):
            matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
            matrix[1] = matrix[0]
            matrix[:, 1] = 0
            result, _ = polar(matrix.to(DEVICE), backend, rank_policy="complete")
            values = torch.linalg.svdvals(result)
            assert (values - 1).abs().max() <= 1e-12
