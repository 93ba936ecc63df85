"""The CUDA kernels on matrices: in the host emulator, in every order of threads, and on a GPU where there is one."""

import functools
import math

import pytest
import torch
from spectra import assert_gram_schmidt, polar_truth, steps_truth

from fastcurv import _backend, reference
from fastcurv.ops.newton_schulz import COEFFICIENTS
from fastcurv.ops.polar import schedule

if _backend.native() is None:
    pytest.skip("fastcurv._C is not built", allow_module_level=True)

from cuda_host import emulator

from fastcurv import _C

ORDERS = [("ascending", 0), ("descending", 0), ("random", 1), ("random", 2)]
GPU = torch.device("cuda")
WHERE = ["emulator", *(["gpu"] if not _backend.unusable("newton_schulz", "cuda", GPU) else [])]
# Around the squares of 16 that threads are laid out in, and around panels of 16 rows.
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (16, 144), (17, 40), (40, 17), (33, 100), (100, 48), (64, 64), (64, 200)]
CONDITIONS = [1.0, 1e3, 1e5, 1e7, 1e9]


def run(op, matrices, *, where="emulator", order="ascending", seed=0, in_place=False, **keywords):
    """Outputs and info of an op; what lies around the outputs, and the matrices, must stay as they are."""
    device = GPU if where == "gpu" else torch.device("cpu")
    buffers = [torch.full((m.numel() + 32,), 1.5, dtype=m.dtype, device=device) for m in matrices]
    outs = [b[16:-16].view(m.shape) for b, m in zip(buffers, matrices, strict=True)]
    info = torch.full((len(matrices),), 99, dtype=torch.int32, device=device)
    ins = [m.clone().to(device) for m in matrices]
    for out, matrix in zip(outs, ins, strict=True):
        out.copy_(matrix) if in_place else out.fill_(math.nan)
    if where == "gpu":
        implementation = _backend.choose(op, GPU, "cuda")[1]
    else:
        implementation = emulator.emulated(op, order=order, seed=seed)
    implementation(outs if in_place else ins, outs, info, **keywords)
    for buffer, matrix, given in zip(buffers, ins, matrices, strict=True):
        assert (buffer[:16] == 1.5).all() and (buffer[-16:] == 1.5).all()
        assert torch.equal(matrix.cpu().nan_to_num(), given.nan_to_num())
    return [out.cpu() for out in outs], info.tolist()


def by_reference(op, matrices, **keywords):
    outs, info = [torch.empty_like(m) for m in matrices], torch.zeros(len(matrices), dtype=torch.int32)
    getattr(reference, op)(matrices, outs, info, **keywords)
    return outs, info.tolist()


def polar(matrices, **how):
    """By the steps for the shortest of them, as ops/polar.py does."""
    length = min(max(matrix.shape) for matrix in matrices)
    return run(
        "newton_schulz", matrices, coefficients=schedule(length), dtype=torch.float32, spectral=length, eps=0.0, **how
    )


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64))[0]


def with_spectrum(shape, sigma, dtype=torch.float32):
    k = min(shape)
    return ((orthonormal(shape[0], k) * sigma) @ orthonormal(shape[1], k).T).to(dtype)


@functools.cache
def examples(shape, dtype=torch.float32):
    """Matrices of all conditions, and of less than full rank."""
    torch.manual_seed(sum(shape))
    k = min(shape)
    list_ = [with_spectrum(shape, torch.logspace(0, -math.log10(c), k, dtype=torch.float64), dtype) for c in CONDITIONS]
    ranked = torch.randn(shape[0], -(-k // 2), dtype=torch.float64) @ torch.randn(
        -(-k // 2), shape[1], dtype=torch.float64
    )
    dead, twice = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    dead[::3] = 0
    twice[::2] = twice[:1].clone()
    return [*list_, ranked.to(dtype), dead, twice, torch.zeros(shape, dtype=dtype)]


def bounds(shape, dtype):
    """Half an ulp of numbers up to one, in a dtype, and what counts as zero beside one."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return torch.finfo(dtype).eps / 2, math.sqrt(max(shape)) * unit


def steps_rounding(steps, shape):
    """Units of the last place that as many products with inner products of the smaller side are wrong by."""
    return steps * (min(shape) + 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor(shape, dtype, where):
    """An ulp of the largest entry, and what rounding in double does.

    That of G G^T moves the factor by as much as the square of the condition, that of the steps is enlarged as singular
    values are: until the smallest is one, or what counts as zero would be.
    """
    matrices = examples(shape, dtype)
    outs, info = polar(matrices, where=where)
    half_ulp, zero = bounds(shape, dtype)
    steps = schedule(max(shape))
    for matrix, out, found in zip(matrices, outs, info, strict=True):
        truth, sigma, lost = polar_truth(matrix)
        condition = (sigma[0] / sigma[-1 - lost]).item() if lost < len(sigma) else 0.0
        gain = 1 / zero if lost else condition
        rounded = 2.0**-53 * (2 * condition**2 + steps_rounding(len(steps), shape) * gain)
        assert found == lost
        assert (out.double() - truth).abs().max() <= 2 * half_ulp * truth.abs().max() + rounded


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficients", ["muon", "polar_express", "cubic"])
def test_newton_schulz_steps(coefficients, dtype, where):
    """Against the polynomial of each singular value. Steps in double lose what all a_k together make of its rounding."""
    steps = (COEFFICIENTS[coefficients] * 5)[:5]
    keywords = {"coefficients": steps, "dtype": torch.float32, "spectral": 0, "eps": 0.0}
    gain = math.prod(a for a, _, _ in steps)
    for shape in SHAPES:
        matrices = examples(shape, dtype)
        outs, info = run("newton_schulz", matrices, where=where, **keywords)
        wanted, wanted_info = by_reference("newton_schulz", matrices, **keywords)
        assert info == wanted_info == [0] * len(matrices)
        for matrix, out, expected in zip(matrices, outs, wanted, strict=True):
            truth = steps_truth(matrix, steps)
            error, least = (out.double() - truth).abs().max(), (expected.double() - truth).abs().max()
            assert error <= 2 * least + 2 * torch.finfo(dtype).eps + 2.0**-53 * steps_rounding(len(steps), shape) * gain


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_schmidt(shape, dtype, where):
    matrices = examples(shape, dtype)
    outs, info = run("gram_schmidt", matrices, where=where, floor=0.0)
    _, wanted_info = by_reference("gram_schmidt", matrices, floor=0.0)
    _, zero = bounds(shape, dtype)
    for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
        assert_gram_schmidt(matrix, out, info[i])
        # Which rows are left out is rounding's choice where singular values go on to nothing, or are nothing but that.
        if i > len(CONDITIONS) or (i < len(CONDITIONS) and CONDITIONS[i] * zero < 0.01):
            assert info[i] == wanted_info[i]


@pytest.mark.parametrize("where", WHERE)
def test_gram_schmidt_leaves_out_rows_up_to_the_floor(where):
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 1e-6, 2e-6]))
    (out,), info = run("gram_schmidt", [matrix], where=where, floor=1e-6)
    assert info == [1] and torch.equal(out, torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0])))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_gram_schmidt_of_any_scale(scale, where):
    matrix = torch.eye(3, 40) * scale
    (out,), info = run("gram_schmidt", [matrix], where=where, floor=0.0)
    assert info == [0] and torch.equal(out, torch.eye(3, 40))


OPS = [
    ("newton_schulz", {"coefficients": schedule(1), "dtype": torch.float32, "spectral": 1, "eps": 0.0}),
    ("gram_schmidt", {"floor": 0.0}),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shape", [(3, 5), (20, 50), (64, 64), (50, 20)])
@pytest.mark.parametrize(("op", "keywords"), OPS)
def test_matrices_that_are_not_finite_become_zero_and_others_do_not(op, keywords, shape, where):
    matrices = [torch.randn(shape) for _ in range(5)]
    (good, _), _ = run(op, matrices[::4], where=where, **keywords)
    matrices[1][-1, -1] = math.nan
    matrices[2][0, 1] = math.inf
    matrices[3][shape[0] // 2, 0] = -math.inf
    for order, seed in ORDERS:
        outs, info = run(op, matrices, where=where, order=order, seed=seed, in_place=seed > 0, **keywords)
        assert info[1:4] == [-2] * 3 and info[0] == info[4] == 0
        assert not any(out.any() for out in outs[1:4])
        assert torch.equal(outs[0], good)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("op", "keywords"), OPS)
def test_transposed_in_place_and_repeated_calls_give_the_same_bits(op, keywords, where):
    matrices = [examples(shape)[1] for shape in SHAPES]
    outs, info = run(op, matrices, where=where, **keywords)
    assert run(op, matrices, where=where, **keywords)[1] == info
    in_place, _ = run(op, matrices, where=where, in_place=True, **keywords)
    transposed, _ = run(op, [m.T.contiguous() for m in matrices], where=where, **keywords)
    for out, same, other in zip(outs, in_place, transposed, strict=True):
        assert torch.equal(out, same)
        assert torch.equal(out, other.T) or out.shape[0] == out.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "keywords"), OPS)
def test_any_order_of_threads_gives_the_same_bits(op, keywords, dtype):
    matrices = [m for shape in SHAPES for m in examples(shape, dtype)[1:9:3]]
    wanted, info = run(op, matrices, **keywords)
    for order, seed in ORDERS:
        found, same = run(op, matrices, order=order, seed=seed, **keywords)
        assert info == same and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), (order, seed)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("op", "keywords"), OPS)
def test_long_lists_are_several_launches(op, keywords, where):
    matrices = [torch.randn(1 + i % 7, 1 + i % 5) for i in range(150)]
    outs, info = run(op, matrices, where=where, **keywords)
    plan = getattr(_C, f"{op}_kernel")(matrices, outs, torch.zeros(150, dtype=torch.int32), **keywords)
    assert [launch[1] for launch in plan] == [64, 64, 22]
    assert all(len(launch[-1]) <= 4096 for launch in plan)
    for i in (0, 63, 64, 127, 128, 149):
        alone, its_info = run(op, matrices[i : i + 1], where=where, **keywords)
        assert torch.equal(alone[0], outs[i]) and its_info == info[i : i + 1]


def test_what_a_kernel_cannot_do_is_refused():
    def plan(op, matrix, **keywords):
        return getattr(_C, f"{op}_kernel")([matrix], [matrix], torch.zeros(1, dtype=torch.int32), **keywords)

    keywords = {"coefficients": [(1.0, 0.0, 0.0)], "dtype": torch.float32, "spectral": 0, "eps": 0.0}
    (launch,) = plan("newton_schulz", torch.zeros(64, 1000), **keywords)
    assert 48 << 10 < launch[4] < 99 << 10
    assert plan("newton_schulz", torch.zeros(1000, 16), **keywords)[0][4] < 48 << 10
    with pytest.raises(ValueError, match="at most 64 rows"):
        plan("newton_schulz", torch.zeros(65, 66), **keywords)
    with pytest.raises(ValueError, match="40 steps"):
        plan("newton_schulz", torch.zeros(2, 2), **{**keywords, "coefficients": [(1.0, 0.0, 0.0)] * 41})
    with pytest.raises(TypeError, match="float32 or float64"):
        plan("gram_schmidt", torch.zeros(2, 2, dtype=torch.bfloat16), floor=0.0)
