"""The op `kron_root`, and `kron_inverse` by its ways, against float64, closed forms and Kronecker identities."""

import functools
import math

import pytest
import torch
from cases import DEVICE
from roots import BACKENDS, MOST, POWERS, SIZES, SLOW, every_backend, kron_inverse, kron_root, sizes
from spectra import UNIT, almost, assert_root, definite, tridiagonal, truth_of

from fastcurv import ops


@sizes(*SIZES)
@pytest.mark.parametrize("p", POWERS)
def test_against_float64(backend, n, p, generator):
    conditions = (1.0, 1e2, 1e4, 1e5, 1e6) if (n, p) in ((33, 4), (64, 1)) else (1.0, 1e5)
    matrices = [definite(n, condition, generator) for condition in conditions]
    before = [matrix.clone() for matrix in matrices]
    roots, info = kron_root(matrices, 0.0, p, backend=backend)
    assert not info.any()
    for matrix, root, old, condition in zip(matrices, roots, before, conditions, strict=True):
        assert torch.equal(matrix, old)
        assert_root(matrix, root, condition, p)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_several_tiles(generator):
    matrices = [definite(40, 1e2, generator)]
    (root,), info = kron_root(matrices, 0.0, 2, backend="triton")
    assert info.tolist() == [0]
    assert_root(matrices[0], root, 1e2, 2)


@sizes(1, 9, 40, 64, 130)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_float64(backend, n, p, generator):
    matrix = definite(n, 1e9, generator, torch.float64)
    (root,), info = kron_root([matrix], 0.0, p, backend=backend)
    assert info.tolist() == [0] and root.dtype == torch.float64
    assert_root(matrix, root, 1e9, p)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in MOST])
def test_large_matrices(backend, generator):
    n = 701
    matrix = torch.randn(n, 2 * n, generator=generator)
    matrix = (matrix @ matrix.mT / n).to(DEVICE)
    (root,), info = kron_root([matrix], 0.1, 2, backend=backend)
    matrix.diagonal().add_(0.1)
    assert info.tolist() == [0]
    assert_root(matrix, root, 60.0, 2)


@every_backend
def test_high_powers(backend):
    """What begins too large would vanish from T^p, and not come back."""
    values = torch.tensor([1.0, 0.25, 1e-3], device=DEVICE)
    (root,), info = kron_root([torch.diag(values)], 0.0, 200, backend=backend)
    assert info.tolist() == [0]
    torch.testing.assert_close(root, torch.diag(values ** (-1 / 200)), rtol=1e-5, atol=1e-7)


@sizes(3, 10, 40, 64, 300)
@pytest.mark.parametrize("p", POWERS)
def test_tridiagonal(backend, n, p):
    matrix, values, vectors = tridiagonal(n, 2.5, -1.0)
    (root,), _ = kron_root([matrix], 0.0, p, backend=backend)
    truth = (vectors * values ** (-1 / p)) @ vectors.mT
    condition = (values.max() / values.min()).item()
    assert (root.double().cpu() - truth).norm() <= 20 * condition * UNIT[torch.float32] * truth.norm()


@every_backend
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers(backend, p, dtype):
    """B has determinant one: the root of B^p has whole numbers. Eigenvalues of B are within a ratio of 17."""
    b = torch.tensor([[2, 1, 0], [1, 2, 1], [0, 1, 1]], dtype=dtype, device=DEVICE)
    expected = torch.tensor([[1, -1, 1], [-1, 2, -2], [1, -2, 3]], dtype=dtype, device=DEVICE)
    (root,), info = kron_root([torch.linalg.matrix_power(b, p)], 0.0, p, backend=backend)
    assert info.tolist() == [0]
    assert (root - expected).norm() <= 20 * 17.0**p * UNIT[dtype] * expected.norm()


@every_backend
def test_the_root_of_a_kronecker_product(backend, generator):
    a, b = (definite(n, 10.0, generator, torch.float64) for n in (7, 12))
    (x, y), _ = kron_root([a, b], 0.0, 4, backend=backend)
    truth = truth_of(torch.kron(a, b), 4)
    assert (torch.kron(x, y) - truth).norm() <= 20 * 100 * UNIT[torch.float64] * truth.norm()


@every_backend
@pytest.mark.parametrize("p", [1, 4])
def test_alone_in_a_list_and_on_any_number_of_threads(backend, p, generator):
    most = 17 if backend in SLOW else MOST.get(backend, 785)
    matrices = [definite(n, 1e3, generator) for n in (300, 6, 64, 785, 65, 130, 300, 1, 17, 6) if n <= most]
    before = torch.get_num_threads()
    together, found = kron_root(matrices, 0.25, p, backend=backend)
    assert not found.any()
    try:
        # The reference is torch's, whose products may depend on threads.
        for threads in (1, 2, 3) if backend == "cpp" else (before,):
            torch.set_num_threads(threads)
            again, _ = kron_root(matrices, 0.25, p, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
            for matrix, root in zip(matrices, together, strict=True):
                (alone,), _ = kron_root([matrix], 0.25, p, backend=backend)
                assert torch.equal(alone, root)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("emulator" not in BACKENDS, reason="needs fastcurv._C")
@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize("n, dtype", [(64, torch.float32), (33, torch.float64)])
def test_threads_of_a_block_in_any_order(n, dtype, order, generator):
    matrices = [definite(n, 1e3, generator, dtype), -torch.eye(3, dtype=dtype), definite(2, 1e3, generator, dtype)]
    expected, _ = kron_root(matrices, backend="emulator")
    roots, info = kron_root(matrices, backend="emulator", order=order)
    assert info.tolist() == [0, -1, 0]
    assert all(torch.equal(a, b) for a, b in zip(roots, expected, strict=True))


# Every way to a root or an inverse: what it does with dampings, failures and lists is the same for all.
WAYS = {
    **{(name, "newton"): functools.partial(kron_root, p=4, backend=name) for name in BACKENDS if name not in SLOW},
    **{(name, "newton inverse"): functools.partial(kron_inverse, method="newton", backend=name) for name in BACKENDS},
    (None, "eigh"): functools.partial(ops.kron_root, p=4, method="eigh"),
    (None, "eigh inverse"): functools.partial(ops.kron_inverse, method="eigh"),
}
ways_of_sizes = pytest.mark.parametrize(
    "backend, way, n",
    [(*way, n) for way in WAYS for n in (4, 40, 150) if n <= MOST.get(way[0], n) and (way[0] not in SLOW or n == 4)],
)
every_way = pytest.mark.parametrize("backend, way", WAYS)


def of(way):
    """Of which root it is."""
    return 1 if way.endswith("inverse") else 4


@every_way
def test_damping(backend, way, generator):
    matrices = [definite(n, 1e2, generator, torch.float64) for n in (5, 40)]
    values = [0.5, 0.125]
    one = [torch.eye(len(m), dtype=torch.float64, device=DEVICE) for m in matrices]
    expected = [truth_of(m + v * e, of(way)) for m, v, e in zip(matrices, values, one, strict=True)]
    for dtype in (torch.float32, torch.float64):
        found, _ = WAYS[backend, way](matrices, torch.tensor(values, dtype=dtype, device=DEVICE))
        for x, y in zip(found, expected, strict=True):
            assert (x - y).norm() <= 20 * 100 * UNIT[torch.float64] * y.norm()
    for number in (0.5, torch.tensor(0.5, device=DEVICE), torch.tensor([0.5], device=DEVICE)):
        found, _ = WAYS[backend, way](matrices, number)
        assert (found[0] - expected[0]).norm() <= 20 * 100 * UNIT[torch.float64] * expected[0].norm()


@ways_of_sizes
def test_jitter(backend, way, n, generator):
    """Each try adds 1e-6, 1e-5 and 1e-4 of the mean of the diagonal, and only to who needs it."""
    least = [1.0, -5e-7, -5e-6, -5e-5, -5e-4]
    matrices = [almost(n, value, generator) for value in least]
    roots, info = WAYS[backend, way](matrices)
    assert info.tolist() == [0, 1, 2, 3, -1] and not roots[4].any()
    for matrix, root, tries in zip(matrices[:4], roots, range(4), strict=False):
        jitter = 10.0 ** (tries - 7) * matrix.diagonal().mean() if tries else 0.0
        truth = truth_of(matrix + jitter * torch.eye(n, dtype=torch.float64, device=DEVICE), of(way))
        assert torch.equal(root, root.mT)
        torch.testing.assert_close(root, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())
    (alone,), _ = WAYS[backend, way](matrices[:1])
    assert torch.equal(alone, roots[0])


@ways_of_sizes
def test_what_is_not_finite(backend, way, n, generator):
    good, zero = definite(n, 10.0, generator), torch.zeros(n, n, device=DEVICE)
    indefinite = torch.diag(torch.tensor([1.0, -1.0], device=DEVICE).repeat(n // 2))
    if of(way) == 1:
        zero.diagonal().fill_(1e-42)  # its inverse is beyond float32
    bad = [math.nan, math.inf, -math.inf]
    spoilt = [definite(n, 10.0, generator) for _ in 2 * bad]
    for lower, upper, value in zip(spoilt[:3], spoilt[3:], bad, strict=True):
        lower[n - 1, 1] = upper[0, n - 1] = value
    matrices, wanted = [good, *spoilt, indefinite, zero], [0, *[-2] * 6, -1, -1]
    previous = [torch.full_like(good, float(i)) for i in range(len(matrices))]
    (plain,), _ = WAYS[backend, way]([good])
    roots, info = WAYS[backend, way](matrices)
    assert info.tolist() == wanted and torch.equal(roots[0], plain)
    assert not any(x.any() for x in roots[1:])
    roots, info = WAYS[backend, way](matrices, previous=previous)
    assert info.tolist() == wanted and torch.equal(roots[0], plain)
    assert all(torch.equal(x, old) for x, old in zip(roots[1:], previous[1:], strict=True))
    _, info = WAYS[backend, way]([good] * 4, torch.tensor([1.0, *bad], device=DEVICE))
    assert info.tolist() == [0, -2, -2, -2]


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_samples(backend, way, dtype, generator):
    """Of a third of the rank that it should have, undamped: whatever rounding makes of it, something finite comes out."""
    x = torch.randn(10, 30, generator=generator, dtype=dtype).to(DEVICE)
    (root,), info = WAYS[backend, way]([x.mT @ x / 10])
    assert 0 <= info.item() <= 3 and root.isfinite().all()


@every_way
def test_no_matrices_and_empty_ones(backend, way):
    roots, info = WAYS[backend, way]([])
    assert roots == [] and info.shape == (0,)
    matrices = [torch.ones(0, 0, device=DEVICE), torch.ones(1, 1, device=DEVICE)]
    for previous in (None, matrices):
        roots, info = WAYS[backend, way](matrices, previous=previous)
        assert (
            roots[0].shape == (0, 0)
            and abs(roots[1].item() - 1) <= 20 * UNIT[torch.float32]
            and info.tolist() == [0, 0]
        )


@every_way
def test_layouts(backend, way, generator):
    matrix = definite(20, 10.0, generator)
    (expected,), _ = WAYS[backend, way]([matrix])
    around = torch.full((22, 44), torch.nan, device=DEVICE)
    around[1:21, 2:42:2] = matrix
    (found,), _ = WAYS[backend, way]([around[1:21, 2:42:2]])
    assert torch.equal(found, expected) and found.is_contiguous()
    # Nothing above the diagonal counts.
    matrix += torch.ones_like(matrix).triu(1)
    (found,), _ = WAYS[backend, way]([matrix])
    assert torch.equal(found, expected)
