"""The op `gram_schmidt` against the QR decomposition in float64."""

import math

import pytest
import torch
from cases import DEVICE, matrix_backends
from spectra import SHAPES, UNIT, logarithmic, rows_truth, wide
from torch.utils._python_dispatch import TorchDispatchMode

from fastcurv import _backend
from fastcurv.ops import orthogonalize
from fastcurv.ops.gram_schmidt import PANEL, SMALL, _by_panels

BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_shape = pytest.mark.parametrize("shape", [*SHAPES, (40, SMALL // 40 + 64), (3 * PANEL + 5, 3000)], ids=str)


def gram_schmidt(matrix, backend, **options):
    info = torch.full((1,), 99, dtype=torch.int32, device=DEVICE)
    (result,) = orthogonalize([matrix], method="gram_schmidt", info=info, backend=backend, **options)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype and result.stride() == matrix.stride()
    return result, info.item()


def assert_orthonormal(result, zero_rows, bound):
    q = wide(result).double()
    kept = ~(q == 0).all(dim=1)
    assert int((~kept).sum()) == zero_rows
    gram = q[kept] @ q[kept].mT
    assert (gram - torch.eye(len(gram), dtype=torch.float64, device=DEVICE)).abs().max() <= bound


@every_backend
@every_shape
@pytest.mark.parametrize("decades", [0.3, 3, 5])
def test_against_qr(backend, shape, decades, generator):
    matrix = logarithmic(shape, decades, generator)
    truth, pivots = rows_truth(matrix)
    result, info = gram_schmidt(matrix, backend)
    norms = wide(matrix).double().norm(dim=1)
    # A row has lost as many digits as its projection took away; each of its predecessors passes its own on.
    lost = (norms / pivots).max() * min(shape)
    assert info == 0 and (result.double() - truth).abs().max() <= 8 * UNIT[torch.float32] * lost
    assert_orthonormal(result, 0, 1e-6)


@every_backend
@every_shape
def test_condition_1e8(backend, shape, generator):
    matrix = logarithmic(shape, 8, generator)
    result, info = gram_schmidt(matrix, backend)
    # Of a row whose remainder is rounding the direction is too, and is made orthogonal as the others.
    assert_orthonormal(result, info, 1e-6)


@every_backend
def test_rows_in_order(backend, generator):
    """The first row is only scaled; scaling rows changes nothing; the order of rows matters."""
    matrix = torch.randn(9, 30, generator=generator).to(DEVICE)
    result, _ = gram_schmidt(matrix, backend)
    torch.testing.assert_close(result[0], matrix[0] / matrix[0].norm())
    factors = torch.logspace(-30, 30, 9, device=DEVICE)[:, None]
    torch.testing.assert_close(gram_schmidt(matrix * factors, backend)[0], result, atol=1e-5, rtol=0)
    assert (gram_schmidt(matrix.flip(0).contiguous(), backend)[0].flip(0) - result).abs().max() > 0.01


@every_backend
@pytest.mark.parametrize("policy", ["isometry", "complete"])
def test_rows_that_depend_on_others(backend, policy, generator):
    matrix = torch.randn(12, 40, generator=generator).to(DEVICE)
    matrix[3] = 0
    matrix[7] = 2 * matrix[5] - matrix[1]
    result, info = gram_schmidt(matrix, backend, rank_policy=policy)
    assert info == 2
    assert_orthonormal(result, 2 if policy == "isometry" else 0, 1e-6)
    truth, _ = rows_truth(matrix[[i for i in range(12) if i not in (3, 7)]])
    torch.testing.assert_close(result[[i for i in range(12) if i not in (3, 7)]].double(), truth, atol=1e-5, rtol=0)
    if policy == "isometry":
        assert not result[3].any() and not result[7].any()
    zero, info = gram_schmidt(torch.zeros(4, 6, device=DEVICE), backend, rank_policy=policy)
    assert info == 4 and bool(zero.any()) is (policy == "complete")


@every_backend
def test_ranks_of_large_matrices(backend, generator):
    independent = torch.randn(70, SMALL // 100 + 64, generator=generator)
    matrix = torch.cat([independent, torch.randn(30, 70, generator=generator) @ independent]).to(DEVICE)
    result, info = gram_schmidt(matrix, backend)
    assert info == 30
    assert_orthonormal(result, 30, 1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend, dtype, generator):
    for shape in [(16, 40), (40, 16), (3 * PANEL, 3000)]:
        matrix = logarithmic(shape, 1, generator, dtype)
        truth, pivots = rows_truth(matrix)
        result, info = gram_schmidt(matrix, backend)
        work = max(UNIT[dtype], UNIT[torch.float32]) if dtype != torch.float64 else UNIT[dtype]
        lost = (wide(matrix).double().norm(dim=1) / pivots).max() * min(shape)
        stored = 0.0 if dtype == torch.float64 else UNIT[dtype]
        arithmetic = work if dtype == torch.float64 else UNIT[torch.float32]
        assert info == 0 and (result.double() - truth).abs().max() <= 8 * arithmetic * lost + stored


@every_backend
def test_float64_at_condition_1e12(backend, generator):
    matrix = logarithmic((30, 70), 12, generator, torch.float64)
    result, info = gram_schmidt(matrix, backend)
    assert info == 0
    assert_orthonormal(result, 0, 100 * math.sqrt(70) * UNIT[torch.float64])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs fastcurv._C")
@pytest.mark.parametrize("shape", [(3 * PANEL + 5, 300), (300, 2 * PANEL), (7, 40)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e37, 1e-30])
def test_by_panels(shape, scale, generator):
    """What large matrices on a GPU go through, here with the kernel of the CPU for a panel."""
    matrices = [logarithmic(shape, 3, generator), torch.full(shape, torch.inf), torch.zeros(shape)]
    wide(matrices[0])[5] = wide(matrices[0])[:3].sum(dim=0)
    outs = [torch.full_like(m, torch.nan) for m in matrices]
    info = torch.full((3,), 99, dtype=torch.int32)
    scaled = [m * scale for m in matrices]
    _by_panels(_backend.native().gram_schmidt, scaled, outs, info)
    assert info.tolist() == [1, -2, min(shape)] and not outs[1].any() and not outs[2].any()
    assert_orthonormal(outs[0], 1, 1e-6)
    if scale == 1.0:
        (plain,) = orthogonalize(matrices[:1], method="gram_schmidt", backend="reference")
        assert (outs[0] - plain).abs().max() <= 1e-2  # of a condition of 1000


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs fastcurv._C")
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.float64, 1e200), (torch.float64, 1e-200)])
def test_panels_of_a_ragged_list(dtype, scale, generator):
    """Rows of each come in order, and each matrix is what it is by itself."""
    shapes = [(7, 40), (2 * PANEL, 90), (3 * PANEL + 5, 300), (90, 2 * PANEL), (2 * PANEL, 90), (40, 300)]
    plain = [logarithmic(shape, 1, generator, dtype) for shape in shapes]
    matrices = [matrix * scale for matrix in plain]
    calls = []

    def counted(ins, outs, info, *, floor):
        calls.append(len(ins))
        _backend.native().gram_schmidt(ins, outs, info, floor=floor)

    outs = [torch.full_like(m, torch.nan) for m in matrices]
    info = torch.full((len(shapes),), 99, dtype=torch.int32)
    _by_panels(counted, matrices, outs, info)
    assert not info.any() and calls == [6, 6, 5, 5, 1, 1, 1, 1]
    for matrix, given, out in zip(plain, matrices, outs, strict=True):
        truth, pivots = rows_truth(matrix)
        lost = (wide(matrix).double().norm(dim=1) / pivots).max() * min(matrix.shape)
        assert (out.double() - truth).abs().max() <= 8 * UNIT[dtype] * lost
        alone = torch.empty_like(out)
        _by_panels(counted, [given], [alone], info[:1])
        torch.testing.assert_close(alone, out, rtol=0, atol=8 * UNIT[dtype] * lost.item())


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs fastcurv._C")
def test_panels_are_not_projected_in_tf32(generator):
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.__name__:
                seen.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    matrix = logarithmic((2 * PANEL, 90), 3, generator)
    for precision, dtype in {"high": torch.float64, "highest": torch.float32}.items():
        seen, out = [], torch.empty_like(matrix)
        torch.set_float32_matmul_precision(precision)
        try:
            with Spy():
                _by_panels(_backend.native().gram_schmidt, [matrix], [out], torch.zeros(1, dtype=torch.int32))
        finally:
            torch.set_float32_matmul_precision("highest")
        assert seen and set(seen) == {dtype}
        assert_orthonormal(out, 0, 1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", ["isometry", "complete"])
def test_more_rows_than_dimensions_that_are_alive(backend, dtype, policy, generator):
    """What is left of the last row is rounding, and stays so however often it is scaled up."""
    for size in (2, 3, 5, 17, 40, 64):
        matrix = torch.randn(size, size, generator=generator).to(DEVICE, dtype)
        matrix[:, size // 2] = 0
        result, info = gram_schmidt(matrix, backend, rank_policy=policy)
        bound = 1e-5 if dtype != torch.bfloat16 else 0.02
        assert info == 1
        assert_orthonormal(result, 1 if policy == "isometry" else 0, bound)
    ones, info = gram_schmidt(torch.ones(2, 3, dtype=dtype, device=DEVICE), backend)
    assert info == 1 and not ones[1].any()


@every_backend
@pytest.mark.parametrize("policy", ["isometry", "complete"])
def test_memory_format_changes_nothing(backend, policy, generator):
    weight = torch.randn(64, 3, 3, 3, generator=generator).to(DEVICE)
    weight[5] = 0
    plain, other = (
        orthogonalize([w], method="gram_schmidt", rank_policy=policy, backend=backend)[0]
        for w in (weight, weight.to(memory_format=torch.channels_last))
    )
    assert other.is_contiguous(memory_format=torch.channels_last) and torch.equal(plain, other)
