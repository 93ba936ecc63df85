"""The Triton kernels on lists of matrices: polar factors, Newton-Schulz steps, Gram-Schmidt."""

import importlib
import inspect

import pytest
import torch
from cases import DEVICE, bits
from spectra import UNIT, assert_gram_schmidt, polar_truth, steps_error, steps_truth

from fastcurv import ops, reference
from fastcurv.ops.newton_schulz import COEFFICIENTS
from fastcurv.ops.polar import schedule

pytest.importorskip("triton")

from fastcurv.kernels._products import product, symmetric_product
from fastcurv.kernels.gram_schmidt import gram_schmidt
from fastcurv.kernels.newton_schulz import newton_schulz

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LENGTH = 50
CONDITIONS = (1.0, 1e2, 1e5, 1e9)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_condition(m, n, condition, seed=1):
    """Singular values evenly spaced, by their logarithms, from 1 down to 1 / condition."""
    u, v = (torch.linalg.qr(drawn(size, m, seed=seed + i))[0] for i, size in enumerate((m, n)))
    exponents = torch.linspace(0, 1, m, dtype=torch.float64)
    return (u * (1.0 / condition) ** exponents) @ v.mT


def singular():
    """What has singular values, or rows, of exactly zero in any dtype; by name."""
    dead, twice = drawn(20, LENGTH, seed=2), drawn(20, LENGTH, seed=3)
    dead[[0, 7, 19]] = 0
    twice[11] = twice[4]
    integers = torch.randint(-3, 4, (25, LENGTH), generator=torch.Generator().manual_seed(4)).double()
    return {
        "dead": dead,
        "twice": twice,
        "of rank 5": integers[:12, :5] @ integers[20:],
        "zero": torch.zeros(6, LENGTH, dtype=torch.float64),
        "zero row": torch.zeros(1, LENGTH, dtype=torch.float64),
    }


def regular():
    """What has none."""
    return {
        "row": drawn(1, LENGTH),
        "tall": drawn(LENGTH, 20, seed=5),
        "column": drawn(LENGTH, 1, seed=6),
        "wide": drawn(37, LENGTH, seed=7),
        "large": 1e4 * drawn(5, LENGTH, seed=8),
        "small": 1e-3 * drawn(5, LENGTH, seed=9),
    }


def run(function, matrices, **options):
    outs = [torch.full_like(matrix, torch.nan) for matrix in matrices]
    info = torch.full((len(matrices),), 77, dtype=torch.int32, device=DEVICE)
    function(matrices, outs, info, **options)
    return outs, info


def wide(matrix):
    matrix = matrix.double()
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def error(got, want):
    return (got.double() - want.double()).abs().max().item()


def ulps(dtype, want, count=2):
    return count * torch.finfo(dtype).eps * want.abs().max().item()


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("op", ["gram_schmidt", "newton_schulz"])
def test_signatures_are_those_of_the_references(op):
    found = getattr(importlib.import_module(f"fastcurv.kernels.{op}"), op)
    assert inspect.signature(found) == inspect.signature(getattr(reference, op))


POLAR = (1.0, 1e5, "dead", "twice", "zero", "row", "small", 1e9, "of rank 5", "tall")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_factors(dtype):
    """Rounded once: what the float64 steps lose, about 2^-53 times the square of what they grow by, is far less."""
    named = {condition: with_condition(20, LENGTH, condition) for condition in CONDITIONS} | singular() | regular()
    names = POLAR if dtype == torch.float32 else POLAR[-3:]
    matrices = [named[name].to(DEVICE, dtype) for name in names]
    outs, info = run(
        newton_schulz, matrices, coefficients=schedule(LENGTH), dtype=torch.float32, spectral=LENGTH, eps=0.0
    )
    for name, matrix, out, found in zip(names, matrices, outs, info.tolist(), strict=True):
        truth, _, lost = polar_truth(matrix)
        assert found == lost, name
        assert error(out, truth) <= 2 * error(truth.to(dtype), truth) + ulps(dtype, truth), name
        assert not out[matrix.abs().sum(dim=1) == 0].any(), name


@pytest.mark.parametrize(
    ("coefficients", "dtype", "working"),
    [
        ("muon", torch.float32, torch.float32),
        ("muon", torch.bfloat16, torch.bfloat16),
        ("polar_express", torch.float32, torch.bfloat16),
        ("polar_express", torch.float16, torch.float32),
        ("cubic", torch.float64, torch.float32),
    ],
)
def test_newton_schulz_steps_go_through_the_polynomials(coefficients, dtype, working):
    named = {condition: with_condition(20, LENGTH, condition) for condition in (1e2, 1e9)} | singular() | regular()
    if working == torch.bfloat16:
        # Errors of percents are compared with torch's, over many numbers: a single row has one singular value.
        del named["row"], named["column"]
    matrices = [matrix.to(DEVICE, dtype) for matrix in named.values()]
    steps = (COEFFICIENTS[coefficients] * 3)[:3]
    options = {"coefficients": steps, "dtype": working, "spectral": 0, "eps": 0.0}
    outs, info = run(newton_schulz, matrices, **options)
    torchs, _ = run(reference.newton_schulz, matrices, **options)
    assert not info.any()
    unit = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    for name, matrix, out, by_torch in zip(named, matrices, outs, torchs, strict=True):
        truth = steps_truth(matrix, steps)
        bound = 2 * (by_torch - truth).norm() if working == torch.bfloat16 else steps_error(matrix, steps, unit)
        assert (out - truth).norm() <= bound + UNIT[dtype] * truth.norm(), name
        assert matrix.any() or not out.any(), name


@pytest.mark.parametrize(("m", "n"), [(8, 1100), (70, 90), (131, 140)])
def test_tiles_and_splits_put_together_make_the_whole(m, n):
    """Of products of small integers, which float32 holds exactly; (8, 1100) is split, (70, 90) has many small tiles."""
    x, y = (torch.randint(-3, 4, (2, m, n), generator=torch.Generator().manual_seed(i)).float() for i in (1, 2))
    x, y = x.to(DEVICE), y.to(DEVICE)
    gram = symmetric_product(x, x)
    assert torch.equal(gram, x @ x.mT)
    identity = torch.eye(m, device=DEVICE)
    assert torch.equal(symmetric_product(x, x, (5.0, -2.0, 3.0), gram), 5 * identity + gram)
    assert torch.equal(product(gram, y, torch.float32), gram @ y)


def test_symmetric_products_are_symmetric_to_the_bit():
    x = drawn(2, 40, 60).to(DEVICE, torch.float32)
    gram = symmetric_product(x, x)
    found = symmetric_product(gram, symmetric_product(gram, gram), (0.1, 0.2, 0.3), gram)
    assert torch.equal(bits(found), bits(found.mT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_schmidt(dtype):
    named = {condition: with_condition(20, LENGTH, condition) for condition in (1e2, 1e9)}
    named |= singular() | regular()
    if dtype not in (torch.float32, torch.float64):  # they differ in what is loaded and stored alone
        named = {name: named[name] for name in (1e9, "twice", "tall")}
    matrices = [matrix.to(DEVICE, dtype) for matrix in named.values()]
    outs, info = run(gram_schmidt, matrices, floor=0.0)
    _, torch_info = run(reference.gram_schmidt, matrices, floor=0.0)
    for name, matrix, out, found, by_torch in zip(
        named, matrices, outs, info.tolist(), torch_info.tolist(), strict=True
    ):
        assert_gram_schmidt(matrix, out, found)
        if name != 1e9:  # there, rounding decides which rows count
            assert found == by_torch, name


def test_gram_schmidt_counts_rows_up_to_the_floor_as_zero():
    matrix = drawn(20, LENGTH)
    matrix[::3] *= 1e-4
    for dtype in DTYPES:
        matrices = [matrix.to(DEVICE, dtype)]
        (out,), info = run(gram_schmidt, matrices, floor=1e-2)
        (by_torch,), torch_info = run(reference.gram_schmidt, matrices, floor=1e-2)
        assert info.item() == torch_info.item() == 7
        assert torch.equal(out == 0, by_torch == 0)


ALL = {
    "polar": (
        newton_schulz,
        {"coefficients": COEFFICIENTS["polar_express"][:2], "dtype": torch.float32, "spectral": 40, "eps": 0.0},
    ),
    "newton_schulz": (
        newton_schulz,
        {"coefficients": COEFFICIENTS["muon"] * 2, "dtype": torch.bfloat16, "spectral": 0, "eps": 0.0},
    ),
    "gram_schmidt": (gram_schmidt, {"floor": 0.0}),
}


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_twice_and_alone(op, dtype):
    function, options = ALL[op]
    shapes = ((18, 24), (33, 36), (24, 18), (18, 24), (1, 9))
    matrices = [drawn(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate(shapes)]
    outs, _ = run(function, matrices, **options)
    assert_same(outs, run(function, matrices, **options)[0])
    assert_same(outs[2:3], run(function, matrices[2:3], **options)[0])


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_becomes_zero_and_harms_no_other(op, bad):
    function, options = ALL[op]
    matrices = [drawn(5, 20, seed=i).to(DEVICE, torch.float32) for i in range(3)]
    outs, info = run(function, matrices, **options)
    matrices[1][3, 5] = bad
    without, found = run(function, matrices, **options)
    assert not without[1].any()
    assert_same(outs[::2], without[::2])
    assert found.tolist() == [info[0], -2, info[2]]


@pytest.mark.parametrize("method", ["gram_schmidt", "newton_schulz"])
def test_the_public_op_runs_them(method):
    tensors = [drawn(6, 3, 2, 2).to(DEVICE, torch.float32), drawn(9, 5).to(DEVICE, torch.float32)]
    found = ops.orthogonalize(tensors, method=method, backend="triton")
    wanted = ops.orthogonalize([tensor.double() for tensor in tensors], method=method, backend="reference")
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and error(got, want) < 1e-5
