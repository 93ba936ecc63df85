"""Inputs near the ends of their dtype: what a scaled input gives is known from what the input itself gives.

Scales are powers of two, which round nothing: norms, means and sums must follow them, and directions not change.
"""

import math

import cases
import pytest
import roots
import torch
from torch import nn

import fastcurv
from fastcurv import _backend, ops, reference
from fastcurv.ops import _matrices, kron_eigh, orthogonalize, stein
from fastcurv.ops.newton_schulz import COEFFICIENTS

FLOAT32 = (2.0**-79, 2.0**-66, 2.0**66, 2.0**120)  # 1.7e-24, 1.4e-20, 7.4e19, 1.3e36
FLOAT64 = (2.0**-1010, 2.0**-664, 2.0**664, 2.0**1010)
SCALES = [(torch.float32, s) for s in FLOAT32] + [(torch.float64, s) for s in FLOAT64]
EVERY = ["reference", *cases.backends("lamb")]
NATIVE = _backend.native() is not None


def run(case, backend):
    return cases.by_reference(case) if backend == "reference" else cases.run(case, backend)


def scaled(case, **scales):
    """The case with lists times powers of two."""
    copy = case.clone()
    for name, scale in scales.items():
        for x in copy[name]:
            x.mul_(scale)
    return copy


def assert_scaled(result, base, scale, tolerance):
    """Within some roundings of the largest element, and of the smallest number where that is subnormal."""
    info = torch.finfo(result.dtype)
    want = base.double() * scale
    bound = tolerance * info.eps * want.abs().max() + tolerance * info.smallest_normal * info.eps
    assert result.isfinite().all() and ((result.double() - want).abs() <= bound).all()


# Weights, and gradients: each of the two norms by itself, and both.
PAIRS = [(w, g) for w in FLOAT32 for g in (1.0, w)] + [(1.0, g) for g in FLOAT32] + [(2.0**66, 2.0**-79)]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("weights, grads", PAIRS)
def test_lars_steps_follow_the_scale_of_the_weights_alone(backend, weights, grads, generator):
    """With eps = 0 the trust ratio makes of any gradient one of the weights' size."""
    case = cases.make_case("lars", [(4, 9), (300,)], generator=generator, eps=0.0, momentum=0.0)
    base, result = run(case, backend), run(scaled(case, params=weights, grads=grads), backend)
    for a, b in zip(result["params"], base["params"], strict=True):
        assert_scaled(a, b, weights, 8)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("scale", FLOAT32)
def test_weights_of_1e20_keep_their_trust_ratio(backend, scale, generator):
    """LAMB's update has no scale: a step is as large as the weights."""
    case = cases.make_case("lamb", [(4, 9), (300,)], generator=generator)
    base, result = run(case, backend), run(scaled(case, params=scale), backend)
    for a, b in zip(result["params"], base["params"], strict=True):
        assert_scaled(a, b, scale, 8)


@pytest.mark.parametrize("backend", EVERY)
def test_the_step_of_lamb_may_be_larger_than_float32(backend, generator):
    """Of gradients that vanish the update is tiny, and the trust ratio of large weights beyond float32."""
    case = cases.make_case("lamb", [(4, 9)], generator=generator, eps=2.0**40, beta1=0.0)
    for name in ("exp_avgs", "exp_avg_sqs"):
        case[name][0].zero_()
    base, result = run(case, backend), run(scaled(case, params=2.0**60, grads=2.0**-60), backend)
    assert_scaled(result["params"][0], base["params"][0], 2.0**60, 64)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("scale", FLOAT32)
def test_nero_turns_neurons_of_any_length(backend, scale, generator):
    """The weights' norm goes, and a gradient turns them by its direction."""
    case = cases.make_case("nero", [(4, 9), (3, 300)], generator=generator)
    for w, g in ((scale, 1.0), (1.0, min(scale, 2.0**60)), (scale, min(scale, 2.0**60))):
        given = scaled(case, params=w, scales=w, grads=g)
        for average, neurons in zip(given["row_exp_avg_sqs"], given["params"], strict=True):
            average.zero_()
            neurons.sub_(neurons.mean(1, keepdim=True))
        base = scaled(given, params=1 / w, scales=1 / w, grads=1 / g)
        for a, b in zip(run(given, backend)["params"], run(base, backend)["params"], strict=True):
            assert_scaled(a, b, 1.0, 16)


@pytest.mark.parametrize("backend", EVERY)
def test_gradients_beyond_the_squares_of_float64_leave_neurons_where_they_are(backend, generator):
    """Their average is infinite, as documented; the weights are not NaN."""
    case = scaled(cases.make_case("nero", [(4, 9)], "float64", generator=generator), grads=2.0**700)
    assert run(case, backend)["params"][0].isfinite().all()


@pytest.mark.parametrize("backend", EVERY)
def test_ranger_centralises_gradients_whose_sum_overflows(backend, generator):
    case = cases.make_case("ranger", [(4, 9), (3, 300)], generator=generator)
    grads = [torch.full_like(g, 3e38) for g in case["grads"]]
    result = run(cases.Case("ranger", {**case.clone().lists, "grads": grads}, case.options), backend)
    for m, before in zip(result["exp_avgs"], case["exp_avgs"], strict=True):
        # The mean is off by a rounding for each power of two of the row's length.
        assert ((m - 0.75 * before).abs() <= 3e38 * 10 * 2.0**-24).all()


@pytest.mark.parametrize("dtype, scale", [*SCALES, (torch.bfloat16, 2.0**-79), (torch.bfloat16, 2.0**66)])
def test_nero_takes_any_weights_at_construction(dtype, scale, generator):
    w = torch.randn(5, 12, generator=generator, dtype=torch.float64).to(dtype)
    one, other, bias = nn.Parameter(w.clone()), nn.Parameter(w * scale), nn.Parameter(w[0] * scale)
    fastcurv.Nero([one])
    optimizer = fastcurv.Nero([other, bias])
    assert torch.equal(one, other) and one.any()
    other.grad, bias.grad = torch.ones_like(w), torch.ones_like(w[0])
    optimizer.step()
    info = torch.finfo(dtype)
    wanted = w[0].double().abs().mean() * scale
    assert (optimizer.state[bias]["scale"].double() - wanted).abs() <= 8 * max(info.eps, 2.0**-23) * wanted


@pytest.mark.parametrize("how", ["layer", "component"])
@pytest.mark.parametrize("dtype, scale", [*SCALES, (torch.float64, 2.0**1023)])
def test_normalized_and_clipped_gradients_of_any_size(how, dtype, scale, generator):
    def step(gradient, **options):
        p = nn.Parameter(torch.zeros_like(gradient))
        p.grad = gradient
        fastcurv.OSGD([p], lr=1.0, momentum=0.0, weight_decay=0.0, **options).step()
        return p.detach()

    g = torch.rand(4, 6, generator=generator, dtype=torch.float64).to(dtype) * 0.9
    assert_scaled(step(g * scale, normalize=how), step(g, normalize=how), 1.0, 8)
    if scale > 1:
        bias = nn.Parameter(torch.zeros_like(g[0]))
        bias.grad = g[0] * scale
        fastcurv.OSGD([bias], lr=1.0, momentum=0.0, weight_decay=0.0, max_norm=1.0).step()
        assert_scaled(bias.detach(), -g[0] / g[0].norm(), 1.0, 16)


@pytest.mark.parametrize("method", ["polar", "gram_schmidt", "newton_schulz"])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("dtype, scale", [*SCALES, (torch.float64, 2.0**1020)])
def test_orthogonal_factors_do_not_depend_on_scale(method, backend, dtype, scale, generator):
    if reason := _backend.unusable(method, backend, torch.device("cpu")):
        pytest.skip(reason)
    m = torch.randn(5, 9, generator=generator, dtype=torch.float64).to(dtype)
    infos = torch.zeros(2, dtype=torch.int32)
    (one,) = orthogonalize([m], method=method, backend=backend, info=infos[:1])
    (other,) = orthogonalize([m * scale], method=method, backend=backend, info=infos[1:])
    assert infos.tolist() == [0, 0]
    assert_scaled(other, one, 1.0, 64)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_newton_schulz_with_eps_takes_float64_of_any_size(backend, generator):
    if reason := _backend.unusable("newton_schulz", backend, torch.device("cpu")):
        pytest.skip(reason)
    m = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    info = torch.zeros(1, dtype=torch.int32)
    (one,) = orthogonalize([m], method="newton_schulz", backend=backend, eps=1e-7)
    (other,) = orthogonalize([m * 2.0**700], method="newton_schulz", backend=backend, eps=1e-7, info=info)
    assert info.item() == 0
    assert_scaled(other, one, 1.0, 64)


@pytest.mark.parametrize("scale", FLOAT64)
def test_the_reference_of_newton_schulz_takes_float64_of_any_size(scale, generator):
    m = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    outs, info = [torch.empty_like(m) for _ in range(2)], torch.zeros(2, dtype=torch.int32)
    steps = COEFFICIENTS["muon"] * 5
    reference.newton_schulz([m, m * scale], outs, info, coefficients=steps, dtype=torch.float32, spectral=0, eps=0.0)
    assert info.tolist() == [0, 0] and torch.equal(*outs)


FACTORS = {"eye": torch.eye(2, dtype=torch.float64), "full": 0.5 + 0.5 * torch.eye(3, dtype=torch.float64)}
ENDS = [
    (torch.float32, 2.0**-126), (torch.float32, 2.0**-80), (torch.float32, 2.0**80), (torch.float32, 2.0**127.8),
    (torch.float64, 2.0**-1020), (torch.float64, 2.0**-664), (torch.float64, 2.0**664), (torch.float64, 2.0**1023.8),
]  # fmt: skip
WAYS = [("newton", backend) for backend in roots.BACKENDS]
WAYS += [
    (way, backend) for way in ("cholesky", "eigh") for backend in ("reference", "cpp") if NATIVE or backend != "cpp"
]
WAYS += [("cholesky", "emulator")] if NATIVE and roots.IS_CPU else []


def root_by(way, backend, factors, damping=0.0, p=1, **options):
    if way == "newton":
        return roots.kron_root(factors, damping, p, backend=backend, **options)
    if way == "eigh":
        return ops.kron_root(factors, damping, p, method="eigh", backend=backend, **options)
    if backend != "emulator":
        return ops.kron_inverse(factors, damping, backend=backend, **options)
    from cuda_host import emulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "choose", lambda *_: ("emulator", emulator.emulated("kron_inverse")))
        return ops.kron_inverse(factors, damping, **options)


@pytest.mark.parametrize("way, backend", WAYS)
@pytest.mark.parametrize("dtype, scale", ENDS)
@pytest.mark.parametrize("which", FACTORS)
def test_factors_near_the_ends_of_their_dtype_have_their_inverse(way, backend, dtype, scale, which):
    """3e38 I has one of 3.3e-39, which float32 holds as a subnormal number. So has a sum of such factors' rows."""
    base = FACTORS[which]
    factor = (base * scale).to(dtype, copy=True)
    wanted = torch.linalg.inv(factor.double() / scale)
    for p in (1,) if way == "cholesky" else (1, 4):
        root = wanted if p == 1 else torch.linalg.matrix_power(base, 0) * 0 + _root_of(factor.double() / scale, p)
        results, info = root_by(way, backend, [factor.to(cases.DEVICE)], p=p)
        assert info.tolist() == [0]
        # The condition number is at most 4: 20 kappa u, and three roundings of subnormal numbers.
        limits = torch.finfo(dtype)
        bound = 40 * limits.eps * root.norm() + 3 * limits.smallest_normal * limits.eps * scale ** (1 / p)
        # Brought near one in two steps: one alone may be beyond the dtype.
        half = scale ** (0.5 / p)
        assert ((results[0].cpu().double() * half * half - root).abs() <= bound).all()


def _root_of(matrix, p):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values ** (-1 / p)) @ vectors.mT


@pytest.mark.parametrize("way, backend", WAYS)
@pytest.mark.parametrize("has_previous", [False, True])
def test_what_cannot_be_represented_gets_its_code(way, backend, has_previous):
    """-1 for an inverse beyond the dtype, -2 for a factor that damping makes infinite; then the previous inverse."""
    for dtype, tiny, huge in ((torch.float32, 1e-42, 3e38), (torch.float64, 1e-320, 1.7e308)):
        one = torch.eye(2, dtype=dtype, device=cases.DEVICE)
        before = 7 * one if has_previous else 0 * one
        options = {"previous": [before]} if has_previous else {}
        for factor, damping, code in ((tiny * one, 0.0, -1), (huge * one, huge / 2, -2)):
            (result,), info = root_by(way, backend, [factor], damping, **options)
            assert info.tolist() == [code] and torch.equal(result, before)


@pytest.mark.parametrize("way, backend", WAYS)
def test_jitter_that_overflows_is_one_that_did_not_help(way, backend):
    """The factor itself is finite, but not definite."""
    factor = torch.tensor([[3.4e38, 3.4e38], [3.4e38, 3.4e38]], device=cases.DEVICE)
    factor[1, 1] = 3.39e38
    (result,), info = root_by(way, backend, [factor])
    assert info.tolist() == [-1] and not result.any()


def test_an_eigenvalue_beyond_the_dtype_is_reported():
    _, _, info = kron_eigh([torch.full((2, 2), 3e38), torch.eye(2)])
    assert info.tolist() == [-1, 0]


def test_stein_takes_factors_whose_double_overflows():
    base = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    for scale in (2.0**127, 1.0):
        left, right, left_values, right_values = stein(1.0, 1.0, base * scale, base)
        assert_scaled(right_values, torch.tensor([0.5, 1.5]), scale, 4)
        assert all(x.isfinite().all() for x in (left, right, left_values))


@pytest.mark.parametrize("shape", [None, (1, 2)])
def test_norms_of_what_has_no_squares(shape):
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    for scale in (1.0, 2.0**-1070, 2.0**1020):
        assert _matrices.norm(x * scale, dim=shape).item() == 5.0 * scale
    assert math.isinf(_matrices.norm(x * math.inf, dim=shape).item())


@pytest.mark.parametrize("has_others", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_factor_that_a_scale_would_make_infinite_is_what_it_was(backend, dtype, has_others):
    if reason := _backend.unusable("kron_factor", backend, torch.device("cpu")):
        pytest.skip(reason)
    most = torch.finfo(dtype).max
    samples = [torch.full((1, 2), x, dtype=dtype) for x in ((most / 300) ** 0.5, 1.0)]
    factors = [torch.full((2, 2), m, dtype=dtype) for m in (most, 1.0)]
    before = [factor.clone() for factor in factors]
    others = [x.clone() for x in samples] if has_others else None
    traces, info = ops.kron_factor_(factors, samples, 0.999, scale=1000.0, others=others, dtype=dtype, backend=backend)
    assert info.tolist() == [-2, 0] and torch.equal(factors[0], before[0])
    torch.testing.assert_close(
        factors[1], torch.full((2, 2), 1.999, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0
    )
    expected = [0.0, 0.0] if has_others else [before[0].diagonal().sum(dtype=torch.float64).item(), 2 * 1.999]
    torch.testing.assert_close(traces.tolist(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
