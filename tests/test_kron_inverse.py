"""The op `kron_inverse` against float64, closed forms and the identities of Kronecker products."""

import math
import sys

import pytest
import torch
from cases import DEVICE
from spectra import UNIT, almost, assert_root, definite, tridiagonal, truth_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcurv import _backend, ops

BACKENDS = [name for name in ("cuda", "cpp") if not _backend.unusable("kron_inverse", name, DEVICE)]
# The CUDA kernel in the host emulator.
BACKENDS += ["reference", *(["emulator"] if _backend.native() is not None and DEVICE.type == "cpu" else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Around the blocks of 8, 16, 32 and 64 rows, and where one sweep begins to have two levels, or larger blocks.
SIZES = [1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 64, 101, 127, 128, 129, 130, 257, 501]
every_size = pytest.mark.parametrize("n", SIZES)


def kron_inverse(factors, damping=0.0, *, backend=None, order="ascending", **options):
    """The op; in the emulator, where that is asked for."""
    if backend != "emulator":
        return ops.kron_inverse(factors, damping, backend=backend, **options)
    from cuda_host import emulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _backend, "choose", lambda *_: ("emulator", emulator.emulated("kron_inverse", order=order, seed=1))
        )
        return ops.kron_inverse(factors, damping, **options)


@every_backend
@every_size
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e5, 1e6])
def test_against_float64(backend, n, condition, generator):
    matrix = definite(n, condition, generator)
    before = matrix.clone()
    (inverse,), info = kron_inverse([matrix], backend=backend)
    assert info.tolist() == [0] and torch.equal(matrix, before)
    assert_root(matrix, inverse, condition)


@every_backend
@pytest.mark.parametrize("n", [1, 9, 65, 130, 300])
def test_float64(backend, n, generator):
    matrix = definite(n, 1e9, generator, torch.float64)
    (inverse,), info = kron_inverse([matrix], backend=backend)
    assert info.tolist() == [0] and inverse.dtype == torch.float64
    assert_root(matrix, inverse, 1e9)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "emulator"])
def test_large_blocks(backend, generator):
    n = 1601
    matrix = torch.randn(n, 2 * n, generator=generator)
    matrix = (matrix @ matrix.mT / n).to(DEVICE)
    (inverse,), info = kron_inverse([matrix], 0.1, backend=backend)
    matrix.diagonal().add_(0.1)
    assert info.tolist() == [0]
    assert_root(matrix, inverse, math.inf)


@pytest.mark.skipif("emulator" not in BACKENDS, reason="needs fastcurv._C")
@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize("n, dtype", [(70, torch.float32), (33, torch.float64), (325, torch.float64)])
def test_threads_of_a_block_in_any_order(n, dtype, order, generator):
    """The last matrix is beyond what shared memory holds 32 rows of."""
    matrices = [definite(n, 1e3, generator, dtype), -torch.eye(3, dtype=dtype), definite(2, 1e3, generator, dtype)]
    expected, _ = kron_inverse(matrices, backend="emulator")
    inverses, info = kron_inverse(matrices, backend="emulator", order=order)
    assert info.tolist() == [0, -1, 0]
    assert_root(matrices[0], inverses[0], 1e3)
    assert all(torch.equal(a, b) for a, b in zip(inverses, expected, strict=True))


@every_backend
@pytest.mark.parametrize("n", [3, 10, 100, 300])
def test_tridiagonal(backend, n):
    matrix, values, vectors = tridiagonal(n, 2.5, -1.0)
    (inverse,), _ = kron_inverse([matrix], backend=backend)
    truth = (vectors / values) @ vectors.mT
    condition = (values.max() / values.min()).item()
    assert (inverse.double().cpu() - truth).norm() <= 20 * condition * UNIT[torch.float32] * truth.norm()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers_are_exact(backend, dtype):
    """L = [[1, 0, 0], [2, 1, 0], [-1, 3, 1]]: nothing is rounded."""
    matrix = torch.tensor([[1, 2, -1], [2, 5, 1], [-1, 1, 11]], dtype=dtype, device=DEVICE)
    (inverse,), info = kron_inverse([matrix], backend=backend)
    expected = torch.tensor([[54, -23, 7], [-23, 10, -3], [7, -3, 1]], dtype=dtype, device=DEVICE)
    assert torch.equal(inverse, expected) and info.tolist() == [0]


@every_backend
def test_the_inverse_of_a_kronecker_product(backend, generator):
    a, b = (definite(n, 10.0, generator, torch.float64) for n in (7, 12))
    (x, y), _ = kron_inverse([a, b], backend=backend)
    torch.testing.assert_close(torch.kron(x, y), truth_of(torch.kron(a, b)), rtol=1e-12, atol=1e-12)


@every_backend
def test_alone_in_a_list_and_on_any_number_of_threads(backend, generator):
    # Small ones of one size are done together, some at a time.
    matrices = [definite(n, 1e3, generator) for n in (300, *[17, 6] * 9, 64, 785, 65, 130, 785, 1, 17, 17)]
    before = torch.get_num_threads()
    together, found = kron_inverse(matrices, 0.25, backend=backend)
    assert not found.any()
    try:
        # The reference is torch's, whose products may depend on threads.
        for threads in (1, 2, 3) if backend == "cpp" else (before,):
            torch.set_num_threads(threads)
            again, _ = kron_inverse(matrices, 0.25, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
            for matrix, inverse in zip(matrices, together, strict=True):
                (alone,), _ = kron_inverse([matrix], 0.25, backend=backend)
                assert torch.equal(alone, inverse)
    finally:
        torch.set_num_threads(before)


@every_backend
def test_damping(backend, generator):
    matrices = [definite(n, 1e2, generator) for n in (5, 40)]
    values = [0.5, 0.125]
    expected = [
        kron_inverse([m + v * torch.eye(len(m), device=DEVICE)])[0][0] for m, v in zip(matrices, values, strict=True)
    ]
    for dtype in (torch.float32, torch.float64):
        found, _ = kron_inverse(matrices, torch.tensor(values, dtype=dtype, device=DEVICE), backend=backend)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    for one in (0.5, torch.tensor(0.5, device=DEVICE), torch.tensor([0.5], device=DEVICE)):
        found, _ = kron_inverse(matrices, one, backend=backend)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@every_backend
@pytest.mark.parametrize("n", [6, 60, 200])
def test_jitter(backend, n, generator):
    """Each try adds 1e-6, 1e-5 and 1e-4 of the mean of the diagonal, and only to who needs it."""
    least = [1.0, -5e-7, -5e-6, -5e-5, -5e-4]
    matrices = [almost(n, value, generator) for value in least]
    inverses, info = kron_inverse(matrices, backend=backend)
    assert info.tolist() == [0, 1, 2, 3, -1] and not inverses[4].any()
    for matrix, inverse, tries in zip(matrices[:4], inverses, range(4), strict=False):
        jitter = 10.0 ** (tries - 7) * matrix.diagonal().mean() if tries else 0.0
        truth = truth_of(matrix + jitter * torch.eye(n, dtype=torch.float64, device=DEVICE))
        assert torch.equal(inverse, inverse.mT)
        torch.testing.assert_close(inverse, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())
    (alone,), _ = kron_inverse(matrices[:1], backend=backend)
    assert torch.equal(alone, inverses[0])


@every_backend
@pytest.mark.parametrize("n", [4, 50, 150])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(backend, n, bad, generator):
    good, spoilt, upper = (definite(n, 10.0, generator) for _ in range(3))
    spoilt[n - 1, 1] = bad
    upper[0, n - 1] = bad
    previous = [torch.full_like(good, float(i)) for i in range(5)]
    indefinite = torch.diag(torch.tensor([1.0, -1.0], device=DEVICE).repeat(n // 2))
    tiny = torch.full_like(good, 0.0)
    tiny.diagonal().fill_(1e-42)  # its inverse is beyond float32
    matrices = [good, spoilt, upper, indefinite, tiny]
    (plain,), _ = kron_inverse([good], backend=backend)
    inverses, info = kron_inverse(matrices, backend=backend)
    assert info.tolist() == [0, -2, -2, -1, -1] and torch.equal(inverses[0], plain)
    assert not any(x.any() for x in inverses[1:])
    inverses, info = kron_inverse(matrices, previous=previous, backend=backend)
    assert info.tolist() == [0, -2, -2, -1, -1] and torch.equal(inverses[0], plain)
    assert all(torch.equal(x, old) for x, old in zip(inverses[1:], previous[1:], strict=True))
    _, info = kron_inverse([good, good], torch.tensor([1.0, bad], device=DEVICE), backend=backend)
    assert info.tolist() == [0, -2]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs fastcurv._C")
def test_large_matrices_on_a_gpu(monkeypatch, generator):
    """By torch's calls, and what those cannot do by the kernel: here the CPU's."""
    module = sys.modules["fastcurv.ops.kron_inverse"]
    kernel, done = _backend.native().kron_inverse, []

    def spy(factors, inverses, previous, info, damping):
        done.extend((info == 0).tolist())
        kernel(factors, inverses, previous, info, damping)

    monkeypatch.setattr(_backend, "choose", lambda *_: ("cuda", spy))
    monkeypatch.setattr(module, "VENDOR", 40)
    spoilt = definite(50, 10.0, generator)
    spoilt[3, 2] = torch.nan
    matrices = [definite(50, 1e3, generator), definite(40, 1e3, generator), almost(50, -1e-3, generator).float()]
    matrices += [spoilt, definite(60, 1e3, generator), almost(50, -5e-5, generator).float()]
    inverses, info = ops.kron_inverse(matrices)
    assert done == [True, False, False, False, True, False] and info.tolist() == [0, 0, -1, -2, 0, 3]
    for i in (0, 1, 4):
        assert_root(matrices[i], inverses[i], 1e3)
    assert not inverses[2].any() and not inverses[3].any() and inverses[5].isfinite().all()


@every_backend
def test_no_matrices_and_empty_ones(backend):
    inverses, info = kron_inverse([], backend=backend)
    assert inverses == [] and info.shape == (0,)
    inverses, info = kron_inverse([torch.ones(0, 0, device=DEVICE), torch.ones(1, 1, device=DEVICE)], backend=backend)
    assert inverses[0].shape == (0, 0) and inverses[1].item() == 1 and info.tolist() == [0, 0]


def test_layouts(generator):
    matrix = definite(20, 10.0, generator)
    (expected,), _ = kron_inverse([matrix])
    around = torch.full((22, 44), torch.nan, device=DEVICE)
    around[1:21, 2:42:2] = matrix
    (found,), _ = kron_inverse([around[1:21, 2:42:2]])
    assert torch.equal(found, expected)
    (found,), _ = kron_inverse([torch._neg_view(-matrix)])  # as the imaginary part of a conjugate is
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change, error, match", [
    ({"factors": torch.eye(2)}, TypeError, r"factors: expected a list of tensors"),
    ({"factors": [torch.eye(2), 3]}, TypeError, r"factors\[1\]: expected a torch.Tensor, got int"),
    ({"factors": [torch.eye(2), torch.ones(2, 3)]}, ValueError, r"factors\[1\]: expected a square matrix, got shape \(2, 3\)"),
    ({"factors": [torch.eye(2), torch.ones(2)]}, ValueError, r"factors\[1\]: expected a square matrix, got shape \(2,\)"),
    ({"factors": [torch.eye(2), torch.eye(2).double()]}, ValueError, r"factors\[1\]: expected torch.float32 on cpu like factors\[0\]"),
    ({"factors": [torch.eye(2).bfloat16()]}, ValueError, r"factors\[0\]: expected float32 or float64, got torch.bfloat16"),
    ({"factors": [torch.eye(2).to_sparse()]}, ValueError, r"factors\[0\]: expected a dense tensor"),
    ({"damping": -1.0}, ValueError, r"damping: expected a value in \[0, inf\), got -1.0"),
    ({"damping": "big"}, TypeError, "damping: expected a number"),
    ({"damping": torch.ones(3)}, ValueError, "damping: expected a number, or .* of one element or of 2"),
    ({"damping": torch.ones(2, dtype=torch.int64)}, ValueError, "damping: expected a number, or a float32 or float64"),
    ({"damping": torch.ones(2, device="meta")}, ValueError, "damping: expected a tensor on cpu like factors, got meta"),
    ({"previous": [torch.eye(2)]}, ValueError, "previous: expected 2 tensors, one for each of factors, got 1"),
    ({"previous": [torch.eye(2), torch.eye(4)]}, ValueError, r"previous\[1\]: expected shape \(3, 3\) like factors\[1\]"),
    ({"previous": [torch.eye(2), torch.eye(3).double()]}, ValueError, r"previous\[1\]: expected torch.float32 on cpu like factors\[1\]"),
    ({"backend": "mkl"}, ValueError, "unknown; expected one of cuda, triton, cpp, reference"),
    ({"backend": "triton"}, ValueError, "backend='triton' cannot run kron_inverse on cpu: has no Triton kernel"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run kron_inverse on cpu"),
])  # fmt: skip
def test_errors(change, error, match):
    arguments = {"factors": [torch.eye(2), torch.eye(3)], **change}
    with pytest.raises(error, match=match):
        kron_inverse(arguments.pop("factors"), **arguments)


def test_opcheck_fake_and_compile(generator):
    matrices = [definite(n, 10.0, generator) for n in (3, 8)]
    damping = torch.tensor([0.5, 0.25], dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(torch.ops.fastcurv.kron_inverse.default, (matrices, damping, []))
    expected, _ = kron_inverse(matrices, 0.5, previous=matrices)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(matrices, damping):
        inverses, info = kron_inverse([m + 0 for m in matrices], damping, previous=matrices)
        return [2 * x for x in inverses], info

    found, info = doubled(matrices, 0.5)
    assert all(torch.equal(x, 2 * y) for x, y in zip(found, expected, strict=True)) and info.tolist() == [0, 0]
    with FakeTensorMode():
        (x,), info = kron_inverse([torch.ones(4, 4)], 0.5)
        assert x.shape == (4, 4) and info.shape == (1,)
