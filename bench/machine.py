"""What a result was measured on, and whether something else was using the machine meanwhile."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fastcurv
from fastcurv import _backend

MOST_LOAD = 0.6
MOST_OTHERS = 0.15
# The kernel counts processor time in hundredths of a second: over a shorter time the difference below says nothing.
LEAST_SECONDS = 1.0


def describe(device: str) -> dict[str, Any]:
    """Machine, versions and commit, as stored with every result.

    Args:
        device: `cpu` or `cuda`.
    """
    return {
        "device": device,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "threads": torch.get_num_threads(),
        "simd": _backend.native().simd_level() if _backend.native() else "",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The name of the processor, with family and model, which tell apart what hypervisors call by one name."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name'].strip()} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def versions() -> dict[str, str]:
    """Versions of Python, of fastcurv and of the packages that a result depends on, those that are installed."""
    found = {
        "python": platform.python_version(),
        "fastcurv": fastcurv.__version__,
        "torch": torch.__version__,
    }
    for name in ("triton", "cupy-cuda13x", "torch-optimi", "pytorch_optimizer"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the checkout fastcurv is imported from, `+dirty` with uncommitted changes; empty without one."""
    root = Path(fastcurv.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*command, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # Results and what is drawn from them are made after the commit they are results of.
        paths = ["--", ".", ":!bench/results", ":!README.md", ":!docs/benchmarks*"]
        status = subprocess.run([*command, "status", "--porcelain", *paths], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def available_bytes(device: str) -> int:
    """Memory that an allocation on a device can still get."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match.group(1)) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class Watch:
    """Watches, while it is entered (several times, if need be), how busy others keep the machine.

    The load average alone is not enough: it lags by a minute, and ours is part of it. The processor time that was spent
    and not by this process or its children is what others took.

    Attributes:
        load: One-minute load average at the first beginning and at the last end.
        seconds: Length of the watch.
    """

    def __init__(self) -> None:
        self.load: tuple[float, float] = (0.0, 0.0)
        self.seconds = 0.0
        self._others = 0.0

    def __enter__(self) -> Watch:
        if not self.seconds:
            self.load = (os.getloadavg()[0], 0.0)
        self._start = (time.perf_counter(), _machine_seconds() - _own_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        wall, others = self._start
        self.seconds += time.perf_counter() - wall
        self._others += _machine_seconds() - _own_seconds() - others
        self.load = (self.load[0], os.getloadavg()[0])

    @property
    def others(self) -> float:
        """Processor cores that others used on average, time stolen by a hypervisor included."""
        return max(0.0, self._others / self.seconds) if self.seconds else 0.0

    def contended(self) -> str:
        """Why timings taken during the watch are not to be believed; empty when nothing speaks against them."""
        if self.seconds >= LEAST_SECONDS and self.others > MOST_OTHERS:
            return f"others used {self.others:.2f} of a core, more than {MOST_OTHERS:g}"
        return ""


def overloaded(load: float) -> str:
    """Why a run that finds this load average at its start is not to be believed; empty when it may begin."""
    return f"the load average at the start was {load:.2f}, above {MOST_LOAD:g}" if load > MOST_LOAD else ""


def _machine_seconds() -> float:
    if not Path("/proc/stat").exists():
        return 0.0
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle and waiting for input
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
