"""The op `adam`: the reference against torch.optim, every back end against the reference and against the others."""

import ctypes
import itertools
import mmap
import os
import warnings
from fractions import Fraction

import cases
import numpy as np
import pytest
import torch
from cases import ADAM_OPTIONS, DEVICE, DTYPES, adam_case, adam_options, assert_same_bits, bits

from fastcurv import _backend, ops

COMPILED = cases.backends()


def torch_adam(case, steps=1):
    """The same call by torch.optim, one parameter at a time; torch knows no per-call state, so it is planted."""
    case = case.clone()
    options = dict(case.options)
    betas = (options.pop("beta1"), options.pop("beta2"))
    scale = options.pop("grad_scale", None)
    for i, (param, grad, step) in enumerate(zip(case.params, case.grads, case.steps, strict=True)):
        leaf = torch.nn.Parameter(param)
        optimizer = torch.optim.Adam([leaf], betas=betas, foreach=False, **options)
        leaf.grad = grad if scale is None else grad / scale
        state = {"step": step, "exp_avg": case.exp_avgs[i], "exp_avg_sq": case.exp_avg_sqs[i]}
        if options["amsgrad"]:
            state["max_exp_avg_sq"] = case.max_exp_avg_sqs[i]
        optimizer.state[leaf] = state
        for _ in range(steps):
            optimizer.step()
    return case


@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_reference_equals_torch_optim_in_float64(options, generator):
    case = adam_case(dtype="float64", generator=generator, **adam_options(options))
    ours, torchs = cases.run_adam(case, "reference"), torch_adam(case)
    for got_list, want_list in zip(ours.outputs, torchs.outputs, strict=True):
        for got, want in zip(got_list, want_list, strict=True):
            # Both round about 16 times per element; 16 ulp of the largest value that enters.
            torch.testing.assert_close(got, want, rtol=0, atol=16 * 2.3e-16 * 20)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_as_accurate_as_torch(backend, dtype, options, generator):
    case = adam_case(dtype=dtype, generator=generator, **adam_options(options))
    cases.assert_as_accurate_as_torch(cases.run_adam(case, backend), case)


@pytest.mark.parametrize("backend", [b for b in COMPILED if b != "cpp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ADAM_OPTIONS)
def test_back_ends_agree_bit_for_bit(backend, dtype, options, generator):
    case = adam_case(dtype=dtype, generator=generator, **adam_options(options))
    if DEVICE.type == "cpu":
        assert_same_bits(cases.run_adam(case, backend), cases.run_adam(case, "cpp"))
        return
    # On a GPU the same is reported, not demanded: pytest's summary shows the warning.
    cpu = torch.device("cpu")
    same = torch.Generator().manual_seed(generator.initial_seed())
    host = adam_case(dtype=dtype, device=cpu, generator=same, **adam_options(options, cpu))
    if count := cases.differing(cases.run_adam(case, backend), cases.run_adam(host, "cpp")):
        warnings.warn(f"{backend} {dtype} {options}: {count} elements differ in bits from cpp", stacklevel=1)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_many_small_equal_one_large_and_unaligned(backend, amsgrad, generator):
    whole = adam_case([(40001,)], generator=generator, amsgrad=amsgrad, weight_decay=0.1)
    result = cases.run_adam(whole, backend)
    edges = [0, 1, 4, 7, 300, 301, 16384, 16385, 33333, 40001]  # most pieces start at an unaligned address

    def pieces(tensor):
        return [tensor[a:b] for a, b in itertools.pairwise(edges)]

    split = whole.clone()
    parts = cases.Case(
        pieces(split.params[0]),
        pieces(split.grads[0]),
        pieces(split.exp_avgs[0]),
        pieces(split.exp_avg_sqs[0]),
        pieces(split.max_exp_avg_sqs[0]) if amsgrad else [],
        [split.steps[0].clone() for _ in edges[1:]],
        split.options,
    )
    if backend == "cuda_host":
        from cuda_host import emulator

        space = ops.adam.workspace()
        lists = space.prepare(parts.lists)
        table = space._device_table(2048, DEVICE)
        emulator.emulated("adam")(*lists, table, **cases.full(parts.options))
    else:
        ops.adam_(*parts.lists, **parts.options, backend=backend)
    for got, want in zip(split.outputs[:-1], result.outputs[:-1], strict=True):
        for g, w in zip(got, want, strict=True):
            assert torch.equal(bits(g), bits(w))


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_and_repeats_give_the_same_bits(backend, generator):
    case = adam_case([(70001,), (3,), (70001,)], generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = cases.run_adam(case, backend), cases.run_adam(case, backend)
        torch.set_num_threads(2)
        two = cases.run_adam(case, backend)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(one, again)
    assert_same_bits(one, two)


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
def test_found_inf_writes_nothing(backend, generator):
    case = adam_case(generator=generator, found_inf=torch.ones((), device=DEVICE), amsgrad=True)
    assert_same_bits(cases.run_adam(case, backend), case)
    case.options["found_inf"] = torch.zeros((), device=DEVICE)
    assert cases.run_adam(case, backend).steps[1] == case.steps[1] + 1


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_hyper_parameters(backend, dtype, generator):
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    case = adam_case(generator=generator, weight_decay=0.25, eps=0.5**10, lr=0.125, beta2=0.875)
    tensors = case.clone()
    tensors.options.update({name: torch.tensor(case.options[name], dtype=dtype, device=DEVICE) for name in names})
    assert_same_bits(cases.run_adam(tensors, backend), cases.run_adam(case, backend))


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
def test_gradients_are_read_only_and_may_have_another_layout(backend, generator):
    shapes = [(6, 5, 4, 3), (17, 9), (4, 1, 3)]
    case = adam_case(shapes, generator=generator)
    expected = cases.run_adam(case, backend)
    other = case.clone().with_grads(
        [
            case.grads[0].to(memory_format=torch.channels_last),
            case.grads[1].t().contiguous().t(),
            torch.stack([case.grads[2], case.grads[2]], -1)[..., 0],  # strided: with gaps
        ]
    )
    copies = [g.clone() for g in other.grads]
    ops_result = other.clone().with_grads(other.grads)
    ops.adam_(*ops_result.lists, **case.options, backend=None if backend == "cuda_host" else backend)
    if backend != "cuda_host":
        assert_same_bits(ops_result, expected)
    for grad, copy in zip(other.grads, copies, strict=True):
        assert torch.equal(grad, copy) and grad.stride() != () and torch.equal(bits(grad), bits(copy))


@pytest.mark.parametrize("backend", [b for b in COMPILED if b != "cuda_host"] + ["reference"])
def test_any_dense_layout(backend, generator):
    base = adam_case([(6, 5, 4, 3), (17, 9)], generator=generator)
    expected = cases.run_adam(base, backend)

    def relaid(tensors):
        return [tensors[0].to(memory_format=torch.channels_last), tensors[1].t().contiguous().t()]

    case = cases.Case(*(relaid(x) for x in base.lists[:4]), [], [s.clone() for s in base.steps], base.options)
    ops.adam_(*case.lists, **case.options, backend=backend)
    assert not case.params[1].is_contiguous()
    for got_list, want_list in zip(case.outputs[:3], expected.outputs[:3], strict=True):
        for got, want in zip(got_list, want_list, strict=True):
            assert torch.equal(got, want)


def test_size_one_dimensions_may_have_any_stride(generator):
    case = adam_case([(100, 100, 1)], generator=generator)
    noisy = case.clone().with_grads([case.grads[0].as_strided((100, 100, 1), (100, 1, 77))])
    ops.adam_(*noisy.lists, **case.options)
    assert_same_bits(noisy, cases.run_adam(case, None))


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
@pytest.mark.parametrize("shapes", [[(0,)], [(0,), (0, 3)], [(0,), (5,)], [(5,), (0,)], [(5,), (0,), (5,)]])
def test_empty_tensors_anywhere(backend, shapes, generator):
    case = adam_case(shapes, generator=generator)
    result = cases.run_adam(case, backend)
    assert [s.item() for s in result.steps] == [s.item() + 1 for s in case.steps]
    cases.assert_as_accurate_as_torch(result, case)


def test_empty_list():
    ops.adam_([], [], [], [], [], [])


@pytest.mark.parametrize("backend", COMPILED)
def test_lists_longer_than_any_by_value_table(backend, generator):
    case = adam_case([(n % 5,) for n in range(1000)], generator=generator)
    cases.assert_as_accurate_as_torch(cases.run_adam(case, backend), case)


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_as_in_torch(backend, dtype):
    param, state = DTYPES[dtype]
    values = [
        0.0,
        -0.0,
        1.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        torch.finfo(param).max,
        torch.finfo(param).tiny,
    ]
    values += [torch.finfo(param).smallest_normal / 8]
    grid = torch.tensor(values, dtype=torch.float64)
    params, grads = (x.reshape(-1).to(DEVICE, param) for x in torch.meshgrid(grid, grid, indexing="ij"))
    zeros = torch.zeros(params.shape, dtype=state, device=DEVICE)
    for eps in (1e-8, 0.0):  # eps = 0 with a zero gradient: 0/0
        options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": eps, "amsgrad": False}
        step = torch.zeros((), device=DEVICE)
        case = cases.Case([params], [grads], [zeros], [zeros.clone()], [], [step], options)
        got, want = (
            cases.run_adam(case, backend),
            torch_adam(
                cases.Case(*case.clone(torch.float64 if param == torch.float64 else torch.float32).lists, options)
            ),
        )
        result, expected = got.params[0].double(), want.params[0].to(param).double()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isposinf(), expected.isposinf()) and torch.equal(
            result.isneginf(), expected.isneginf()
        )


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("t", [0, 4, 5, 999, 123456, 2**24 - 2])
def test_bias_corrections_at_any_step(beta2, t):
    """One float64 element against the closed form: with zero moments, m_hat and v_hat are known multiples of g."""
    g = torch.tensor([0.7], dtype=torch.float64)
    p, m, v, step = (
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1).double(),
        torch.zeros(1).double(),
        torch.tensor(float(t)),
    )
    ops.adam_([p], [g], [m], [v], [], [step], lr=0.1, beta1=0.9, beta2=beta2, eps=1e-8, backend="cpp")

    def correction(beta):  # 1 - beta^(t+1) without cancellation
        return -np.expm1((t + 1) * np.log(beta)) if beta else 1.0

    m_hat, v_hat = 0.7 * 0.1 / correction(0.9), 0.49 * float(1 - Fraction(beta2)) / correction(beta2)
    expected = 1 - 0.1 * m_hat / (v_hat**0.5 + 1e-8)
    # beta itself is known to half an ulp, and 1 - beta to 1 / (1 - beta) times that.
    assert p.item() == pytest.approx(expected, rel=4e-16 * (4 + 1 / (1 - beta2)))


def test_subnormal_second_moments_do_not_vanish(generator):
    case = adam_case([(999,)], generator=generator, eps=0.0)
    for tensors in (case.grads, case.exp_avgs):
        tensors[0].mul_(1e-20)
    case.exp_avg_sqs[0].mul_(1e-40)
    cases.assert_as_accurate_as_torch(cases.run_adam(case, None), case)


def test_elements_beyond_two_to_the_31(generator):
    """2^31 + 64 float32 elements: the same 64 MB of physical memory mapped over and over, so that it fits anywhere."""
    if DEVICE.type == "cuda" or _backend.unusable("adam", "cpp", DEVICE):
        pytest.skip("host memory mappings")
    period, extra = 1 << 24, 64
    count = (1 << 31) + extra
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    length = (count * 4 + period * 4 - 1) // (period * 4) * period * 4
    mappings = []

    def reserve(fd):
        start = libc.mmap(
            None, length, mmap.PROT_READ | mmap.PROT_WRITE, 0x4022, -1, 0
        )  # private, anonymous, no reserve
        mappings.append(start)
        if fd is not None:
            for offset in range(0, length, period * 4):
                libc.mmap(start + offset, period * 4, mmap.PROT_READ | mmap.PROT_WRITE, 0x11, fd, 0)  # shared, fixed
        return torch.frombuffer((ctypes.c_byte * (count * 4)).from_address(start), dtype=torch.float32)

    files = [os.memfd_create("fastcurv") for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        for fd in files:
            os.ftruncate(fd, period * 4)
        param, exp_avg, exp_avg_sq = map(reserve, files)
        grad = reserve(None)  # never written: every page is the kernel's one page of zeros
        param[:period] = 1.0
        torch.set_num_threads(1)
        decay = 1 - 2.0**-8
        step = torch.zeros(())
        ops.adam_([param], [grad], [exp_avg], [exp_avg_sq], [], [step], lr=2.0**-4, eps=1.0, weight_decay=2.0**-4,
                  decoupled_weight_decay=True, backend="cpp")  # fmt: skip
        # Every element was decayed once per pass over its page; the first 64 once more, through the addresses past 2^31.
        once = np.float32(decay)
        expected = np.float32(1)
        for _ in range((1 << 31) // period):
            expected = np.float32(expected * once)
        assert torch.all(param[extra:period] == float(expected))
        assert torch.all(param[:extra] == float(np.float32(expected * once)))
    finally:
        torch.set_num_threads(threads)
        for start in mappings:
            libc.munmap(start, length)
        for fd in files:
            os.close(fd)
