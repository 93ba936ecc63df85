"""The op `kron_root`, and the ways of `kron_inverse` that are made of it, against float64 and closed forms."""

import functools
import math
import sys

import pytest
import torch
from cases import DEVICE
from spectra import UNIT, almost, assert_root, definite, tridiagonal, truth_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcurv import _backend, ops

module = sys.modules["fastcurv.ops.kron_root"]
IS_CPU = DEVICE.type == "cpu"
HAS_NATIVE = _backend.native() is not None
BACKENDS = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable("kron_root", name, DEVICE)]
# The CUDA kernel in the host emulator, and what a GPU does with matrices that are too large for it.
BACKENDS += ["reference", *(["emulator"] if HAS_NATIVE and IS_CPU else []), *(["products"] if IS_CPU else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Rows that a back end takes, in a time that tests have.
MOST = {"emulator": 64} | ({"triton": 40} if IS_CPU else {})
# A product takes Triton's interpreter milliseconds: it has fewer sizes.
SLOW = ["triton"] if IS_CPU else []
# Around blocks of 16 rows, and around strips of 16 and 32.
SIZES = [1, 2, 5, 15, 16, 17, 33, 40, 64, 65, 130]
POWERS = [1, 2, 3, 4, 8]


def sizes(*all_sizes):
    """Each back end with each size that it takes."""
    pairs = [(name, n) for name in BACKENDS for n in all_sizes if n <= MOST.get(name, n)]
    pairs = [(name, n) for name, n in pairs if name not in SLOW or n in (1, 3, 17)]
    return pytest.mark.parametrize("backend, n", pairs)


def on(backend, op, *args, order="ascending", **options):
    """An op, on a back end or what stands for one."""
    if backend not in ("emulator", "products"):
        return op(*args, backend=backend, **options)
    with pytest.MonkeyPatch.context() as patch:
        if backend == "emulator":
            from cuda_host import emulator

            run = emulator.emulated("kron_root", order=order, seed=1)
        else:
            patch.setattr(module, "SMALL", 0)
            _, run = _backend.choose("kron_root", DEVICE, "reference")  # for empty ones
        patch.setattr(_backend, "choose", lambda *_: ("cuda" if backend == "products" else backend, run))
        return op(*args, **options)


def kron_root(factors, damping=0.0, p=4, *, backend=None, **options):
    return on(backend, ops.kron_root, factors, damping, p, **options)


def kron_inverse(factors, damping=0.0, *, backend=None, **options):
    return on(backend, ops.kron_inverse, factors, damping, **options)


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
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(backend, way, n, bad, generator):
    good, spoilt, upper = (definite(n, 10.0, generator) for _ in range(3))
    spoilt[n - 1, 1] = bad
    upper[0, n - 1] = bad
    indefinite = torch.diag(torch.tensor([1.0, -1.0], device=DEVICE).repeat(n // 2))
    matrices = [good, spoilt, upper, indefinite, torch.zeros_like(good)]
    if of(way) == 1:
        matrices[4].diagonal().fill_(1e-42)  # its inverse is beyond float32
    previous = [torch.full_like(good, float(i)) for i in range(5)]
    (plain,), _ = WAYS[backend, way]([good])
    roots, info = WAYS[backend, way](matrices)
    assert info.tolist() == [0, -2, -2, -1, -1] and torch.equal(roots[0], plain)
    assert not any(x.any() for x in roots[1:])
    roots, info = WAYS[backend, way](matrices, previous=previous)
    assert info.tolist() == [0, -2, -2, -1, -1] and torch.equal(roots[0], plain)
    assert all(torch.equal(x, old) for x, old in zip(roots[1:], previous[1:], strict=True))
    _, info = WAYS[backend, way]([good, good], torch.tensor([1.0, bad], device=DEVICE))
    assert info.tolist() == [0, -2]


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


INVERSES = [name for name in BACKENDS if name not in SLOW]


def moved(matrix, by, generator):
    """A matrix a little further, as a moving average is after some steps."""
    return matrix + by * definite(len(matrix), 10.0, generator, matrix.dtype)


@pytest.mark.parametrize("backend", INVERSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hot_start(backend, dtype, generator, monkeypatch):
    """What is near is done before the implementation is asked: it finds 0 in info."""
    done = []
    hot_start = module._hot_start

    def spy(indices, factors, inverses, previous, info, damping):
        hot_start(indices, factors, inverses, previous, info, damping)
        done.extend((i, info[i].item() == 0) for i in indices)

    monkeypatch.setattr(module, "_hot_start", spy)
    sizes = (33, 33, 33, 33, 7, 64)
    matrices = [definite(n, 1e2, generator, dtype) for n in sizes]
    previous = [truth_of(moved(m, 1e-3, generator)).to(dtype) for m in matrices]
    previous[1] = torch.zeros_like(matrices[1])
    previous[2] = torch.full_like(matrices[2], torch.nan)
    previous[3] = 3 * truth_of(matrices[3]).to(dtype)  # I - M X is -2 I
    before = [x.clone() for x in previous]
    inverses, info = kron_inverse(matrices, method="newton", previous=previous, backend=backend)
    assert not info.any()
    assert dict(done) == {0: True, 1: False, 2: False, 3: False, 4: True, 5: True}
    for matrix, inverse in zip(matrices, inverses, strict=True):
        assert_root(matrix, inverse, 1e2)
    assert all(torch.equal(x, y) for x, y in zip(previous[3:], before[3:], strict=True))
    # What is far is done as without.
    cold, _ = kron_inverse(matrices, method="newton", backend=backend)
    assert all(torch.equal(inverses[i], cold[i]) is (i in (1, 2, 3)) for i in range(1, 6))
    # The bits of torch's products may depend on how many there are in a batch.
    for i in range(6 if backend != "products" else 0):
        (alone,), _ = kron_inverse([matrices[i]], method="newton", previous=[previous[i]], backend=backend)
        assert torch.equal(alone, inverses[i])


def test_hot_starts_from_what_is_not_definite_are_not_taken():
    """I - M X is zero, but neither is definite."""
    one = torch.eye(5, device=DEVICE)
    previous = [-one, one]
    inverses, info = ops.kron_inverse([-one, one], method="newton", previous=previous)
    assert info.tolist() == [-1, 0] and torch.equal(inverses[0], -one)
    _, info = ops.kron_inverse([torch.full_like(one, torch.nan)], method="newton", previous=[one])
    assert info.tolist() == [-2]


def test_previous_roots_do_not_start_other_roots(generator):
    matrix = definite(20, 1e2, generator)
    (expected,), _ = ops.kron_root([matrix], 0.0, 2)
    (found,), _ = ops.kron_root([matrix], 0.0, 2, previous=[truth_of(matrix).float()])
    assert torch.equal(found, expected)


def test_one_decomposition_serves_any_damping_and_root(generator, monkeypatch):
    matrices = [definite(n, 1e2, generator, torch.float64) for n in (5, 40, 5)]
    indefinite, spoilt = -torch.eye(5, device=DEVICE).double(), torch.full((5, 5), torch.nan, device=DEVICE).double()
    eigen = ops.kron_eigh([*matrices, indefinite, spoilt])
    assert eigen.info.tolist() == [0, 0, 0, 0, -2]

    def never(*_):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    monkeypatch.setattr(torch.linalg, "eigvalsh", never)
    found = {}
    for p in (1, 2, 4):
        for damping in (0.0, 0.25, torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0], device=DEVICE)):
            op = ops.kron_inverse if p == 1 else functools.partial(ops.kron_root, p=p)
            roots, info = op(eigen, damping, method="eigh")
            assert info.tolist() == [0, 0, 0, -1, -2] and not roots[3].any() and not roots[4].any()
            found[p, str(damping)] = damping, roots
    (root,), info = ops.kron_root(
        ops.Eigen(eigen.values[3:4], eigen.vectors[3:4], eigen.info[3:4]), 5.0, 2, method="eigh"
    )
    assert info.tolist() == [0] and (root - 0.5 * torch.eye(5, device=DEVICE)).abs().max() <= 1e-15
    monkeypatch.undo()
    for (p, _), (damping, roots) in found.items():
        for i, matrix in enumerate(matrices):
            d = damping if isinstance(damping, float) else damping[i].item()
            truth = truth_of(matrix + d * torch.eye(len(matrix), dtype=torch.float64, device=DEVICE), p)
            assert torch.equal(roots[i], roots[i].mT)
            assert (roots[i] - truth).norm() <= 20 * 100 * UNIT[torch.float64] * truth.norm()


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("n", [5, 64, 130])
def test_roots_by_eigenvalues(p, n, generator):
    """An eigenvalue is off by n u of the largest, at the most."""
    for condition in (1.0, 1e2, 1e4):
        matrix = definite(n, condition, generator)
        (root,), info = ops.kron_root([matrix], 0.0, p, method="eigh")
        truth = truth_of(matrix, p)
        assert info.tolist() == [0] and torch.equal(root, root.mT)
        assert (root - truth).norm() <= (n + 20) * condition * UNIT[torch.float32] * truth.norm()


def test_eigen_alone_and_on_any_number_of_threads(generator):
    matrices = [definite(n, 1e2, generator) for n in (30, 6, 64, 130, 1, 6)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = ops.kron_root(matrices, 0.1, method="eigh")[0]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = ops.kron_root(matrices, 0.1, method="eigh")[0]
            for x, y in zip(found, together, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        torch.set_num_threads(1)
        for matrix, root in zip(matrices, together, strict=True):
            assert torch.equal(ops.kron_root([matrix], 0.1, method="eigh")[0][0], root)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_converge_on_a_gpu_leaves_the_others(generator, monkeypatch):
    """There LAPACK's failure is one of a whole batch; here a batch is refused, to see what is done then."""
    eigh, eigen = torch.linalg.eigh, sys.modules["fastcurv.ops.kron_eigh"]

    def refused(a):
        if a.dim() == 3 or a[0, 0] == 7:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", refused)
    matrices = [
        definite(5, 1e2, generator),
        7 * torch.eye(5, device=DEVICE),
        torch.full((5, 5), torch.nan, device=DEVICE),
    ]
    outs, info = eigen._empty(matrices)
    eigen._decompose_batches(matrices, outs, info)
    assert info.tolist() == [0, -1, -2] and not outs[1].any() and not outs[2].any()
    assert torch.equal(outs[0][0], eigh(matrices[0])[0])


EIGEN = ops.Eigen([torch.ones(2)], [torch.eye(2)], torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("change, error, match", [
    ({"factors": torch.eye(2)}, TypeError, "factors: expected a list of tensors"),
    ({"factors": [torch.eye(2), torch.ones(2, 3)]}, ValueError, r"factors\[1\]: expected a square matrix, got shape \(2, 3\)"),
    ({"factors": [torch.eye(2).bfloat16()]}, ValueError, r"factors\[0\]: expected float32 or float64, got torch.bfloat16"),
    ({"damping": -1.0}, ValueError, r"damping: expected a value in \[0, inf\), got -1.0"),
    ({"damping": torch.ones(3)}, ValueError, "damping: expected a number, or .* of one element or of 2"),
    ({"p": 0}, ValueError, "p: expected a whole number, 1 or more, got 0"),
    ({"p": 2.0}, ValueError, "p: expected a whole number, 1 or more, got 2.0"),
    ({"p": True}, ValueError, "p: expected a whole number, 1 or more, got True"),
    ({"previous": [torch.eye(2)]}, ValueError, "previous: expected 2 tensors, one for each of factors, got 1"),
    ({"previous": [torch.eye(2)], "method": "eigh"}, ValueError, "previous: expected 2 tensors, one for each of factors, got 1"),
    ({"method": "svd"}, ValueError, "method: expected one of newton, eigh, got 'svd'"),
    ({"method": "cholesky"}, ValueError, "method: expected one of newton, eigh, got 'cholesky'"),
    ({"factors": EIGEN}, ValueError, "method: expected 'eigh' with factors that are an Eigen, got 'newton'"),
    ({"factors": [torch.eye(2), 3], "method": "eigh"}, TypeError, r"factors\[1\]: expected a torch.Tensor, got int"),
    ({"backend": "mkl"}, ValueError, "unknown; expected one of cuda, triton, cpp, reference"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run kron_root on cpu"),
])  # fmt: skip
def test_errors(change, error, match):
    arguments = {"factors": [torch.eye(2), torch.eye(3)], **change}
    with pytest.raises(error, match=match):
        ops.kron_root(arguments.pop("factors"), **arguments)


def test_methods_of_inverses():
    with pytest.raises(ValueError, match="method: expected one of cholesky, newton, eigh, got 'svd'"):
        ops.kron_inverse([torch.eye(2)], method="svd")
    for method in ("cholesky", "newton"):
        with pytest.raises(ValueError, match=f"method: expected 'eigh' with factors that are an Eigen, got '{method}'"):
            ops.kron_inverse(EIGEN, method=method)


def test_opcheck(generator):
    matrices = [definite(n, 10.0, generator) for n in (3, 8)]
    damping = torch.tensor([0.5, 0.25], dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(torch.ops.fastcurv.kron_root.default, (matrices, damping, [], 4))
    torch.library.opcheck(torch.ops.fastcurv.kron_root.default, (matrices, damping, matrices, 1))
    torch.library.opcheck(torch.ops.fastcurv.kron_eigh.default, (matrices,))
    with FakeTensorMode():
        (x,), info = ops.kron_root([torch.ones(4, 4)], 0.5)
        assert x.shape == (4, 4) and info.shape == (1,)
        values, vectors, info = ops.kron_eigh([torch.ones(4, 4)])
        assert values[0].shape == (4,) and vectors[0].shape == (4, 4) and info.shape == (1,)


@pytest.mark.parametrize("method", ["newton", "eigh"])
@pytest.mark.parametrize("p", [1, 4])
def test_compile(method, p, generator):
    matrices = [definite(n, 10.0, generator) for n in (3, 8)]
    previous = [truth_of(m + 0.51 * torch.eye(len(m), device=DEVICE)).float() for m in matrices]
    op = functools.partial(ops.kron_inverse if p == 1 else ops.kron_root, method=method)
    expected, _ = op(matrices, 0.5, previous=previous)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(matrices, damping):
        roots, info = op([m + 0 for m in matrices], damping, previous=previous)
        return [2 * x for x in roots], info

    found, info = doubled(matrices, 0.5)
    assert all(torch.equal(x, 2 * y) for x, y in zip(found, expected, strict=True)) and info.tolist() == [0, 0]
