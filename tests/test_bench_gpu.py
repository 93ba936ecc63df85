"""The stages for a GPU machine: what of them runs without a GPU."""

import dataclasses
import functools
import json
import sys

import pytest
import torch

import fastcurv
from fastcurv import _backend
from fastcurv.bench import bench_adam, clocks, exercise, gpu, report
from fastcurv.bench.harness import Options
from fastcurv.ops import adam as adam_rules

native = pytest.mark.skipif(_backend.native() is None, reason="needs fastcurv._C")
ABOUT = {"gpu": "a GPU", "commit": "abc", "versions": {"torch": "2"}}
AMPLE = gpu.Budget(1e6)


def test_a_stage_goes_on_where_it_stopped(tmp_path, capsys):
    path, done = tmp_path / "ledger.json", []

    def item(name, code=0):
        return lambda left: done.append(name) or {"rc": code, "summary": name}

    first = {"a": item("a")}
    both = {**first, "b": item("b")}
    assert gpu.work_through(gpu.Ledger(path, ABOUT), first, AMPLE) == gpu.DONE
    assert gpu.work_through(gpu.Ledger(path, ABOUT), both, gpu.Budget(1.0)) == gpu.UNFINISHED
    assert "time is up before the end of b" in capsys.readouterr().out
    assert gpu.work_through(gpu.Ledger(path, ABOUT), both, AMPLE) == gpu.DONE
    assert done == ["a", "b"]
    assert json.loads(path.read_text())["items"]["b"] == {"rc": 0, "summary": "b"}
    assert gpu.work_through(gpu.Ledger(path, ABOUT), {**both, "c": item("c", 1)}, AMPLE) == gpu.FAILED
    assert gpu.Ledger(path, {**ABOUT, "commit": "def"}).items == {}


@pytest.mark.parametrize(("left", "recorded"), [(1.0, True), (0.5, False)])
def test_an_item_is_given_up_only_when_it_had_all_the_time(tmp_path, monkeypatch, left, recorded):
    budget = gpu.Budget(1000.0)
    clock = iter([1000.0 * left] * 2 + [0.0] * 2)
    monkeypatch.setattr(budget, "left", lambda: next(clock))
    ledger = gpu.Ledger(tmp_path / "ledger.json", ABOUT)
    status = gpu.work_through(ledger, {"a": lambda seconds: {"rc": gpu.TIMED_OUT}}, budget)
    assert (status, set(ledger.items)) == ((gpu.FAILED, {"a"}) if recorded else (gpu.UNFINISHED, set()))


def test_a_command_that_takes_too_long_is_ended():
    ended = gpu.command([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.0)
    assert ended["rc"] == 124 and ended["seconds"] < 30
    failed = gpu.command([sys.executable, "-c", "import os, sys; print(os.environ['X']); sys.exit(3)"], 60.0, X="y")
    assert failed["rc"] == 3 and failed["summary"] == "y" and "y" in failed["output"]


def test_measurements_on_a_gpu_are_resumed_case_by_case(tmp_path, capsys):
    run = functools.partial(gpu.bench, tmp_path, "adam", clock=clocks.WallClock())
    options = Options(quick=True)
    small = next(case for case in bench_adam.CASES if case.name == "resnet20")
    one, two = (dataclasses.replace(small, name=name, work=name) for name in ("one", "two"))
    assert run([one], options, budget=AMPLE) == gpu.DONE
    stored = (tmp_path / "adam-gpu.json").read_text()
    assert run([one, two], options, budget=gpu.Budget(0.0)) == gpu.UNFINISHED
    assert (tmp_path / "adam-gpu.json").read_text() == stored
    capsys.readouterr()
    assert run([one, two], options, budget=AMPLE) == gpu.DONE
    assert "one: 59 tensors" not in capsys.readouterr().out
    assert [found.case for found in report.collect(tmp_path)["adam"]["gpu"][1]] == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["adam-gpu.json"]


@native
@pytest.mark.parametrize("instance", exercise.instances())
def test_what_the_sanitizer_watches_is_right_on_the_cpu(instance, capsys):
    assert exercise.main([instance, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{instance}: right\n"


@native
def test_every_op_and_rule_is_exercised():
    assert set(exercise.VARIANTS) == set(_backend.OPS)
    with_kernels = {op for op in _backend.MATRIX_OPS if hasattr(_backend.native(), f"{op}_kernel")}
    assert set(exercise.MATRIX_VARIANTS) == with_kernels
    assert set(exercise.KRON_VARIANTS) == set(_backend.KRON_OPS)
    assert set(adam_rules.RULES) <= set(exercise.VARIANTS["adam"])
    assert all(name in exercise.instances() for name in gpu.PROFILED)


def test_a_wrong_kernel_is_noticed(monkeypatch):
    def make(params, lr, backend):
        return fastcurv.Ranger(params, lr=lr if backend == "reference" else 1.001 * lr, backend="reference")

    monkeypatch.setattr(exercise, "VARIANTS", {"ranger": {"ranger": (make, True)}})
    found = exercise.exercise("ranger/float32/float32/ranger", "cpu", exercise.SHAPES, "cpp")
    assert found.startswith("params[1] is off by")


@native
def test_the_sanitizer_is_given_every_instance():
    items = gpu.sanitizer_items("cpu", prefix=())
    assert len(items) == 2 * len(exercise.instances())
    done = items["memcheck adam/float32/float32/adam"](120.0)
    assert done["rc"] == 0 and done["summary"] == "adam/float32/float32/adam: right"


def test_every_test_file_is_an_item_of_the_build_stage(pytestconfig):
    items = gpu.tests(pytestconfig.rootpath)
    assert "test_bench.py" in items and all(name.startswith("test_") for name in items)


def test_counters_are_read_from_ncu():
    text = (
        '==PROF== Connected\n"ID","Kernel Name","dram__bytes_read.sum","launch__registers_per_thread"\n'
        '"","","Gbyte","register/thread"\n"0","adam_kernel","1.6","40"\n'
    )
    assert gpu.parse_counters(text) == {
        "dram__bytes_read.sum": "1.6 Gbyte",
        "launch__registers_per_thread": "40 register/thread",
    }
    assert gpu.parse_counters("==ERROR== nothing") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["build-test", "sanitize", "bench", "profile"])
def test_without_a_gpu_a_stage_says_so(stage, tmp_path, capsys):
    assert gpu.main(["--stage", stage, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
