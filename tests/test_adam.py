"""The op `adam`: the reference against torch.optim, special values, bias corrections, more than 2^31 elements."""

import ctypes
import mmap
import os
from fractions import Fraction

import cases
import numpy as np
import pytest
import torch
from cases import DEVICE, DTYPES, OPTIONS, make_case, options_of

from fastcurv import _backend, ops

EVERY = [*cases.backends(), "reference"]
# torch has no Yogi; pytorch_optimizer has (see test_yogi below).
TORCH = {"adam": torch.optim.Adam, "amsgrad": torch.optim.Adam, "radam": torch.optim.RAdam, "nadam": torch.optim.NAdam}
STATE_KEYS = {
    "exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "max_exp_avg_sqs": "max_exp_avg_sq", "mu_products": "mu_product",
    "steps": "step",
}  # fmt: skip


def torch_adam(case):
    """The same call by torch.optim, one parameter at a time; torch knows no per-call state, so it is planted."""
    case = case.clone()
    options = dict(case.options)
    rule = options.pop("rule", "adam")
    options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    scale = options.pop("grad_scale", None)
    if rule == "amsgrad":
        options["amsgrad"] = True
    if rule == "nadam":
        options["momentum_decay"] = np.log(options.pop("mu_decay")) / np.log(0.96)
    for i, (param, grad) in enumerate(zip(case["params"], case["grads"], strict=True)):
        leaf = torch.nn.Parameter(param)
        optimizer = TORCH[rule]([leaf], foreach=False, **options)
        leaf.grad = grad if scale is None else grad / scale
        optimizer.state[leaf] = {key: case[name][i] for name, key in STATE_KEYS.items() if case[name]}
        optimizer.step()
    return case


@pytest.mark.parametrize("options", [name for name, row in OPTIONS["adam"].items() if row.get("rule") != "yogi"])
def test_reference_equals_torch_optim_in_float64(options, generator):
    case = make_case("adam", dtype="float64", generator=generator, **options_of("adam", options))
    ours, torchs = cases.run(case, "reference"), torch_adam(case)
    for name, tensors in ours.outputs.items():
        for got, want in zip(tensors, torchs[name], strict=True):
            # Both round about 16 times per element; 16 ulp of the largest value that enters.
            torch.testing.assert_close(got, want, rtol=0, atol=16 * 2.3e-16 * 20)


def test_yogi_takes_the_second_moment_no_further_than_the_square_of_the_gradient(generator):
    """Zaheer et al. (2018): an additive step towards g^2, of (1 - beta2) g^2, whatever the distance."""
    case = make_case("adam", [(500,)], "float64", generator=generator, rule="yogi")
    before, square = case["exp_avg_sqs"][0], case["grads"][0].square()
    change = cases.run(case, "reference")["exp_avg_sqs"][0] - before
    assert torch.equal(change.sign(), (square - before).sign())
    torch.testing.assert_close(change.abs(), 0.1 * square, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("decoupled", [False, True])
def test_yogi_as_in_pytorch_optimizer(decoupled, generator):
    """Its `initial_accumulator` also fills exp_avg (ours starts at zero, as in the paper), so both start at zero here."""
    peer = pytest.importorskip("pytorch_optimizer").Yogi
    import fastcurv

    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1, "initial_accumulator": 0.0}
    a = peer([p], weight_decouple=decoupled, **options)
    b = fastcurv.Yogi([q], decoupled_weight_decay=decoupled, backend="reference", **options)
    for _ in range(6):
        p.grad = q.grad = torch.randn(40, generator=generator, dtype=torch.float64)
        p.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(q, p, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("beta2, first", [(0.9, 6), (0.99, 6), (0.999, 6), (0.9999, 6), (0.99999, 6), (0.5, None)])
def test_radam_rectifies_from_the_sixth_step_on(backend, beta2, first):
    """Before, the step is that of momentum alone, which moves by lr in one step of a constant gradient."""
    t, lr = torch.zeros((), device=DEVICE), 2.0**-4
    p, m, v = (torch.zeros(3, dtype=torch.float64, device=DEVICE) for _ in range(3))
    g = torch.ones(3, dtype=torch.float64, device=DEVICE)
    for step in range(1, 12):
        before = p.clone()
        case = cases.Case("adam", {"params": [p], "grads": [g], "exp_avgs": [m], "exp_avg_sqs": [v], "max_exp_avg_sqs": [],
                          "mu_products": [], "steps": [t]}, {"rule": "radam", "lr": lr, "beta2": beta2})  # fmt: skip
        cases.call(case, backend)
        plain = torch.allclose(before - p, torch.full_like(p, lr), rtol=1e-12)
        assert plain == (first is None or step < first)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_as_in_torch(backend, dtype):
    param, state = DTYPES[dtype]
    info, inf = torch.finfo(param), float("inf")
    values = [0.0, -0.0, 1.0, inf, -inf, float("nan"), info.max, info.tiny, info.smallest_normal / 8]
    grid = torch.tensor(values, dtype=torch.float64)
    params, grads = (x.reshape(-1).to(DEVICE, param) for x in torch.meshgrid(grid, grid, indexing="ij"))
    zeros = torch.zeros(params.shape, dtype=state, device=DEVICE)
    for eps in (1e-8, 0.0):  # eps = 0 with a zero gradient: 0/0
        lists = [[params], [grads], [zeros], [zeros.clone()], [], [], [torch.zeros((), device=DEVICE)]]
        case = cases.Case("adam", dict(zip(ops.adam_.lists, lists, strict=True)),
                          {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": eps})  # fmt: skip
        arithmetic = torch.float64 if param == torch.float64 else torch.float32
        wide = torch_adam(case.map(lambda t: t.to(arithmetic, copy=True), case.shaped))  # noqa: B023
        result = cases.run(case, backend)["params"][0].double()
        expected = wide["params"][0].to(param).double()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(result), kind(expected))


@pytest.mark.parametrize("backend", [b for b in EVERY if b in ("cpp", "reference")])
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("t", [0, 4, 5, 999, 123456, 2**24 - 2])
def test_bias_corrections_at_any_step(backend, beta2, t):
    """One float64 element against the closed form: with zero moments, m_hat and v_hat are known multiples of g."""
    g = torch.tensor([0.7], dtype=torch.float64)
    p, m, v, step = (
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1).double(),
        torch.zeros(1).double(),
        torch.tensor(float(t)),
    )
    ops.adam_([p], [g], [m], [v], [], [], [step], lr=0.1, beta1=0.9, beta2=beta2, eps=1e-8, backend=backend)

    def correction(beta):  # 1 - beta^(t+1) without cancellation
        return -np.expm1((t + 1) * np.log(beta)) if beta else 1.0

    m_hat, v_hat = 0.7 * 0.1 / correction(0.9), 0.49 * float(1 - Fraction(beta2)) / correction(beta2)
    expected = 1 - 0.1 * m_hat / (v_hat**0.5 + 1e-8)
    # beta itself is known to half an ulp, and 1 - beta to 1 / (1 - beta) times that.
    assert p.item() == pytest.approx(expected, rel=4e-16 * (4 + 1 / (1 - beta2)))


@pytest.mark.parametrize("backend", EVERY)
def test_subnormal_second_moments_do_not_vanish(backend, generator):
    case = make_case("adam", [(999,)], generator=generator, eps=0.0)
    for name, factor in (("grads", 1e-20), ("exp_avgs", 1e-20), ("exp_avg_sqs", 1e-40)):
        case[name][0].mul_(factor)
    cases.assert_as_accurate_as_torch(cases.run(case, backend), case)


@pytest.mark.parametrize("rule, error", [
    ("amsgrad", r"max_exp_avg_sqs: expected 1 tensors with rule='amsgrad', got none"),
    ("nadam", r"mu_products: expected 1 tensors with rule='nadam', got none"),
    ("rmsprop", r"rule: expected one of adam, amsgrad, radam, nadam, yogi, got 'rmsprop'"),
])  # fmt: skip
def test_rules_and_their_lists(rule, error):
    case = make_case("adam", [(3,)])
    with pytest.raises(ValueError, match=error):
        ops.adam_(*case.arguments, rule=rule)
    case = make_case("adam", [(3,)], rule="nadam")
    with pytest.raises(ValueError, match=r"mu_products: expected none with rule='adam', got 1"):
        ops.adam_(*case.arguments)


def test_elements_beyond_two_to_the_31():
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
        ops.adam_([param], [grad], [exp_avg], [exp_avg_sq], [], [], [step], lr=2.0**-4, eps=1.0, weight_decay=2.0**-4,
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
