"""How long a call takes: on the CPU by the wall clock, on a GPU by CUDA events with a cold L2 cache."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]

# Below this the launch costs as much as the work, and the work is timed as the replay of a CUDA graph.
GRAPH_BELOW_SECONDS = 100e-6
DISPATCH_ROUNDS = 20


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of samples, linear between neighbours."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def repeated(call: Call, times: int) -> Call:
    """So many calls as one.

    Args:
        call: What is called.
        times: How often.
    """
    if times == 1:
        return call

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


class Clock(Protocol):
    """Times calls on one kind of device."""

    def adopt(self, call: Call, times: int = 1) -> Call:
        """What to time in the place of so many calls."""

    def time(self, call: Call) -> float:
        """Seconds that an adopted call takes."""

    def extra(self, call: Call) -> dict[str, float]:
        """What else there is to know of a call that has not been adopted."""


class WallClock:
    """The wall clock, for calls that return when they are done."""

    def adopt(self, call: Call, times: int = 1) -> Call:
        """The calls themselves."""
        return repeated(call, times)

    def time(self, call: Call) -> float:
        """Seconds from the call to its return."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def extra(self, call: Call) -> dict[str, float]:
        """Nothing."""
        return {}


class CudaClock:
    """CUDA events around a call that finds none of its data in the L2 cache."""

    def __init__(self) -> None:
        # Twice the cache, so that a write of it leaves nothing else there.
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def adopt(self, call: Call, times: int = 1) -> Call:
        """The replay of a graph of short calls, if they can be captured; else the calls themselves."""
        call = repeated(call, times)
        if quantile([self.time(call) for _ in range(3)], 0.5) >= times * GRAPH_BELOW_SECONDS or synchronises(call):
            return call
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            warnings.warn(f"timed with its launches, for it cannot be captured in a CUDA graph: {error}", stacklevel=2)
            return call
        return graph.replay

    def time(self, call: Call) -> float:
        """Seconds on the device, launch gaps included."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def extra(self, call: Call) -> dict[str, float]:
        """`dispatch` milliseconds of the processor, kernel `launches`, and whether the call `synchronises`."""
        dispatch = []
        for _ in range(DISPATCH_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            dispatch.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return {
            "dispatch": 1e3 * quantile(dispatch, 0.5),
            "launches": float(launches(call)),
            "synchronises": float(synchronises(call)),
        }


def launches(call: Call) -> int:
    """How many kernels a call launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(names))


def synchronises(call: Call) -> bool:
    """Whether a call makes the processor wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def clock(device: str) -> Clock:
    """The clock for a device.

    Args:
        device: `cpu` or `cuda`.
    """
    return CudaClock() if device == "cuda" else WallClock()
