"""The methods of `kron_inverse` and `kron_root`: hot starts of Newton's iteration, and eigendecompositions kept."""

import functools
import sys

import pytest
import torch
from cases import DEVICE
from roots import BACKENDS, SLOW, kron_inverse, module
from spectra import UNIT, assert_root, definite, truth_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcurv import ops

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
    for condition in (1.0, 1e2, 1e5):
        matrix = definite(n, condition, generator)
        (root,), info = ops.kron_root([matrix], 0.0, p, method="eigh")
        assert info.tolist() == [0]
        assert_root(matrix, root, condition, p)


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
    assert torch.equal(outs[0][0], eigh(matrices[0].double())[0].float())


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
