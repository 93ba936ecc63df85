"""The public op `orthogonalize`: layouts, errors, and what torch.library promises."""

import pytest
import torch
from cases import DEVICE, matrix_backends
from spectra import UNIT, orthonormality, steps_error, steps_of, steps_truth

import fastcurv
from fastcurv import _backend
from fastcurv.ops import orthogonalize
from fastcurv.ops.orthogonalize import METHODS

BACKENDS = [*matrix_backends(), "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_method = pytest.mark.parametrize("method", METHODS)


def gradients(generator, dtype=torch.float32):
    """Of layers of every kind, in every layout a gradient has."""

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {
        "linear": random(8, 20),
        "more filters than dimensions": random(64, 3, 3, 3),
        "one filter": random(1, 5, 3, 3),
        "depthwise": random(12, 1, 3, 3),
        "transposed convolution": random(6, 10, 2, 2),
        "channels last": random(10, 6, 3, 3).to(memory_format=torch.channels_last),
        "transposed": random(20, 8).t(),
        "strided": random(8, 40)[:, ::2],
        "rows of a larger tensor": random(20, 9)[5:12],
        "one column": random(7, 1),
        "no rows": random(0, 4),
        "no columns": random(4, 0),
        "unaligned": random(161)[1:].view(8, 20),
        "expanded": random(8, 1).expand(8, 20),
    }


@every_backend
@every_method
def test_every_layout(backend, method, generator):
    found = gradients(generator)
    before = {name: g.clone() for name, g in found.items()}
    info = torch.full((len(found),), 99, dtype=torch.int32, device=DEVICE)
    steps = steps_of("polar_express", 12)
    options = {"coefficients": steps} if method == "newton_schulz" else {}
    results = orthogonalize(list(found.values()), method=method, info=info, backend=backend, **options)
    for (name, g), result in zip(found.items(), results, strict=True):
        assert torch.equal(g, before[name]), name
        assert result.shape == g.shape and result.stride() == torch.empty_like(g).stride(), name
        flat = result.reshape(len(g), -1) if g.numel() else result
        if (method, name) == ("newton_schulz", "expanded"):  # of rank one: the steps enlarge what rounding adds
            truth, unit = steps_truth(g, steps), UNIT[torch.float32]
            assert (flat - truth).norm() <= steps_error(g, steps, unit) + unit * truth.norm()
        else:
            assert g.numel() == 0 or orthonormality(flat) <= 1e-4, name
        plain = g.contiguous()
        (alone,) = orthogonalize([plain], method=method, backend=backend, **options)
        torch.testing.assert_close(result, alone, atol=2e-5, rtol=0)
    ranks = {"expanded": 7} if method != "newton_schulz" else {}
    assert info.tolist() == [ranks.get(name, 0) for name in found]


@every_backend
@every_method
def test_the_same_alone_and_in_a_list_and_twice(backend, method, generator):
    matrices = [
        torch.randn(s, generator=generator).to(DEVICE) for s in [(16, 27), (150, 160), (9, 30), (16, 27), (3, 3)]
    ]
    together = orthogonalize(matrices, method=method, backend=backend)
    for matrix, result in zip(matrices, together, strict=True):
        (alone,) = orthogonalize([matrix], method=method, backend=backend)
        # By torch's products, whose bits depend on where memory begins, or as suits the whole list.
        if backend == "reference" or min(matrix.shape) >= 100:
            torch.testing.assert_close(alone, result, atol=1e-5, rtol=0)
        else:
            assert torch.equal(alone, result)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = orthogonalize(matrices, method=method, backend=backend)
    finally:
        torch.set_num_threads(threads)
    for one, other, matrix in zip(together, again, matrices, strict=True):
        if min(matrix.shape) < 100 and backend != "reference":  # torch's own products may divide large ones by threads
            assert torch.equal(one, other)


@every_backend
@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_gives_zeros_and_the_others_are_done(backend, method, bad, generator):
    shapes = [(8, 20), (20, 8), (150, 160), (8, 20)]
    matrices = [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]
    good = orthogonalize(matrices, method=method, backend=backend)
    for i in range(3):
        spoilt = [m.clone() for m in matrices]
        spoilt[i][3, 5] = bad
        for policy in ("isometry", "complete") if method != "newton_schulz" else ("isometry",):
            info = torch.full((4,), 99, dtype=torch.int32, device=DEVICE)
            results = orthogonalize(spoilt, method=method, rank_policy=policy, info=info, backend=backend)
            assert info.tolist() == [-2 if k == i else 0 for k in range(4)]
            assert not results[i].any()
            assert all(torch.equal(results[k], good[k]) for k in range(4) if k != i)


@pytest.mark.parametrize("change, error, match", [
    (dict(method="qr"), ValueError, "method: expected one of polar, gram_schmidt, newton_schulz, got 'qr'"),
    (dict(rank_policy="full"), ValueError, "rank_policy: expected one of isometry, complete, got 'full'"),
    (dict(method="newton_schulz", rank_policy="complete"), ValueError, "rank_policy: expected 'isometry' with method"),
    (dict(coefficients="quintic"), ValueError, "coefficients: expected one of muon, polar_express, cubic, or a list"),
    (dict(steps=0), ValueError, "steps: expected a whole number of at least 1, got 0"),
    (dict(dtype=torch.float16), ValueError, r"dtype: expected torch\.float32 or torch\.bfloat16, got torch\.float16"),
    (dict(info=torch.zeros(1, dtype=torch.int32)), ValueError, "info: expected 2 int32 elements, one for each"),
    (dict(info=torch.zeros(2)), ValueError, r"info: expected 2 int32 elements.*got 2 of torch\.float32"),
    (dict(backend="cuda"), ValueError, "backend='cuda' cannot run polar on cpu"),
    (dict(matrices=[torch.ones(2, 2), torch.ones(3)]), ValueError, r"matrices\[1\]: expected two dimensions or more"),
    (dict(matrices=[torch.ones(2, 2), torch.ones(2, 2).double()]), ValueError, r"matrices\[1\]: expected torch\.float32 on"),
    (dict(matrices=[torch.ones(2, 2), 3]), TypeError, r"matrices\[1\]: expected a torch\.Tensor, got int"),
    (dict(matrices=[torch.ones(2, 2), torch.ones(2, 2).to_sparse()]), ValueError, r"matrices\[1\]: expected a dense tensor"),
    (dict(matrices=[torch.ones(2, 2).long()]), ValueError, r"matrices\[0\]: expected one of float32"),
])  # fmt: skip
def test_errors(change, error, match):
    arguments = {"matrices": [torch.ones(2, 2), torch.ones(3, 2)], **change}
    with pytest.raises(error, match=match):
        orthogonalize(arguments.pop("matrices"), **arguments)


def test_an_empty_list():
    assert orthogonalize([]) == []


@every_method
def test_opcheck_and_compile(method, generator):
    matrices = [
        torch.randn(4, 6, generator=generator).to(DEVICE),
        torch.randn(3, 2, 2, 2, generator=generator).to(DEVICE),
    ]
    info = torch.full((2,), 99, dtype=torch.int32, device=DEVICE)
    flat = [3.4445, -4.7750, 2.0315]
    options = {"method": method, "rank_policy": "isometry", "coefficients": flat, "dtype": torch.float32}
    torch.library.opcheck(torch.ops.fastcurv.orthogonalize.default, (matrices,), options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(matrices):
        return [2 * q for q in orthogonalize([m + 0 for m in matrices], method=method, info=info)]

    expected = orthogonalize(matrices, method=method)
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled(matrices), expected, strict=True))
    assert info.tolist() == [0, 0]
    with torch.device("meta"):
        assert orthogonalize([torch.ones(4, 6)], method=method)[0].shape == (4, 6)


@every_backend
@every_method
@pytest.mark.parametrize("shape", [(20, 40), (150, 310)])
def test_under_autocast(backend, method, shape, generator):
    matrix = torch.randn(shape, generator=generator).to(DEVICE)
    (plain,) = orthogonalize([matrix], method=method, backend=backend)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        (found,) = orthogonalize([matrix], method=method, backend=backend)
    assert torch.equal(plain, found)


def test_backends_lists_them():
    rows = {(row.op, row.backend) for row in fastcurv.backends()}
    assert {("polar", "cpp"), ("gram_schmidt", "triton"), ("newton_schulz", "cuda")} <= rows


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@every_method
@pytest.mark.skipif(_backend.native() is None, reason="needs fastcurv._C")
def test_large_matrices_on_threads(method, two_threads, generator):
    """One that is most of the work is done by all threads, several by one each."""
    shapes = [(160, 700), (600, 150), (170, 180)]
    matrices = [torch.randn(s, generator=generator) for s in shapes]
    matrices[1].requires_grad_()
    together = orthogonalize(matrices, method=method, backend="cpp")
    for matrix, result in zip(matrices, together, strict=True):
        (alone,) = orthogonalize([matrix], method=method, backend="cpp")
        torch.testing.assert_close(alone, result, atol=1e-5, rtol=0)
        assert not result.requires_grad and not alone.requires_grad
    if method == "gram_schmidt":
        matrices[0][150] = matrices[0][:9].sum(dim=0)
        info = torch.empty(1, dtype=torch.int32)
        (result,) = orthogonalize(matrices[:1], method=method, backend="cpp", info=info)
        assert info.item() == 1 and not result[150].any() and orthonormality(result) <= 1e-5


@pytest.mark.skipif(_backend.native() is None, reason="needs fastcurv._C")
def test_threads_call_once_for_each_number_and_pass_on_what_is_raised(two_threads):
    native, seen = _backend.native(), []
    native.on_threads(seen.append, 9)
    assert sorted(seen) == list(range(9))

    def fail(number):
        if number == 3:
            raise KeyError("three")

    with pytest.raises(KeyError, match="three"):
        native.on_threads(fail, 9)


@every_backend
@pytest.mark.parametrize("method", ["polar", "gram_schmidt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_completed_sets_are_orthonormal_in_every_dtype(backend, method, dtype, generator):
    matrix = torch.randn(12, 30, generator=generator).to(DEVICE, dtype)
    matrix[4], matrix[7] = 0, matrix[2]
    info = torch.empty(1, dtype=torch.int32, device=DEVICE)
    options = {"method": method, "rank_policy": "complete", "backend": backend}
    (result,) = orthogonalize([matrix], info=info, **options)
    unit = {torch.float64: 2.0**-40, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    gram = result.double() @ result.double().mT
    assert info.item() == 2 and (gram - torch.eye(12, device=DEVICE)).abs().max() <= unit
    assert torch.equal(orthogonalize([matrix], **options)[0], result)
