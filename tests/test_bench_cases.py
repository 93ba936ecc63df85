"""The cases of every op: their truths, and that everybody who takes part computes what is claimed."""

import dataclasses
import importlib

import pytest
import torch
from torch.nn import Parameter

import fastcurv
from fastcurv import _backend
from fastcurv.bench import BENCHMARKS, contenders, models, training, truths
from fastcurv.bench.harness import Options

CASES = {op: importlib.import_module(f"fastcurv.bench.bench_{op}").CASES for op in BENCHMARKS}
# One case of each kind: those of one op that differ in shapes alone are verified alike.
VERIFIED = {
    (op, case.implementations, case.dtype): case
    for op, cases in CASES.items()
    for case in cases
    if "cpu" in case.devices and op in _backend.OPS
}.values()


@pytest.mark.parametrize("case", VERIFIED, ids=lambda case: f"{case.op}-{case.name}")
def test_everybody_computes_what_is_claimed(case):
    """Compiled back ends are left to the tests of their ops."""
    contenders_ = case.contenders(Options(peers=True))
    assert any(c.role == "reference" for c in contenders_)
    for contender in contenders_:
        if contender.name == "fastcurv reference" or (contender.role in ("torch", "peer") and not contender.note):
            assert contender.verify() == "", contender.name


@pytest.mark.parametrize("name", ["polar-resnet20", "gram-schmidt-resnet20", "newton-schulz-resnet20"])
def test_everybody_orthogonalises(name):
    (case,) = [case for case in CASES["orthogonalize"] if case.name == name]
    roles = {contender.role: contender for contender in case.contenders(Options())}
    assert {"reference", "torch"} <= set(roles)
    for contender in case.contenders(Options()):
        if contender.name != "fastcurv triton":  # left to the tests of the ops
            assert contender.verify() == "", contender.name
    wrong = dataclasses.replace(
        case.implementations(Options())[0], function=lambda matrices: [m / m.norm() for m in matrices]
    )
    assert case.verify(wrong, "cpu").startswith("off by")


def test_the_share_of_a_step_is_that_of_the_optimizer(monkeypatch):
    (case,) = [case for case in CASES["orthogonalize"] if case.name == "step-resnet20-128"]
    prepared = case.contenders(Options(quick=True))[0].prepare()
    assert 0 < prepared.share() < 1
    now = iter([0.0, 3.0, 4.0] * 2)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    watch = training._Stopwatch("cpu")
    for _ in range(2):
        watch.start(), watch.lap(), watch.lap()
    assert watch.share() == 0.25


@pytest.mark.parametrize("op", CASES)
def test_cases_name_their_op_and_a_baseline_that_takes_part(op):
    names = [case.name for case in CASES[op]]
    assert len(set(names)) == len(names)
    for case in CASES[op]:
        assert case.op == op
        taking_part = {c.name for c in case.contenders(Options())}
        assert not case.baseline or case.baseline in taking_part


TRUTHS = {
    "Ranger": (truths.Ranger, fastcurv.Ranger),
    "Ranger without centralisation": (lambda p, lr: truths.Ranger(p, lr, use_gc=False), lambda p, **o: fastcurv.Ranger(p, use_gc=False, **o)),
    "Yogi": (truths.Yogi, fastcurv.Yogi),
    "Nero": (truths.Nero, fastcurv.Nero),
    "LARS": (truths.LARS, fastcurv.LARS),
    "LAMB": (lambda p, lr: truths.LAMB(p, lr, weight_decay=0.01), fastcurv.LAMB),
    "Lookahead": (truths.Lookahead, lambda p, lr, backend: fastcurv.Lookahead(torch.optim.SGD(p, lr=lr), backend=backend)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUTHS)
def test_truths_agree_with_the_reference_in_float64(name):
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = [draw(shape) for shape in ((7,), (3, 5), (4, 2, 3, 3))]
    truth, ours = TRUTHS[name]
    one, two = ([Parameter(x.clone()) for x in start] for _ in range(2))
    left, right = truth(one, lr=0.1), ours(two, lr=0.1, backend="reference")
    for _ in range(14):
        for a, b in zip(one, two, strict=True):
            a.grad = draw(a.shape)
            b.grad = a.grad.clone()
        left.step()
        right.step()
    for a, b, x in zip(one, two, start, strict=True):
        # LARS alone adds an eps of 1e-8 to a norm.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 if name == "LARS" else 1e-13)
        assert not torch.equal(a, x)


def test_the_25_million_parameters_are_those_of_resnet50():
    case = next(case for case in CASES["ranger"] if case.name == "resnet50")
    assert case.shapes() == models.resnet50() and round(models.numel(case.shapes()) / 1e6, 1) == 25.6
    assert case.period == 6 and case.size(Options())["bytes"] == round(25_557_032 * (28 + 8 / 6))


def test_the_fastest_form_of_each_peer_takes_part():
    on_cpu = {peer.name: peer for peer in [*contenders.optimi("Ranger", {}), *contenders.kozistr("Ranger", {})]}
    assert set(on_cpu) == {"torch-optimi", "torch-optimi loop", "pytorch_optimizer", "pytorch_optimizer loop"}
    assert on_cpu["torch-optimi"].on_gpu["triton"] and on_cpu["torch-optimi loop"].on_gpu is None
