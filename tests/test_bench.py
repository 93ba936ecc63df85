"""The harness of the benchmarks: parameter lists, clocks, verification, contention, ceilings."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import Parameter

import fastcurv
from fastcurv import _backend
from fastcurv._chunks import NO_ROWS
from fastcurv.bench import bench_adam, clocks, contenders, harness, machine, models, results, stepping
from fastcurv.bench.harness import Options
from fastcurv.bench.stepping import Implementation, small

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
    assert times == [dict.fromkeys("abcd", 1.0)] * 9
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 3


def test_slow_calls_sit_out_rounds_but_not_all():
    calls = {"ours": lambda: 1.0, "quick": lambda: 0.1, "slow": lambda: 8.0, "crawling": lambda: 1000.0}
    times = harness.interleave(calls, SetClock(), seconds=0.0, least=3, pace="ours")
    assert {name: len(results.samples(times, name)) for name in calls} == {
        "ours": 24,
        "quick": 24,
        "slow": 12,
        "crawling": 3,
    }


def test_calls_of_minutes_are_made_once(monkeypatch):
    monkeypatch.setattr(harness, "MOST_SECONDS", 0.0)
    assert harness.interleave({"eigen": lambda: 1.0}, SetClock(), seconds=4.0, least=9) == [{"eigen": 1.0}]


ADAM = next(case for case in bench_adam.CASES if case.name == "resnet20")


def adam_case(*others, dtype=torch.float32):
    return dataclasses.replace(
        ADAM,
        name="test",
        shapes=lambda: [(40,), (3, 5), (2, 2, 2, 2)],
        implementations=lambda options, dtype: [*ADAM.implementations(options, dtype), *others],
        bytes_per_element=14 if dtype.itemsize == 2 else 28,
        dtype=dtype,
    )


def first(case):
    """The best back end of fastcurv."""
    return case.implementations(Options(), case.dtype)[0]


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
    measured = harness.run(adam_case(wrong), Options(), clocks.WallClock())
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
    words = torch.empty(table.size(1 << 20, NO_ROWS)[0], dtype=torch.int64)
    table.write(words.data_ptr(), 1 << 20, NO_ROWS)
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
    prepared = case.prepare(first(case), Options())
    assert {moved for _, _, moved in prepared.ceilings} == {case.size(Options())["bytes"]} == {28 * 71}
    half = dataclasses.replace(adam_case(dtype=torch.bfloat16), bytes_per_element=22)
    prepared = half.prepare(first(half), Options())
    assert {moved for _, _, moved in prepared.ceilings} == {half.size(Options())["bytes"]} == {22 * 71}


OPTIMIZERS = {
    "Adam": fastcurv.Adam, "LAMB": fastcurv.LAMB, "LARS": fastcurv.LARS, "Nero": fastcurv.Nero,
    "Ranger": fastcurv.Ranger, "SGD": functools.partial(fastcurv.SGD, momentum=0.9),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param(None, marks=native)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bare_kernel_is_the_step(name, backend):
    def optimizer():
        params = [Parameter(torch.arange(4.0)), Parameter(torch.arange(6.0).view(2, 3))]
        for param in params:
            param.grad = torch.arange(param.numel()).view(param.shape) + 0.5
        made = OPTIMIZERS[name](params, lr=1e-3, backend=backend)
        made.step()
        return made, params

    (one, params), (two, expected) = optimizer(), optimizer()
    stepping.buffers(one).kernel()
    two.step()
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
    assert one.state[params[0]].get("step", 2) == 2


@pytest.mark.parametrize(
    ("name", "moved"), [("Adam", 28), ("LAMB", 28), ("LARS", 20), ("Nero", 12), ("Ranger", 28), ("SGD", 20)]
)
def test_the_stream_has_the_mix_of_a_step(name, moved):
    params = [Parameter(torch.arange(1.0, 7.0).view(2, 3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = OPTIMIZERS[name](params, lr=1e-3, backend="reference")
    optimizer.step()
    used = stepping.buffers(optimizer)
    assert [list(map(id, grads)) for grads in used.read] == [[id(param.grad) for param in params]]
    assert 4 * len(used.read) + 8 * len(used.written) == moved


def test_times_are_means_over_a_period(quiet):
    """A call that takes 5 s every third time and 1 s else is one of 7/3 s, and what streams beside it is not."""

    class Fake(harness.Case):
        def size(self, options):
            return {"tensors": 1, "elements": 1, "bytes": 28}

        def contenders(self, options):
            return [harness.Contender("fastcurv", "ours", str, self.prepared)]

        def prepared(self):
            step, kernel = (itertools.cycle([1.0, 1.0, 5.0]), itertools.cycle([1.0, 1.0, 2.0]))
            calls = [functools.partial(self.take, seconds) for seconds in (step, kernel)]
            return harness.Prepared(calls[0], calls[1], [("stream", lambda: self.take(iter([4.0])), 28)])

        @staticmethod
        def take(seconds):
            clock.now += next(seconds)

    class Counting(clocks.WallClock):
        now = 0.0

        def time(self, call):
            before = self.now
            call()
            return self.now - before

    clock = Counting()
    measured = harness.run(Fake("op", "case", "work", baseline="", period=3), Options(quick=True), clock)
    assert measured.ours().median == pytest.approx(7e3 / 3)
    assert measured.overhead == pytest.approx(1e3)
    assert measured.ceiling == pytest.approx(7e-9)


def test_what_computes_something_else_is_verified_as_that(quiet):
    sgd = contenders.loop(torch.optim.SGD)
    other = Implementation("a peer", "peer", sgd, 8, computes="SGD", truth=sgd)
    case = adam_case(other, dataclasses.replace(other, name="no truth", truth=None))
    measured = harness.run(case, Options(), clocks.WallClock())
    row = measured.row("a peer")
    assert row.wrong == "" and row.speedup is not None and row.computes == "SGD"
    assert measured.row("no truth").speedup is None and "computes SGD" in results.table(measured)
    wrong = dataclasses.replace(other, name="ours", role="yardstick", truth=None)
    assert "ours is wrong" in harness.run(adam_case(wrong), Options(), clocks.WallClock()).unfit
