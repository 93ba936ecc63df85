"""The op `kron_factor_` against float64 products, torch's unfold, and closed forms."""

import math

import pytest
import torch
from cases import DEVICE
from spectra import UNIT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import unfold

from fastcurv import _backend, ops
from fastcurv.ops import Patches

BACKENDS = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable("kron_factor", name, DEVICE)]
# The CUDA kernels in the host emulator.
BACKENDS += ["reference", *(["emulator"] if _backend.native() is not None and DEVICE.type == "cpu" else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", list(UNIT))


def kron_factor_(factors, inputs, decay=0.0, *, backend=None, order="ascending", **options):
    """The op; in the emulator, where that is asked for."""
    if backend != "emulator":
        return ops.kron_factor_(factors, inputs, decay, backend=backend, **options)
    from cuda_host import emulator

    with pytest.MonkeyPatch.context() as patch:
        kernels = emulator.emulated("kron_factor", order=order, seed=1)
        patch.setattr(_backend, "choose", lambda *_: ("cuda", kernels))
        return ops.kron_factor_(factors, inputs, decay, **options)


def samples(rows, columns, generator, dtype=torch.float32):
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def rows_of(x, has_ones):
    x = x.double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], dim=1) if has_ones else x


def assert_factor(found, before, x, y, decay, scale, unit, has_ones=False):
    """A sum of N products is off by less than N + 4 units of the sum of their sizes."""
    x, y = rows_of(x, has_ones), rows_of(y, has_ones)
    truth = (decay * before.double() if decay else 0.0) + (1 - decay) * scale * (x.mT @ y)
    sizes = (decay * before.double().abs() if decay else 0.0) + (1 - decay) * scale * (x.abs().mT @ y.abs())
    stored = 0.0 if found.dtype == torch.float64 else UNIT[torch.float32]
    assert ((found.double() - truth).abs() <= ((len(x) + 4) * unit + 2 * stored) * sizes).all()


@every_backend
@every_dtype
@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("has_ones", [False, True])
def test_second_moments(backend, dtype, in_double, has_ones, generator):
    shapes = [(1, 1), (7, 5), (300, 16), (1000, 40), (64, 129), (513, 31)]
    shapes = shapes[:3] if backend == "triton" and _backend.interpreting() else shapes
    xs = [samples(*shape, generator, dtype) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = []
    for _, d in shapes:
        m = torch.randn(d + has_ones, d + has_ones, generator=generator).to(DEVICE, wide)
        factors.append(m + m.mT)
    before, given = [m.clone() for m in factors], [x.clone() for x in xs]
    traces, info = kron_factor_(
        factors, xs, 0.75, has_ones=has_ones, backend=backend, dtype=torch.float64 if in_double else torch.float32
    )
    unit = UNIT[torch.float64] if in_double or dtype == torch.float64 else UNIT[torch.float32]
    assert not info.any() and traces.dtype == torch.float64
    for factor, old, x, same, trace in zip(factors, before, xs, given, traces, strict=True):
        assert torch.equal(x, same) and torch.equal(factor, factor.mT)
        assert_factor(factor, old, x, x, 0.75, 1 / len(x), unit, has_ones)
        torch.testing.assert_close(trace, factor.diagonal().sum(dtype=torch.float64), rtol=1e-12, atol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_ones", [False, True])
@pytest.mark.parametrize("kernel, stride, padding, dilation", [
    (3, 1, 1, 1), (1, 1, 0, 1), ((3, 2), (2, 1), (0, 2), (1, 2)), (5, 3, 4, 1), ((1, 7), 1, (0, 3), 1),
])  # fmt: skip
def test_patches_of_convolutions(backend, dtype, has_ones, kernel, stride, padding, dilation, generator):
    images = torch.randn(3, 4, 9, 11, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    wide = images.double()
    x = unfold(wide, kernel, dilation, padding, stride).mT.flatten(0, 1)
    d = x.shape[1] + has_ones
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.full((d, d), math.nan, dtype=exact, device=DEVICE)
    for given in (images, images.to(memory_format=torch.channels_last)):
        kron_factor_(
            [factor], [given], has_ones=has_ones, patches=[Patches(kernel, stride, padding, dilation)], backend=backend
        )
        assert_factor(factor, factor, x, x, 0.0, 1 / len(x), UNIT[exact], has_ones)


@every_backend
def test_many_patches_of_images_of_several_sizes(backend, generator):
    """More columns than a tile of a GPU has, and as many samples as several blocks share."""
    shapes = [(2, 16, 20, 20), (1, 3, 40, 33), (4, 9, 1, 70)]
    seen = [Patches(3, padding=1), Patches((5, 2), (1, 2)), Patches((1, 4), padding=(0, 2), dilation=(3, 2))]
    images = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    xs = [
        unfold(x.double(), p.kernel_size, p.dilation, p.padding, p.stride).mT.flatten(0, 1)
        for x, p in zip(images, seen, strict=True)
    ]
    factors = [torch.eye(x.shape[1] + 1, device=DEVICE) for x in xs]
    kron_factor_(factors, images, 0.5, has_ones=True, patches=seen, backend=backend)
    for factor, x in zip(factors, xs, strict=True):
        before = torch.eye(len(factor), device=DEVICE)
        assert_factor(factor, before, x, x, 0.5, 1 / len(x), UNIT[torch.float32], has_ones=True)
        assert torch.equal(factor, factor.mT)


@every_backend
def test_cross_factors_of_images(backend, generator):
    first, second = (torch.randn(3, c, 7, 6, generator=generator).to(DEVICE) for c in (2, 5))
    x, y = (unfold(z.double(), (3, 2), padding=1).mT.flatten(0, 1) for z in (first, second))
    factor = torch.empty(13, 31, device=DEVICE)
    seen = [Patches((3, 2), padding=1)]
    kron_factor_([factor], [first], others=[second], has_ones=True, patches=seen, backend=backend)
    assert_factor(factor, factor, x, y, 0.0, 1 / len(x), UNIT[torch.float32], has_ones=True)


@every_backend
def test_the_weight_of_a_convolution_has_the_order_of_its_patches(backend, generator):
    """The quadratic form of the factor is the mean square of what the convolution gives."""
    conv = torch.nn.Conv2d(3, 1, (3, 2), padding=1, bias=True, dtype=torch.float64, device=DEVICE)
    images = torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64).to(DEVICE)
    factor = torch.empty(19, 19, dtype=torch.float64, device=DEVICE)
    kron_factor_([factor], [images], has_ones=True, patches=[Patches((3, 2), padding=1)], backend=backend)
    weight = torch.cat([conv.weight.detach().flatten(), conv.bias.detach()])
    torch.testing.assert_close(weight @ factor @ weight, conv(images).square().mean().detach(), rtol=1e-12, atol=0)


@every_backend
@pytest.mark.parametrize("has_ones", [False, True])
def test_cross_factors(backend, has_ones, generator):
    widths = ((5, 9), (40, 3), (17, 50), (130, 70), (64, 193))
    widths = widths[:3] if backend == "triton" and _backend.interpreting() else widths
    xs, ys = ([samples(600, pair[k], generator) for pair in widths] for k in range(2))
    before = [
        torch.randn(x.shape[1] + has_ones, y.shape[1] + has_ones, generator=generator).to(DEVICE)
        for x, y in zip(xs, ys, strict=True)
    ]
    factors = [m.clone() for m in before]
    traces, info = kron_factor_(factors, xs, 0.5, others=ys, has_ones=has_ones, backend=backend)
    assert not traces.any() and not info.any()
    for factor, old, x, y in zip(factors, before, xs, ys, strict=True):
        assert_factor(factor, old, x, y, 0.5, 1 / 600, UNIT[torch.float32], has_ones)


@every_backend
def test_alone_in_a_list_and_on_any_number_of_threads(backend, generator):
    sizes = ((300, 65), (50, 4), (600, 300), (900, 130))
    count = 2 if backend == "triton" and _backend.interpreting() else 4
    xs = [samples(n, d, generator) for n, d in sizes[:count]]

    def updated(indices):
        factors = [torch.eye(xs[i].shape[1], device=DEVICE) for i in indices]
        kron_factor_(factors, [xs[i] for i in indices], 0.5, backend=backend)
        return factors

    together, before = updated(range(count)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3) if backend == "cpp" else (before,):
            torch.set_num_threads(threads)
            for i in range(count):
                assert torch.equal(updated([i])[0], together[i])
    finally:
        torch.set_num_threads(before)


@every_backend
def test_longer_lists_than_a_launch_takes(backend, generator):
    """Each factor as if it were alone."""
    sizes = [(1 + 37 * i % 300, 1 + 23 * i % 80) for i in range(35)]
    xs = [samples(*size, generator) for size in sizes]
    factors = [torch.full((d, d), 0.5, device=DEVICE) for _, d in sizes]
    traces, info = kron_factor_(factors, xs, 0.25, backend=backend)
    assert not info.any()
    for x, factor, trace in list(zip(xs, factors, traces, strict=True))[:: 6 if backend == "triton" else 1]:
        alone = torch.full_like(factor, 0.5)
        (found,), _ = kron_factor_([alone], [x], 0.25, backend=backend)
        assert torch.equal(alone, factor) and found == trace
        assert_factor(factor, torch.full_like(factor, 0.5), x, x, 0.25, 1 / len(x), UNIT[torch.float32])


@pytest.mark.skipif("emulator" not in BACKENDS, reason="needs fastcurv._C")
@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_and_blocks_in_any_order(order, dtype, generator):
    """Neither the sums of a matrix nor the trace of what other blocks are writing depend on who comes first."""
    xs = [samples(n, d, generator, dtype) for n, d in ((900, 70), (40, 150), (3, 2))]
    xs[2][1, 1] = math.nan
    images = torch.randn(2, 8, 9, 9, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for how in ("ascending", order):
        factors = [torch.full((d, d), 0.5, dtype=wide) for d in (71, 151, 3, 73)]
        options = {"has_ones": True, "patches": [None, None, None, Patches(3)], "dtype": torch.float64}
        found = kron_factor_(factors, [*xs, images], 0.5, backend="emulator", order=how, **options)
        results.append([*factors, *found])
    assert results[0][-1].tolist() == [0, 0, -2, 0] and (results[0][2] == 0.5).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_backend
def test_no_factors_and_empty_ones(backend):
    traces, info = kron_factor_([], [], backend=backend)
    assert traces.shape == info.shape == (0,)
    factors = [torch.empty(0, 0, device=DEVICE), torch.full((2, 2), math.nan, device=DEVICE)]
    traces, info = kron_factor_(
        factors, [torch.ones(4, 0, device=DEVICE), torch.ones(4, 2, device=DEVICE)], backend=backend
    )
    assert traces.tolist() == [0, 2] and info.tolist() == [0, 0] and (factors[1] == 1).all()
    ones = [torch.empty(1, 1, device=DEVICE)]
    kron_factor_(ones, [torch.ones(4, 0, device=DEVICE)], has_ones=True, backend=backend)
    assert ones[0].item() == 1


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("crossed", [False, True])
def test_what_is_not_finite_leaves_a_factor_as_it_was(backend, bad, crossed, generator):
    xs = [samples(20, 6, generator) for _ in range(3)]
    ys = [samples(20, 6, generator) for _ in range(3)] if crossed else None
    xs[1][7, 2] = bad
    if crossed and bad == 1e30:
        ys[1][7, 3] = bad
    factors = [torch.eye(6, device=DEVICE) for _ in range(3)]
    traces, info = kron_factor_(factors, xs, 0.5, others=ys, backend=backend)
    assert info.tolist() == [0, -2, 0] and torch.equal(factors[1], torch.eye(6, device=DEVICE))
    assert crossed or traces[1] == 6
    assert not torch.equal(factors[0], factors[1]) and factors[2].isfinite().all()


@every_backend
def test_samples_of_any_shape_and_layout_and_a_scale(backend, generator):
    x = torch.randn(4, 5, 6, generator=generator).to(DEVICE)
    flat, strided, scaled = (torch.empty(6, 6, device=DEVICE) for _ in range(3))
    kron_factor_([flat], [x.reshape(20, 6)], backend=backend)
    kron_factor_([strided], [x.movedim(0, 2).contiguous().movedim(2, 0)], backend=backend)
    kron_factor_([scaled], [x], scale=0.5, backend=backend)
    assert torch.equal(flat, strided)
    torch.testing.assert_close(scaled, 10 * flat)
    version = flat._version
    kron_factor_([flat], [x], 0.5, backend=backend)
    assert flat._version > version


def arguments(**change):
    given = {
        "factors": [torch.eye(3), torch.eye(2)], "inputs": [torch.ones(4, 3), torch.ones(5, 2)], "decay": 0.5, **change,
    }  # fmt: skip
    return [given.pop("factors"), given.pop("inputs")], given


@pytest.mark.parametrize("change, error, match", [
    ({"inputs": torch.ones(4, 3)}, TypeError, "inputs: expected a list of tensors"),
    ({"factors": torch.eye(3)}, TypeError, "factors: expected a list of tensors"),
    ({"factors": [torch.eye(3)]}, ValueError, "factors: expected 2 tensors, one for each of inputs, got 1"),
    ({"factors": [torch.eye(3), torch.eye(3)]}, ValueError, r"factors\[1\]: expected a contiguous matrix of shape \(2, 2\)"),
    ({"factors": [torch.eye(3), torch.eye(2).double()]}, ValueError, r"factors\[1\]: expected torch.float32 on cpu"),
    ({"factors": [torch.eye(3), torch.ones(4, 2)[::2]]}, ValueError, r"factors\[1\]: expected a contiguous matrix"),
    ({"inputs": [torch.ones(4, 3), torch.ones(5, 2).double()]}, ValueError, r"inputs\[1\]: expected torch.float32 on cpu like"),
    ({"inputs": [torch.ones(4, 3), torch.ones(0, 2)]}, ValueError, r"inputs\[1\]: expected one sample or more"),
    ({"inputs": [torch.ones(4, 3), torch.ones(5, 2).to_sparse()]}, ValueError, r"inputs\[1\]: expected a dense tensor"),
    ({"patches": [None]}, ValueError, "patches: expected 2 entries, one for each of inputs, got 1"),
    ({"patches": [None, Patches(1)]}, ValueError, r"inputs\[1\]: expected four dimensions"),
    ({"others": [torch.ones(4, 3)]}, ValueError, "others: expected 2 tensors"),
    ({"others": [torch.ones(4, 3), torch.ones(6, 2)]}, ValueError, r"others\[1\]: expected 5 samples like inputs\[1\], got 6"),
    ({"decay": 1.5}, ValueError, r"decay: expected a number in \[0, 1\], got 1.5"),
    ({"decay": torch.tensor(0.5)}, ValueError, "decay: expected a number"),
    ({"scale": -1.0}, ValueError, "scale: expected a value in"),
    ({"dtype": torch.bfloat16}, ValueError, "dtype: expected torch.float32 or torch.float64"),
    ({"has_ones": "yes"}, TypeError, "has_ones: expected True or False"),
])  # fmt: skip
def test_errors(change, error, match):
    positional, options = arguments(**change)
    with pytest.raises(error, match=match):
        kron_factor_(*positional, **options)


def test_fake_and_meta_tensors():
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            traces, info = kron_factor_(
                [torch.eye(3), torch.eye(3)], [torch.ones(4, 2), torch.ones(5, 2)], has_ones=True
            )
            assert traces.shape == info.shape == (2,) and info.dtype == torch.int32


def test_a_kernel_that_does_not_fit_and_a_factor_that_is_there_twice():
    with pytest.raises(ValueError, match=r"patches\[0\]: expected a kernel that fits into padded images of 4 x 4"):
        kron_factor_([torch.eye(25)], [torch.ones(1, 1, 4, 4)], patches=[Patches(5)])
    memory = torch.zeros(12)
    for twice in ([memory[:9].view(3, 3)] * 2, [memory[3:].view(3, 3), memory[:9].view(3, 3)]):
        with pytest.raises(ValueError, match=r"factors\[1\]: expected memory of its own, but it overlaps factors\[0\]"):
            kron_factor_(twice, [torch.ones(4, 3)] * 2)
    assert not memory.any()


def test_opcheck_and_compile(generator):
    x = samples(10, 4, generator)
    factor, twin = torch.eye(4, device=DEVICE), torch.eye(4, device=DEVICE)
    options = {"decay": 0.5, "scale": [0.05], "has_ones": False, "patches": [0] * 8, "dtype": torch.float32}
    torch.library.opcheck(torch.ops.fastcurv.kron_factor_.default, ([factor.clone()], [x], []), options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(factor, x):
        traces, info = kron_factor_([factor], [x], 0.5)
        return traces + 1, info

    traces, _ = update(factor, x)
    expected, _ = kron_factor_([twin], [x], 0.5)
    assert torch.equal(factor, twin) and torch.equal(traces, expected + 1)


def test_views_with_the_negative_bit():
    """Such as the imaginary part of a conjugate: memory holds the opposite."""
    factor = torch.zeros(2, 2)
    kron_factor_([factor], [torch._neg_view(-torch.ones(1, 2))], others=[torch.ones(1, 2)])
    assert torch.equal(factor, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"factors\[0\]: expected a contiguous matrix"):
        kron_factor_([torch._neg_view(factor)], [torch.ones(1, 2)])
