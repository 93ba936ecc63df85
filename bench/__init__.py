"""Benchmarks, imported as `fastcurv.bench`: one harness, real parameter lists, and the figures that must hold.

`fastcurv bench` runs them, `python -m fastcurv.bench.report` draws what was measured, and `python -m
fastcurv.bench.gpu` does on a GPU machine what the tests and benchmarks without one cannot.
"""

from __future__ import annotations

from pathlib import Path

# What there are cases of: the names of the modules bench_<name>.py.
BENCHMARKS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
