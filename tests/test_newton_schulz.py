"""The op `newton_schulz` against the same steps in float64, on singular values one by one."""

import pytest
import torch
from cases import DEVICE, matrix_backends
from spectra import SHAPES, UNIT, logarithmic, orthonormality, steps_error, steps_of, steps_truth, wide

from fastcurv import _backend
from fastcurv.ops import orthogonalize
from fastcurv.ops.newton_schulz import COEFFICIENTS
from fastcurv.reference import newton_schulz as reference

BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_backend
@every_shape
@pytest.mark.parametrize("coefficients, count", [("muon", 5), ("polar_express", 8), ("cubic", 12)])
def test_singular_values_go_through_the_polynomials(backend, shape, coefficients, count, generator):
    for decades in (0.3, 3):
        matrix = logarithmic(shape, decades, generator)
        truth = steps_truth(matrix, steps_of(coefficients, count))
        (result,) = orthogonalize(
            [matrix], method="newton_schulz", coefficients=coefficients, steps=count, backend=backend
        )
        plain, info = torch.empty_like(matrix), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        reference(
            [matrix],
            [plain],
            info,
            coefficients=steps_of(coefficients, count),
            dtype=torch.float32,
            spectral=0,
            eps=0.0,
        )
        theirs = torch.linalg.matrix_norm(plain.double() - truth)
        ours = torch.linalg.matrix_norm(result.double() - truth)
        assert ours <= 2 * theirs + 2 * UNIT[torch.float32] * torch.linalg.matrix_norm(truth)


@every_backend
def test_coefficients_that_are_given(backend, generator):
    matrix = torch.randn(7, 11, generator=generator).to(DEVICE)
    given = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
    (result,) = orthogonalize([matrix], method="newton_schulz", coefficients=given, backend=backend)
    torch.testing.assert_close(result.double(), steps_truth(matrix, given), atol=1e-5, rtol=0)
    (longer,) = orthogonalize([matrix], method="newton_schulz", coefficients=given, steps=4, backend=backend)
    torch.testing.assert_close(longer.double(), steps_truth(matrix, [*given, given[1], given[1]]), atol=1e-5, rtol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes(backend, dtype, generator):
    matrix, steps = logarithmic((20, 90), 1, generator, dtype), steps_of("muon", 5)
    (result,) = orthogonalize([matrix], method="newton_schulz", backend=backend)
    truth = steps_truth(matrix, steps)
    assert result.dtype == dtype
    # 16-bit numbers are worked on in float32.
    bound = steps_error(matrix, steps, min(UNIT[dtype], UNIT[torch.float32])) + UNIT[dtype] * truth.norm()
    assert (result.double() - truth).norm() <= min(bound, 400 * UNIT[dtype] * truth.norm())


@every_backend
def test_polar_express_converges(backend, generator):
    """As published: to orthonormality at a moderate condition."""
    for shape in [(30, 80), (150, 200)]:
        (result,) = orthogonalize(
            [logarithmic(shape, 1, generator)],
            method="newton_schulz",
            coefficients="polar_express",
            steps=9,
            backend=backend,
        )
        assert orthonormality(result) <= 1e-5


@every_backend
def test_zero_and_rank_deficient(backend, generator):
    matrix = torch.randn(9, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    info = torch.full((2,), 99, dtype=torch.int32, device=DEVICE)
    results = orthogonalize(
        [torch.zeros(4, 6, device=DEVICE), matrix.to(DEVICE)], method="newton_schulz", info=info, backend=backend
    )
    assert not results[0].any() and info.tolist() == [0, 0]
    assert torch.linalg.svdvals(wide(results[1]).double())[2:].max() < 1e-3


@pytest.mark.parametrize("backend", [*matrix_backends(), "reference"])
@pytest.mark.parametrize("shape", [(8, 20), (150, 200)], ids=str)
def test_small_norms_fade_below_eps(backend, shape, generator):
    matrix = torch.randn(shape, generator=generator).to(DEVICE)
    options = {"method": "newton_schulz", "backend": backend}
    (whole,) = orthogonalize([matrix], **options)
    for factor in (1e-30, 1e-42, 1e30):
        (scaled,) = orthogonalize([matrix * factor], **options)
        # 1e-42 has ten bits left.
        torch.testing.assert_close(scaled, whole, atol=1e-5 if factor != 1e-42 else 0.2, rtol=0)
    (same,) = orthogonalize([matrix], eps=1e-7, **options)
    torch.testing.assert_close(same, whole, atol=1e-6, rtol=0)
    (faded,) = orthogonalize([matrix * 1e-20], eps=1e-7, **options)
    a, _, _ = COEFFICIENTS["muon"][0]
    torch.testing.assert_close(faded, matrix * (1e-13 * a**5), rtol=1e-3, atol=0)
    for factor in (1e160, 1e-200):
        (scaled,) = orthogonalize([matrix.double() * factor], **options)
        torch.testing.assert_close(scaled, whole.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shapes", [[(16, 27), (27, 16)], [(27, 16), (16, 27), (27, 16)]])
def test_a_matrix_beside_one_of_its_transposes_shape(shapes, generator, monkeypatch):
    """In batches, as on a GPU, of float64 matrices, which no kernel takes."""
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]
    expected = [orthogonalize([matrix], method="newton_schulz", backend="reference")[0] for matrix in matrices]
    monkeypatch.setattr(_backend, "choose", lambda *_: ("cuda", reference))
    for found, want in zip(orthogonalize(matrices, method="newton_schulz"), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=5 * 16 * 2.0**-53 * 3.4445**5)
