"""No C++ source takes long to compile, by Ninja's log of the build: one more op must not make every build long."""

import statistics
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOG = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / ".ninja_log"
# An op takes 1 to 9 seconds of a core at 2.5 GHz, 4.5 in the mean, and the bindings, which are one source, 13. The log
# has wall times, so the limits are relative: compilers that share cores slow each other down, the bindings come last.
LONGEST_OP = 3.0  # of the mean
ALL_OPS = 14.0  # of the bindings


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """The time of the last compilation of each object file."""
    if not LOG.exists():
        pytest.skip("nothing was built in this checkout")
    lines = [line.split("\t") for line in LOG.read_text().splitlines()[1:]]
    return {Path(line[3]).name: (int(line[1]) - int(line[0])) / 1000 for line in lines}


@pytest.fixture(scope="module")
def ops(seconds) -> dict[str, float]:
    names = sorted(p.name for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.stem not in ("simd", "stream"))
    return {name: seconds[f"{name}.o"] for name in names}


def test_no_op_takes_long_to_compile(ops):
    limit = LONGEST_OP * statistics.mean(ops.values())
    assert {name: time for name, time in ops.items() if time > limit} == {}, ops


def test_all_ops_together_compile_quickly(ops, seconds):
    assert sum(ops.values()) <= ALL_OPS * seconds["unity_0_cxx.cxx.o"], ops
