"""The harness of the benchmarks: parameter lists, clocks, verification, contention, ceilings."""

import dataclasses
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import Parameter

import fastcurv
from fastcurv import _backend
from fastcurv.bench import bench_adam, clocks, harness, machine, models, results
from fastcurv.bench.harness import Options
from fastcurv.bench.stepping import Implementation, StepCase, small

native = pytest.mark.skipif(_backend.native() is None, reason="needs fastcurv._C")


# Tensors and parameters as published: He et al. (0.27M), torchvision's model pages, the GPT-2 and Llama 3.2 checkpoints,
# and spec kfac, section 11.
@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit_b16", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("llama_1b", 146, 1_235_814_400),
        ("curves", 24, 842_340),
        ("mnist", 16, 2_837_314),
        ("faces", 16, 7_537_655),
    ],
)
def test_parameter_lists_have_the_published_size(name, tensors, parameters):
    shapes = models.MODELS[name]()
    assert len(shapes) == tensors
    assert sum(torch.empty(shape, device="meta").numel() for shape in shapes) == parameters


def test_resnet20_has_the_published_size():
    assert round(models.numel(models.resnet20()) / 1e6, 2) == 0.27


def test_small_lists_keep_their_kinds():
    assert small(models.single(50_000_000)) == [(1027,)]
    assert {len(shape) for shape in small(models.resnet50())} == {1, 2, 4}


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_is_that_of_torch(q):
    samples = [5.0, 1.0, 4.0, 2.5, 9.0, 3.0]
    assert clocks.quantile(samples, q) == pytest.approx(torch.tensor(samples, dtype=torch.float64).quantile(q).item())
    assert clocks.quantile([7.0], q) == 7.0


class SetClock(clocks.WallClock):
    """Calls the call, which says how long it took."""

    def time(self, call):
        return call()


def test_calls_are_interleaved_in_changing_order():
    seen = []
    calls = {name: lambda name=name: seen.append(name) or 1.0 for name in "abcd"}
    times = harness.interleave(calls, SetClock(), seconds=0.0, least=9)
    rounds = [tuple(seen[k : k + 4]) for k in range(0, len(seen), 4)]
    assert [len(samples) for samples in times.values()] == [9] * 4
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 3


def test_slow_calls_sit_out_rounds_but_not_all():
    calls = {"ours": lambda: 1.0, "quick": lambda: 0.1, "slow": lambda: 8.0, "crawling": lambda: 1000.0}
    times = harness.interleave(calls, SetClock(), seconds=0.0, least=3, pace="ours")
    assert {name: len(samples) for name, samples in times.items()} == {
        "ours": 24,
        "quick": 24,
        "slow": 12,
        "crawling": 3,
    }


def adam_case(*implementations, dtype=torch.float32):
    found = bench_adam.implementations(Options(), dtype)
    return StepCase(
        op="adam",
        name="test",
        work="test",
        shapes=lambda: [(40,), (3, 5), (2, 2, 2, 2)],
        implementations=lambda options, dtype: [*found, *implementations],
        truth=lambda params, lr: torch.optim.Adam(params, lr=lr, foreach=False),
        buffers=bench_adam.buffers if _backend.native() else None,
        bytes_per_element=28,
        dtype=dtype,
    )


@pytest.fixture
def quiet(monkeypatch):
    """A machine of our own, and no time to lose."""
    monkeypatch.setattr(machine.Watch, "contended", lambda self: "")
    monkeypatch.setattr(harness, "SECONDS", 0.0)


def subtly_wrong(params, lr):
    return torch.optim.Adam(params, lr=lr * (1 + 1e-5))


def test_speedups_are_given_when_all_is_right(quiet):
    measured = harness.run(adam_case(), Options(), clocks.WallClock())
    assert measured.unfit == ""
    assert all(row.speedup is not None and not row.wrong for row in measured.rows)


def test_no_speedup_when_an_implementation_is_wrong(quiet):
    wrong = Implementation("fastcurv wrong", "ours", subtly_wrong, 8)
    case = dataclasses.replace(adam_case(wrong), buffers=None)
    measured = harness.run(case, Options(), clocks.WallClock())
    assert "fastcurv wrong is wrong: off by" in measured.unfit
    assert all(row.rounds and row.speedup is None for row in measured.rows)
    text = results.table(measured)
    assert "no speed-up is given: fastcurv wrong is wrong" in text


def test_a_wrong_peer_is_not_compared_and_spoils_nothing_else(quiet):
    case = adam_case(Implementation("a peer", "peer", subtly_wrong, 8))
    measured = harness.run(case, Options(), clocks.WallClock())
    assert measured.unfit == ""
    assert [row.name for row in measured.rows if row.speedup is None] == ["a peer"]


def test_another_library_that_raises_spoils_nothing_else(quiet):
    def broken(params, lr):
        raise TypeError("no such thing")

    measured = harness.run(adam_case(Implementation("a peer", "peer", broken, 8)), Options(), clocks.WallClock())
    assert measured.row("a peer").note == "does not run: TypeError: no such thing"
    assert measured.unfit == "" and measured.ours().speedup is not None
    with pytest.raises(TypeError, match="no such thing"):
        harness.run(adam_case(Implementation("fastcurv new", "ours", broken, 8)), Options(), clocks.WallClock())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_implementations_are_verified(dtype):
    case = adam_case(dtype=dtype)
    for contender in case.contenders(Options()):
        # torch's foreach in float16 overflows, in some versions; that is for it to show.
        if dtype != torch.float16 or contender.role in ("ours", "reference"):
            assert contender.verify() == "", contender.name
    nan = Implementation("nan", "ours", lambda params, lr: torch.optim.Adam(params, lr=float("inf")), 8)
    assert case.verify(nan, "cpu").startswith("off by nan")


def test_half_precision_is_not_compared_in_speed():
    notes = {c.name: c.note for c in adam_case(dtype=torch.bfloat16).contenders(Options())}
    assert notes["fastcurv reference"] == "" and notes["torch fused"] == "its state is bfloat16, ours float32"


def test_too_little_memory_is_said(quiet, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda device: 100)
    measured = harness.run(adam_case(), Options(), clocks.WallClock())
    assert all(row.note.startswith("not measured: needs") and not row.rounds for row in measured.rows)


def test_contention_by_another_process_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        with machine.Watch() as watch:
            time.sleep(machine.LEAST_SECONDS + 0.1)
        other.kill()
    assert watch.others > machine.MOST_OTHERS
    assert "of a core" in watch.contended()
    assert machine.overloaded(0.61) and not machine.overloaded(0.6)


def test_our_own_work_is_not_contention(monkeypatch):
    monkeypatch.setattr(machine, "_machine_seconds", machine._own_seconds)  # a machine without others
    watch = machine.Watch()
    for _ in range(2):
        with watch:
            end = time.perf_counter() + machine.LEAST_SECONDS / 2
            while time.perf_counter() < end:
                pass
    assert watch.seconds >= machine.LEAST_SECONDS
    assert watch.contended() == "" and watch.others < 0.05


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stream_reads_everything_and_changes_nothing(dtype):
    sizes = (0, 1, 63, 64, 65, 40_003)
    lists = [[torch.randn(n).to(dtype) for n in sizes] for _ in range(2)]
    lists.append([torch.randn(n) for n in sizes])
    lists[2][1][0] = float("nan")
    before = [[x.clone() for x in tensors] for tensors in lists]
    table = _backend.native().ChunkTable([False, True, True])
    table.update(lists, ["a", "b", "c"], True)
    words = torch.empty(table.words(1 << 20), dtype=torch.int64)
    table.write(words.data_ptr(), 1 << 20)
    digest = 0
    for tensor in lists[0]:
        for byte in tensor.view(torch.uint8).tolist():
            digest ^= byte
    for block in (1, 64, 1000):
        found = _backend.native().stream_(words, [dtype.itemsize, dtype.itemsize, 4], [False, True, True], block)
        assert found == digest
    for tensors, expected in zip(lists, before, strict=True):
        for x, y in zip(tensors, expected, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    with pytest.raises(ValueError, match="block_elements"):
        _backend.native().stream_(words, [4, 4, 4], [False, True, True], 0)


@native
def test_the_ceiling_moves_what_a_step_moves():
    case = adam_case()
    prepared = case.prepare(bench_adam.implementations(Options(), torch.float32)[0], Options())
    assert {moved for _, _, moved in prepared.ceilings} == {case.size(Options())["bytes"]} == {28 * 71}
    half = dataclasses.replace(adam_case(dtype=torch.bfloat16), bytes_per_element=22)
    prepared = half.prepare(bench_adam.implementations(Options(), torch.bfloat16)[0], Options())
    assert {moved for _, _, moved in prepared.ceilings} == {half.size(Options())["bytes"]} == {22 * 71}


@native
def test_the_bare_kernel_is_the_step():
    def optimizer():
        params = [Parameter(torch.arange(4.0)), Parameter(torch.ones(2, 3))]
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        made = fastcurv.Adam(params, lr=1e-3)
        made.step()
        return made, params

    (one, params), (two, expected) = optimizer(), optimizer()
    bench_adam.buffers(one).kernel()
    two.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert one.state[params[0]]["step"] == 2
