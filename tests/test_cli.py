"""The command `fastcurv`."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

import fastcurv
from fastcurv import _backend, cli
from fastcurv.bench import BENCHMARKS, bench_adam, harness, targets


def test_info_tells_versions_and_back_ends(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line and line[0] != " ")
    assert lines["torch"] == torch.__version__ and lines["fastcurv"] == fastcurv.__version__
    assert lines["threads"] == str(torch.get_num_threads())


def test_info_prints_the_whole_table_of_back_ends(capsys):
    cli.main(["info"])
    rows = [line.split(None, 2) for line in capsys.readouterr().out.rpartition("\n\n")[2].splitlines()]
    expected = [[row.op, row.backend, "available" if row.available else row.reason] for row in fastcurv.backends()]
    assert rows == expected


@pytest.mark.skipif(_backend.native() is None, reason="needs fastcurv._C")
def test_info_describes_the_native_extension(capsys):
    cli.main(["info"])
    out = capsys.readouterr().out
    assert f"SIMD level         {_backend.native().simd_level()}\n" in out
    assert "CUDA built for" in out and "the DLPack C exchange API" in out


@pytest.mark.parametrize("module", ["fastcurv", "fastcurv.cli"])
def test_the_module_is_a_program(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: fastcurv ")
    assert all(command in done.stdout for command in ("info", "bench", "demo"))


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"fastcurv {fastcurv.__version__}\n"


def test_no_command_prints_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr().err
    assert all(command in told for command in ("info", "bench", "demo"))


def piped(*arguments, both=False):
    """Runs a module whose output nobody reads any more."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", *arguments]
    error = writing if both else subprocess.PIPE
    done = subprocess.run(command, stdout=writing, stderr=error, text=True, env=environment)
    os.close(writing)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("fastcurv", "info"),
        ("fastcurv", "bench", "adam", "--quick", "--case", "resnet20"),
        ("fastcurv.bench.report", "--help"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_reader_that_goes_away_is_no_error(arguments):
    code, error = piped(*arguments)
    assert code == 141 and "Traceback" not in error and "Exception ignored" not in error


def test_a_reader_of_output_and_errors_may_go_away():
    assert piped("fastcurv", "info", both=True)[0] == 141


def test_closed_output_is_no_error():
    command = [sys.executable, "-m", "fastcurv", "info"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_interrupting_prints_no_traceback(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert cli.main(["info"]) == 130


def test_help_needs_no_extra_and_names_the_program():
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "for name in ('matplotlib', 'sklearn', 'tqdm', 'triton', 'cupy', 'fastcurv._C'): sys.modules[name] = None\n"
        "for module in ('report', 'gpu', 'exercise', 'osgd_claim'):\n"
        "    try: runpy.run_module(f'fastcurv.bench.{module}', run_name='__main__')\n"
        "    except SystemExit as end: assert end.code == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for module in ("report", "gpu", "exercise", "osgd_claim"):
        assert f"usage: python -m fastcurv.bench.{module} " in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_check_prints_every_target(capsys):
    assert cli.main(["bench", "adam", "--check", "--quick", "--case", "resnet20", "--case", "300x64"]) == 0
    out = capsys.readouterr().out
    assert "Adam, ResNet-20: 59 tensors" in out and "fastcurv reference" in out and "torch foreach" in out
    verdicts = [line for line in out.splitlines() if line.startswith(("CPU ", "GPU "))]
    rows = [row for row in targets.load() if row.op == "adam"]
    assert len(verdicts) == len(rows)
    for line, row in zip(verdicts, rows, strict=True):
        assert row.work in line and row.wanted() in line
        assert line.endswith("not yet measured on a GPU") == (row.device == "gpu")
    assert "a quick run shrinks the work" in out and "holds" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_writes_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    monkeypatch.setattr(bench_adam, "CASES", [case for case in bench_adam.CASES if case.name == "resnet20"])
    assert cli.main(["bench", "adam", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["adam-cpu.json"]
    stored = json.loads((tmp_path / "adam-cpu.json").read_text())
    assert stored["op"] == "adam" and [case["case"] for case in stored["cases"]] == ["resnet20"]
    assert len(stored["cases"][0]["load"]) == 2
    assert f"written to {tmp_path / 'adam-cpu.json'}" in capsys.readouterr().out


def test_bench_judges_all_ops_by_the_load_before_the_first(capsys, monkeypatch):
    loads = iter(itertools.count())
    monkeypatch.setattr(os, "getloadavg", lambda: (float(next(loads)), 0.0, 0.0))
    seen = []
    monkeypatch.setattr(harness, "run_all", lambda cases, options, clock, start_load: seen.append(start_load) or [])
    assert cli.main(["bench", "--quick"]) == 0
    assert seen == [0.0] * len(BENCHMARKS)


def test_bench_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(SystemExit, match="--case 1x: unknown; expected one of 1x50M"):
        cli.main(["bench", "adam", "--case", "1x"])
    with pytest.raises(SystemExit, match="--out keeps complete runs"):
        cli.main(["bench", "adam", "--quick", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tqdm" else found(name, *rest))
    with pytest.raises(SystemExit, match=r"needs .*tqdm: pip install 'fastcurv\[demo\]'"):
        cli.main(["demo", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
