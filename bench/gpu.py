"""What only a GPU can show, in stages that fit a short lease of one.

`python -m fastcurv.bench.gpu --stage build-test|sanitize|bench|profile --out DIR`

* build-test builds `fastcurv._C` for the GPU at hand into the running interpreter and runs the tests, file by file;
* sanitize runs every kernel instance under compute-sanitizer, memcheck and racecheck;
* bench measures the GPU cases of an op;
* profile reads the hardware counters of the kernels with ncu.

A stage stops before its time is up. Started again with the same DIR it goes on where it stopped: what stands in its
file, written after every item, is not done again, unless GPU or commit are others.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastcurv.cli import program

from . import BENCHMARKS, clocks, exercise, harness, machine, results
from .harness import Case, Options

DONE, FAILED, NO_GPU, UNFINISHED = 0, 1, 2, 3
TIMED_OUT = 124
SECONDS = 450.0
LEAST_SECONDS_FOR_AN_ITEM = 20.0
TAIL = 3000
PROFILED = ("adam/float32/float32/adam", "adam/bfloat16/float32/adam", "ranger/float32/float32/ranger")
PROFILED_ELEMENTS = 100_000_000
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
)


class Budget:
    """The time of one call of a stage.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def spent(self, before: str) -> bool:
        """Whether there is too little left for another item, which is said."""
        if self.left() < LEAST_SECONDS_FOR_AN_ITEM:
            print(f"time is up before the end of {before}; the same command goes on from there")
            return True
        return False


class Ledger:
    """A JSON file of finished items, replaced as a whole after each.

    Args:
        path: The file; taken up where it is of the same machine and commit, else begun anew.
        about: What the items are measured on.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = dict(about)
        self.items: dict[str, Any] = {}
        if path.exists():
            document = json.loads(path.read_text())
            if _same(document, self.about):
                self.items = document["items"]

    def put(self, name: str, value: Any) -> None:
        """Records an item.

        Args:
            name: Of the item.
            value: As JSON can hold it.
        """
        self.items[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.about, "items": self.items}, indent=1) + "\n")
        temporary.replace(self.path)


def _same(document: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    return all(document.get(key) == about[key] for key in ("gpu", "commit", "versions"))


def work_through(ledger: Ledger, items: Mapping[str, Callable[[float], Any]], budget: Budget) -> int:
    """Does the items that the ledger lacks.

    An item that its time ran out for is recorded only if it had all the time there was: another call gives it more.

    Args:
        ledger: Where results are recorded.
        items: By name; each is given the seconds left and returns its result, a dict with `rc` for a command.
        budget: The time of this call.

    Returns:
        DONE, FAILED if a command failed, UNFINISHED if time ran out.
    """
    for name, item in items.items():
        if name in ledger.items:
            continue
        if budget.spent(before=name):
            return UNFINISHED
        left = budget.left()
        result = item(left)
        if result.get("rc") == TIMED_OUT and left < 0.9 * budget.seconds and budget.spent(before=name):
            return UNFINISHED
        ledger.put(name, result)
        print(f"{name}: {result.get('summary') or 'rc ' + str(result.get('rc'))}", flush=True)
    return FAILED if any(value.get("rc") for value in ledger.items.values()) else DONE


def command(arguments: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs a program, and returns its exit code (TIMED_OUT if it took too long), its time and the end of its output.

    Args:
        arguments: The program and its arguments.
        seconds: Time it may take.
        environment: Variables to add to ours.
    """
    start = time.monotonic()
    try:
        done = subprocess.run(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env={**os.environ, **environment},
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        code, output = TIMED_OUT, (expired.stdout or b"").decode(errors="replace")
    lines = output.strip().splitlines()
    return {
        "rc": code,
        "seconds": round(time.monotonic() - start, 1),
        "summary": lines[-1] if lines else "",
        "output": output[-TAIL:] if code else "",
    }


def build_test(out: Path, about: Mapping[str, Any], budget: Budget, root: Path) -> int:
    """Builds the extension for this GPU and runs the tests of a checkout.

    Args:
        out: Folder of the ledger.
        about: What it is done on.
        budget: The time of this call.
        root: Of the checkout.
    """
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "-e", str(root)]
    ledger = Ledger(out / "gpu-build-test.json", about)
    build = {"build": lambda left: command(pip, left, FASTCURV_CUDA="1", FASTCURV_CUDA_ARCHS="native")}
    status = work_through(ledger, build, budget)
    if status != DONE and ledger.items.get("build", {}).get("rc") != 0:
        return status
    return work_through(ledger, tests(root), budget)


def tests(root: Path) -> dict[str, Callable[[float], Any]]:
    """One item for each test file of a checkout."""

    def item(path: Path) -> Callable[[float], Any]:
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(path)]
        return lambda left: command(pytest, left)

    return {path.name: item(path) for path in sorted((root / "tests").glob("test_*.py"))}


def sanitize(out: Path, about: Mapping[str, Any], budget: Budget, device: str = "cuda") -> int:
    """Runs every kernel instance under both tools of compute-sanitizer.

    Args:
        out: Folder of the ledger.
        about: What it is done on.
        budget: The time of this call.
        device: Where to run.
    """
    if shutil.which("compute-sanitizer") is None:
        print("sanitize: compute-sanitizer is not on PATH")
        return FAILED
    return work_through(Ledger(out / "gpu-sanitize.json", about), sanitizer_items(device), budget)


def sanitizer_items(device: str, prefix: Sequence[str] = ("compute-sanitizer", "--error-exitcode", "9")) -> Any:
    """One item for each tool and kernel instance.

    Args:
        device: Where the kernels run.
        prefix: The sanitizer and its options, without the tool.
    """

    def item(tool: str, instance: str) -> Callable[[float], Any]:
        watched = [sys.executable, "-m", "fastcurv.bench.exercise", instance, "--device", device]
        # The caching allocator would put tensors side by side in one allocation, and hide an access between them.
        choice = ["--tool", tool] if prefix else []
        return lambda left: command([*prefix, *choice, *watched], left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    return {f"{tool} {name}": item(tool, name) for tool in ("memcheck", "racecheck") for name in exercise.instances()}


def bench(out: Path, op: str, cases: Sequence[Case], options: Options, clock: clocks.Clock, budget: Budget) -> int:
    """Measures the cases of an op that its file lacks.

    Args:
        out: Folder of <op>-gpu.json, which `fastcurv.bench.report` reads.
        op: Name of the op.
        cases: Its cases.
        options: Device and contenders.
        clock: For the device.
        budget: The time of this call.
    """
    path = out / f"{op}-gpu.json"
    measured = []
    if path.exists():
        before, found = results.load(path)
        measured = found if _same(before, machine.describe(options.device)) else []
    for case in cases:
        if options.device not in case.devices or any(result.case == case.name for result in measured):
            continue
        if budget.spent(before=case.name):
            return UNFINISHED
        for result in harness.run_all([case], options, clock, start_load=0.0):
            measured.append(result)
            results.store(path, op, options.device, measured)
            print(results.table(result), flush=True)
    return DONE


def profile(out: Path, about: Mapping[str, Any], budget: Budget) -> int:
    """Reads hardware counters of the third launch of the most used instances.

    Args:
        out: Folder of the ledger.
        about: What it is done on.
        budget: The time of this call.
    """
    if shutil.which("ncu") is None:
        print("profile: ncu is not on PATH")
        return FAILED

    def item(instance: str) -> Callable[[float], Any]:
        watched = [sys.executable, "-m", "fastcurv.bench.exercise", instance, "--elements", str(PROFILED_ELEMENTS)]
        kernel = f"regex:{instance.split('/')[0]}_kernel"
        ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
        choice = ["--kernel-name", kernel, "--launch-skip", "2", "--launch-count", "1"]
        return lambda left: counters([*ncu, *choice, *watched], left)

    return work_through(Ledger(out / "gpu-profile.json", about), {name: item(name) for name in PROFILED}, budget)


def counters(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs ncu and returns the counters it read, or a note where it may not read them.

    Args:
        arguments: ncu and its arguments.
        seconds: Time it may take.
    """
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"rc": TIMED_OUT, "summary": f"took more than {seconds:.0f} s"}
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        return {"rc": 0, "summary": "ncu may not read hardware counters here (ERR_NVGPUCTRPERM)"}
    found = parse_counters(done.stdout)
    if not found:
        return {"rc": done.returncode or 1, "summary": "ncu reported nothing", "output": done.stdout[-TAIL:]}
    return {"rc": 0, "summary": "; ".join(f"{name} {value}" for name, value in found.items()), "counters": found}


def parse_counters(text: str) -> dict[str, str]:
    """The metrics of the first kernel in ncu's raw CSV (a line of names, one of units, one for each kernel)."""
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.reader(lines[start:]))
    if len(table) < 3:
        return {}
    return {
        name: f"{value} {unit}".strip()
        for name, unit, value in zip(table[0], table[1], table[2], strict=False)
        if name in METRICS
    }


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        0 when the stage is done, 1 when something failed, 2 without a GPU, 3 when it has to be started again.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stage", required=True, choices=("build-test", "sanitize", "bench", "profile"))
    parser.add_argument("--out", required=True, type=Path, help="folder for the stage's file")
    parser.add_argument("--op", default="adam", choices=BENCHMARKS, help="of the stage bench; default: %(default)s")
    parser.add_argument("--root", type=Path, default=Path("."), help="of the checkout; default: here")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="to stop after; default: %(default)s")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"{options.stage}: no GPU that torch can use (torch.cuda.is_available() is False)")
        return NO_GPU
    budget = Budget(options.seconds)
    if options.stage == "bench":
        cases = importlib.import_module(f"fastcurv.bench.bench_{options.op}").CASES
        choice = Options("cuda", peers=True)
        return bench(options.out, options.op, cases, choice, clocks.clock("cuda"), budget)
    about = machine.describe("cuda")
    if options.stage == "build-test":
        return build_test(options.out, about, budget, options.root)
    return {"sanitize": sanitize, "profile": profile}[options.stage](options.out, about, budget)


if __name__ == "__main__":
    sys.exit(main())
