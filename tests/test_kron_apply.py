"""The op `kron_apply` against float64: dense solves of Kronecker products, and products with derived error bounds."""

import math
import sys

import pytest
import torch
from cases import DEVICE
from layers import BACKENDS, FORMS, Problem, definite, every_backend, kron_apply
from spectra import UNIT
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcurv import _backend, ops
from fastcurv.ops import Stein

every_form = pytest.mark.parametrize("form", FORMS)
# Around the strips of 4, 8 and 16 columns, the tiles of 64, and blocks of 256 of what is added up.
SHAPES = [(1, 1), (1, 9), (6, 7), (16, 27), (17, 8), (63, 65), (64, 64), (101, 30), (30, 129), (130, 66), (257, 40)]
LARGE = (300, 785)


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_float64(backend, form, dtype, generator):
    shapes = SHAPES if dtype == torch.float32 else SHAPES[1:9:2]
    problem = Problem(form, shapes, generator, dtype)
    kept = [t.clone() for t in problem.grads]
    problem.check(*problem.run(backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(problem.grads, kept, strict=True))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("emulator", "triton")])
@every_form
def test_large_layers(backend, form, generator):
    """Of several blocks of depth, and more than one group of strips; with more samples than rows, too."""
    problem = Problem(form, [LARGE, (6, 401), (513, 30)], generator, samples=270)
    problem.check(*problem.run(backend=backend))


@every_backend
@pytest.mark.parametrize("samples", [1, 5, 64, 70])
def test_samples(backend, samples, generator):
    problem = Problem("samples", [(16, 27), (70, 9)], generator, samples=samples)
    updates, products, info = problem.run(backend=backend)
    problem.check(updates, products, info)
    # And the same as with the gradient itself, but for its rounding.
    grads = [g.mT @ x / samples for g, x in zip(problem.grads, problem.inputs, strict=True)]
    plain, sums, _ = kron_apply(grads, problem.lefts, problem.rights, backend=backend)
    for i, update in enumerate(plain):
        _, bound, _, dot_bound = problem.truth(i)
        assert ((update.double() - updates[i].double()).abs() <= 2 * bound).all()
        assert (sums[i, 0] - products[i, 0]).abs() <= 2 * dot_bound


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers_are_exact(backend, dtype):
    """Small integers in no symmetric matrix: nothing is rounded, and left is not right, nor a transpose."""
    v = torch.tensor([[1, 2, 3], [-4, 5, 6]], dtype=dtype, device=DEVICE)
    left = torch.tensor([[1, 2], [0, 1]], dtype=dtype, device=DEVICE)
    right = torch.tensor([[1, 0, 2], [3, 1, 0], [0, 0, 1]], dtype=dtype, device=DEVICE)
    (update,), products, info = kron_apply([v], [left], [right], backend=backend)
    assert update.tolist() == [[29.0, 12.0, 1.0], [11.0, 5.0, -2.0]] and info.tolist() == [0]
    assert products.tolist() == [[29 + 24 + 3 - 44 + 25 - 12, 841 + 144 + 1 + 121 + 25 + 4]]
    ones, x = (
        torch.ones(2, 2, dtype=dtype, device=DEVICE),
        torch.tensor([[1, 2, 0], [3, 0, 4]], dtype=dtype, device=DEVICE),
    )
    (update,), products, _ = kron_apply([ones], [left], [right], inputs=[x], backend=backend)
    assert update.tolist() == [[15.0, 3.0, 18.0], [5.0, 1.0, 6.0]]  # V = [[2, 1, 2], [2, 1, 2]]
    assert products.tolist() == [[30 + 3 + 36 + 10 + 1 + 12, 225 + 9 + 324 + 25 + 1 + 36]]
    factors = Stein(left, right, torch.tensor([1.0, 3.0]).to(v), torch.tensor([1.0, 0.0, 5.0]).to(v))
    w = torch.tensor([[7, 2, 5], [25, 9, 8]], dtype=torch.float64)  # L^T V R
    (update,), _, _ = kron_apply([v], [factors], backend=backend)
    quotient = w / torch.tensor([[2, 1, 6], [4, 1, 16]], dtype=torch.float64)
    truth = left.double().cpu() @ quotient @ right.double().cpu().mT
    assert (update.double().cpu() - truth).abs().max() <= 32 * UNIT[dtype] * truth.abs().max()


@every_backend
def test_the_inverse_of_a_kronecker_product(backend, generator):
    """Rows of V in order are a vector that G kron A acts on."""
    g, a = definite(5, generator), definite(7, generator)
    v = torch.randn(5, 7, generator=generator, dtype=torch.float64).to(DEVICE)
    (left, right), _ = ops.kron_inverse([g, a])
    (update,), products, _ = kron_apply([v], [left], [right], backend=backend)
    truth = torch.linalg.solve(torch.kron(g, a), v.flatten()).view(5, 7)
    torch.testing.assert_close(update, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products[0], torch.stack([(v * truth).sum(), truth.square().sum()]))


@every_backend
@every_form
def test_alone_in_a_list_and_on_any_number_of_threads(backend, form, generator):
    slow = backend in ("emulator", "triton")
    shapes = [(30, 16), (6, 7), (64, 65), (16, 27), (6, 7), (70, 9)] + ([] if slow else [(250, 501), LARGE])
    problem = Problem(form, shapes, generator)
    before = torch.get_num_threads()
    together = problem.run(backend=backend)
    problem.check(*together)
    try:
        # The reference is torch's, whose products may depend on threads.
        for threads in (1, 2, 3) if backend == "cpp" else (before,):
            torch.set_num_threads(threads)
            again = problem.run(backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(again[0], together[0], strict=True))
            assert torch.equal(again[1], together[1])
            for i in range(len(shapes)):
                (alone,), sums, _ = problem.some([i]).run(backend=backend)
                assert torch.equal(alone, together[0][i]) and torch.equal(sums[0], together[1][i])
    finally:
        torch.set_num_threads(before)


@every_backend
@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(backend, form, bad, generator):
    """In the last corner of any operand, where the rest is zero or not; the neighbours have the bits they have alone."""
    problem = Problem(form, [(17, 9)] * 8, generator)
    expected = problem.some([0, 7]).run(backend=backend)
    problem.grads[1][-1, -1] = bad
    problem.lefts[2][0, -1] = bad
    problem.rights[3][-1, 0] = bad
    problem.grads[4].zero_()
    problem.lefts[4][3, 3] = bad
    spoilt = [1, 2, 3, 4]
    if form == "samples":
        problem.inputs[5][-1, -1] = bad
        spoilt += [5]
    if form == "stein":
        problem.values[5][0][-1] = bad
        problem.values[6][1][-1] = bad
        spoilt += [5, 6]
    updates, products, info = problem.run(backend=backend)
    assert info.tolist() == [-2 if i in spoilt else 0 for i in range(8)]
    for i in spoilt:
        assert not updates[i].any() and not products[i].any()
    for i, kept in ((0, 0), (7, 1)):
        assert torch.equal(updates[i], expected[0][kept]) and torch.equal(products[i], expected[1][kept])
    assert all(u.isfinite().all() for u in updates)


@every_backend
def test_what_is_beyond_float32(backend):
    """No NaN comes out where finite numbers have no finite product."""
    big = torch.full((3, 3), 1e30, device=DEVICE)
    (update, other), products, info = kron_apply([big, torch.eye(3, device=DEVICE)], [big] * 2, [big, torch.eye(3, device=DEVICE)], backend=backend)  # fmt: skip
    assert info.tolist() == [-2, 0] and not update.any() and torch.equal(other, big)
    assert products[0].tolist() == [0.0, 0.0] and products[1, 1] == 9 * big[0, 0].double() ** 2


@pytest.mark.skipif("emulator" not in BACKENDS, reason="needs fastcurv._C")
@every_form
@pytest.mark.parametrize("order", ["descending", "random"])
def test_threads_of_a_block_in_any_order(form, order, generator):
    """More layers than a launch takes, some of many tiles."""
    problem = Problem(form, [(70, 130), *[(3, 5)] * 85, (65, 4)], generator, samples=3)
    expected = problem.run(backend="emulator")
    found = problem.run(backend="emulator", order=order)
    problem.check(*found)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1], expected[1])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs fastcurv._C")
@every_form
def test_large_layers_on_a_gpu(form, monkeypatch, generator):
    """By torch's products, but never by TF32; the others by the kernel: here the emulator's."""
    from cuda_host import emulator

    done, choose, kernel = [], _backend.choose, emulator.emulated("kron_apply")

    def spy(grads, *arguments):
        done.append(len(grads))
        kernel(grads, *arguments)

    monkeypatch.setattr(
        _backend, "choose", lambda op, device, name: choose(op, device, name) if name else ("cuda", spy)
    )
    monkeypatch.setattr(sys.modules["fastcurv.ops.kron_apply"], "VENDOR", 40)
    problem = Problem(form, [(50, 6), (8, 9), (40, 40), (7, 41), (30, 3)], generator)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, counts in (("ieee", [3]), ("tf32", [5])):
            done.clear()
            torch.backends.cuda.matmul.fp32_precision = precision
            problem.check(*problem.run())
            assert done == counts
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@every_backend
def test_no_layers_and_empty_ones(backend):
    updates, products, info = kron_apply([], [], [], backend=backend)
    assert updates == [] and products.shape == (0, 2) and info.shape == (0,)
    assert kron_apply([], [], backend=backend)[0] == []
    shapes = [(0, 3), (2, 0), (1, 1)]
    updates, products, info = kron_apply(
        [torch.ones(s, device=DEVICE) for s in shapes],
        [torch.ones(d, d, device=DEVICE) for d, _ in shapes],
        [torch.ones(a, a, device=DEVICE) for _, a in shapes],
        backend=backend,
    )
    assert [tuple(u.shape) for u in updates] == shapes and info.tolist() == [0, 0, 0]
    assert products.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


@every_form
def test_layouts_and_gradients_of_gradients(form, generator):
    problem = Problem(form, [(20, 11), (9, 30)], generator)
    expected = problem.run()

    def strided(tensor):
        around = torch.full([2 * n + 3 for n in tensor.shape], torch.nan, device=DEVICE)
        view = around[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)]
        return view.copy_(tensor)

    for change in (
        strided,
        lambda t: t.clone().T.contiguous().T if t.dim() == 2 else t,
        lambda t: t.clone().requires_grad_(),
    ):
        for name in ("grads", "lefts", "rights", "inputs"):
            setattr(problem, name, [change(t) for t in getattr(problem, name)])
        problem.values = [tuple(change(t) for t in pair) for pair in problem.values]
        updates, products, _ = problem.run()
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(updates, expected[0], strict=True))
        assert torch.equal(products, expected[1])
        for name in ("grads", "lefts", "rights", "inputs"):
            setattr(problem, name, [t.detach() for t in getattr(problem, name)])
        problem.values = [tuple(t.detach() for t in pair) for pair in problem.values]


EYES = [torch.eye(2), torch.eye(3)]
STEIN = Stein(torch.eye(2), torch.eye(3), torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("change, error, match", [
    ({"grads": torch.eye(2)}, TypeError, "grads: expected a list, got one Tensor"),
    ({"lefts": STEIN}, TypeError, "lefts: expected a list, got one Stein"),
    ({"rights": None}, ValueError, "rights: expected as many tensors as lefts, got None"),
    ({"lefts": EYES[:1] * 2}, ValueError, "lefts: expected 1 tensors, one for each of grads, got 2"),
    ({"rights": []}, ValueError, "rights: expected 1 tensors, one for each of grads, got 0"),
    ({"inputs": []}, ValueError, "inputs: expected 1 tensors, one for each of grads, got 0"),
    ({"grads": [3]}, TypeError, r"grads\[0\]: expected a torch.Tensor, got int"),
    ({"grads": [torch.ones(2)]}, ValueError, r"grads\[0\]: expected 2 dimensions, got shape \(2,\)"),
    ({"grads": [torch.ones(2, 3).half()]}, ValueError, r"grads\[0\]: expected float32 or float64, got torch.float16"),
    ({"grads": [torch.ones(2, 3).to_sparse()]}, ValueError, r"grads\[0\]: expected a dense tensor"),
    ({"lefts": [torch.eye(2).double()]}, ValueError, r"lefts\[0\]: expected torch.float32 on cpu like grads\[0\], got torch.float64"),
    ({"lefts": [torch.eye(3)]}, ValueError, r"lefts\[0\]: expected shape \(2, 2\) for grads\[0\] of shape \(2, 3\), got \(3, 3\)"),
    ({"rights": [torch.ones(3, 2)]}, ValueError, r"rights\[0\]: expected shape \(3, 3\) for grads\[0\] of shape \(2, 3\), got \(3, 2\)"),
    ({"rights": [torch.eye(3, device="meta")]}, ValueError, r"rights\[0\]: expected torch.float32 on cpu like grads\[0\], got torch.float32 on meta"),
    ({"inputs": [torch.ones(3, 3)]}, ValueError, r"lefts\[0\]: expected shape \(3, 3\) for grads\[0\] of shape \(2, 3\)"),
    ({"inputs": [torch.ones(4, 3)], "lefts": [torch.eye(3)]}, ValueError, r"inputs\[0\]: expected shape \(2, 3\) for grads\[0\]"),
    ({"inputs": [torch.ones(0, 3)], "grads": [torch.ones(0, 2)]}, ValueError, r"grads\[0\]: expected a row for each of one or more samples"),
    ({"lefts": [STEIN]}, ValueError, "lefts: expected tensors where rights or inputs are given, got Steins"),
    ({"lefts": [STEIN, EYES[0]], "rights": None}, TypeError, r"lefts\[1\]: expected a Stein like the others, got Tensor"),
    ({"lefts": [STEIN._replace(left_values=torch.ones(3))], "rights": None}, ValueError, r"left_values\[0\]: expected shape \(2,\)"),
    ({"backend": "mkl"}, ValueError, "unknown; expected one of cuda, triton, cpp, reference"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run kron_apply on cpu"),
])  # fmt: skip
def test_errors(change, error, match):
    arguments = {"grads": [torch.ones(2, 3)], "lefts": EYES[:1], "rights": EYES[1:], **change}
    with pytest.raises(error, match=match):
        kron_apply(arguments.pop("grads"), arguments.pop("lefts"), arguments.pop("rights"), **arguments)


@every_form
def test_opcheck_fake_and_compile(form, generator):
    problem = Problem(form, [(3, 4), (8, 2)], generator)
    values = [list(v) for v in zip(*problem.values, strict=True)] or [[], []]
    arguments = (problem.grads, problem.lefts, problem.rights, problem.inputs, *values)
    torch.library.opcheck(torch.ops.fastcurv.kron_apply.default, arguments)
    expected, sums, _ = problem.run()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(grads, lefts, rights, inputs, left_values, right_values):
        if left_values:
            lefts = [Stein(*s) for s in zip(lefts, rights, left_values, right_values, strict=True)]
            updates, products, info = ops.kron_apply([g + 0 for g in grads], lefts)
        else:
            updates, products, info = ops.kron_apply([g + 0 for g in grads], lefts, rights, inputs=inputs or None)
        return [2 * u for u in updates], products, info

    torch._dynamo.reset()
    found, products, info = doubled(*arguments)
    assert all(torch.equal(x, 2 * y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(products, sums) and info.tolist() == [0, 0]
    with FakeTensorMode():
        fakes = [[torch.ones(t.shape) for t in tensors] for tensors in arguments]
        updates, products, info = torch.ops.fastcurv.kron_apply.default(*fakes)
        assert [u.shape for u in updates] == [(3, 4), (8, 2)] and products.shape == (2, 2) and info.shape == (2,)


def test_views_with_the_negative_bit():
    """Such as the imaginary part of a conjugate: memory holds the opposite."""
    grad, right = torch._neg_view(-torch.ones(2, 3)), torch._neg_view(-torch.eye(3))
    (update,), _, _ = kron_apply([grad], [torch.eye(2)], [right])
    assert torch.equal(update, torch.ones(2, 3))
