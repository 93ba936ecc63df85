"""The one harness: first the correctness of every implementation, then their times, interleaved in one process.

No speed-up is given for a case in which an implementation of fastcurv is wrong, nor for a run during which something
else used the machine: the times stand alone then, with the reason.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from . import machine
from .clocks import Call, Clock, repeated
from .results import Result, Rounds, Row, difference, samples, summarise

Role = Literal["ours", "reference", "yardstick", "torch", "peer"]
OF_FASTCURV: tuple[Role, ...] = ("ours", "reference", "yardstick")

WARM_UPS = 3
# Where in memory a buffer happens to lie changes the time of a large step by a tenth, and where it lies depends on the
# order of allocation: all are allocated and measured twice, the second time in reversed order.
PLACEMENTS = 2
LEAST_SAMPLES = 4
MOST_ROUNDS = 150
SECONDS = 4.0
# After so long a placement ends although samples are missing, and is the last; each contender has one at least.
MOST_SECONDS = 300.0
# A contender that takes n times as long as ours, and more than PATIENCE times, sits out rounds: of 1000 rounds it is in
# 1000 * PATIENCE / n, but at least in every LONGEST_STRIDE-th.
PATIENCE, LONGEST_STRIDE = 4, 8
DOES_NOT_RUN = "does not run"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run includes.

    Attributes:
        device: `cpu` or `cuda`.
        peers: Whether other libraries are measured too, where they are installed.
        compile: Whether torch.compile is measured too where torch has no fused kernel (minutes for each case).
        quick: Whether every case is made small and run a few times, to see that it runs.
    """

    device: str = "cpu"
    peers: bool = False
    compile: bool = False
    quick: bool = False


@dataclasses.dataclass
class Prepared:
    """One implementation with inputs of its own, warmed up.

    Attributes:
        call: What is timed.
        kernel: The call of the bare kernel over the same buffers, or None.
        ceilings: Name, call and amount of work of what bounds the call from below.
        share: What part of its time was an optimizer's, of a call that is more than that; asked for after all calls.
    """

    call: Call
    kernel: Call | None = None
    ceilings: Sequence[tuple[str, Call, int]] = ()
    share: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation that a case measures.

    Attributes:
        name: As printed.
        role: Of fastcurv (`ours`, its `reference`, or another optimizer as a `yardstick`), of `torch`, or of a `peer`.
        verify: Runs it on a small version of the case; returns what is wrong, or an empty string.
        prepare: Gives it inputs of its own and warms it up.
        bytes: Memory that it needs.
        note: In what it differs from the others; with a note it is not compared in speed.
        computes: What it computes where that is not what the case asks for; verified as that, and compared in speed.
    """

    name: str
    role: Role
    verify: Callable[[], str]
    prepare: Callable[[], Prepared]
    bytes: int = 0
    note: str = ""
    computes: str = ""


@dataclasses.dataclass(frozen=True)
class Case(ABC):
    """One row of work: what is computed, by whom, and how many bytes it must move at least.

    Attributes:
        op: Name of the op.
        name: Name of the case, unique for its op.
        work: The same for a reader.
        devices: Where it is run.
        baseline: Name of the contender that speed-ups are relative to; empty for none.
        period: Calls that are timed together, where not every call does the same: times are means over a whole period.
    """

    op: str
    name: str
    work: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    baseline: str = "torch fused"
    period: int = 1

    @abstractmethod
    def contenders(self, options: Options) -> list[Contender]:
        """The implementations, those of fastcurv first, best first."""

    @abstractmethod
    def size(self, options: Options) -> dict[str, int]:
        """`tensors`, `elements`, and the work of a call: the `bytes` it has to move, or its `flops`."""


def interleave(calls: Mapping[str, Call], clock: Clock, seconds: float, least: int, pace: str = "") -> Rounds:
    """Times calls in turn, in another order every round, so that a drift of the machine hits all of them alike.

    Args:
        calls: By name.
        clock: For their device.
        seconds: How long to go on.
        least: The least number of samples of each, unless they take more than `MOST_SECONDS`.
        pace: The call by whose time others are slow; they sit out some rounds. Empty: none does.

    Returns:
        The rounds: in each, the times in seconds of those that took part.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    rounds = [{name: clock.time(calls[name]) for name in order}]
    stride = dict.fromkeys(order, 1)
    if pace:
        ratios = {name: rounds[0][name] / (PATIENCE * rounds[0][pace]) for name in order}
        stride = {name: min(LONGEST_STRIDE, max(1, round(ratio))) for name, ratio in ratios.items()}
    needed = least * max(stride.values(), default=1)
    for done in range(1, max(needed, MOST_ROUNDS)):
        if time.perf_counter() - start > (seconds if done >= needed else MOST_SECONDS):
            break
        shuffle(order)
        rounds.append({name: clock.time(calls[name]) for name in order if done % stride[name] == 0})
    return rounds


class _Measurement:
    """Collects the times of a case over several placements of its buffers."""

    def __init__(self, case: Case, options: Options, clock: Clock) -> None:
        self.options, self.clock, self.period = options, clock, case.period
        self.contenders = case.contenders(options)
        self.rows = {c.name: self._verified(c) for c in self.contenders}
        self.ours = next((c.name for c in self.contenders if c.role == "ours"), "")
        # Where memory runs short, ours and the baseline come first.
        self.first = [c for c in self.contenders if c.name in (self.ours, case.baseline)]
        self.rounds: Rounds = []
        self.alone: Rounds = []
        self.ceilings: dict[str, int] = {}
        self.watch = machine.Watch()

    def _verified(self, contender: Contender) -> Row:
        row = Row(contender.name, contender.role, note=contender.note, computes=contender.computes)
        try:
            row.wrong = contender.verify()
        except Exception as error:  # other libraries: whatever they raise, ours are measured
            if contender.role in OF_FASTCURV:
                raise
            row.note = f"{DOES_NOT_RUN}: {type(error).__name__}: {error}".partition("\n")[0]
        return row

    def place(self, backwards: bool) -> None:
        """Allocates for all contenders, measures, and lets go of everything."""
        _free(self.options.device)
        calls: dict[str, Call] = {}
        alone: dict[str, Call] = {}
        shares: dict[str, Callable[[], float]] = {}
        rest = [c for c in self.contenders if c not in self.first]
        for contender in [*self.first[::-1], *rest[::-1]] if backwards else [*self.first, *rest]:
            if self.rows[contender.name].note.startswith(DOES_NOT_RUN) or not self._fits(contender):
                continue
            prepared = contender.prepare()
            self.rows[contender.name].extra = self.clock.extra(prepared.call)
            calls[contender.name] = self.clock.adopt(prepared.call, self.period)
            if prepared.share is not None:
                shares[contender.name] = prepared.share
            if contender.name == self.ours:
                calls.update({name: call for name, call, _ in prepared.ceilings})
                self.ceilings = {name: amount for name, _, amount in prepared.ceilings}
                if prepared.kernel is not None:
                    calls["kernel"] = repeated(prepared.kernel, self.period)
                    alone = {"step": repeated(prepared.call, self.period), "kernel": calls["kernel"]}
        quick = self.options.quick
        seconds, least = (0.0, 1) if quick else (SECONDS, LEAST_SAMPLES)
        gc.collect()
        gc.disable()
        try:
            with self.watch:
                pace = self.ours if self.ours in calls and not quick else ""
                self.rounds += self._means(interleave(calls, self.clock, seconds, least, pace))
                self.alone += self._means(interleave(alone, self.clock, seconds / 6, least))
        finally:
            gc.enable()
        for name, share in shares.items():
            self.rows[name].share = share()

    def _means(self, rounds: Rounds) -> Rounds:
        """Times of whole periods as their means; ceilings have none."""
        return [
            {name: seconds / (1 if name in self.ceilings else self.period) for name, seconds in times.items()}
            for times in rounds
        ]

    def _fits(self, contender: Contender) -> bool:
        """Whether there is memory for its own buffers, and as much again for temporaries; notes it where not."""
        available, needed = machine.available_bytes(self.options.device), 2 * contender.bytes
        if needed > available and not samples(self.rounds, contender.name):
            sizes = f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
            self.rows[contender.name].note = f"not measured: {sizes}"
        return needed <= available


def _free(device: str) -> None:
    """Gives back what former contenders held: optimizers are in reference cycles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run(case: Case, options: Options, clock: Clock, start_load: float = 0.0) -> Result:
    """Verifies and measures the contenders of a case.

    Args:
        case: The case.
        options: What to include.
        clock: For the device of the options.
        start_load: Load average when the whole run began.
    """
    measured = _Measurement(case, options, clock)
    for placement in range(1 if options.quick else PLACEMENTS):
        start = time.perf_counter()
        measured.place(backwards=placement % 2 == 1)
        if time.perf_counter() - start > MOST_SECONDS:
            break
    rows, watch, alone = list(measured.rows.values()), measured.watch, list(filter(None, measured.alone))
    red = [f"{row.name} is wrong: {row.wrong}" for row in rows if row.wrong and row.role in OF_FASTCURV]
    quick = "a quick run shrinks the work" if options.quick else ""
    # A GPU does its work whatever the processors do meanwhile.
    contended = [machine.overloaded(start_load), watch.contended()] if options.device == "cpu" else []
    unfit = "; ".join(filter(None, [*red, *contended, quick]))
    result = Result(case.name, case.work, case.baseline, case.size(options), rows, unfit=unfit)
    result.load, result.others = watch.load, watch.others
    result.overhead = difference(alone, "step", "kernel")
    return summarise(result, measured.rounds, measured.ceilings)


def run_all(cases: Sequence[Case], options: Options, clock: Clock, start_load: float) -> Iterator[Result]:
    """Runs the cases for a device one after another.

    Args:
        cases: The cases.
        options: What to include.
        clock: For the device of the options.
        start_load: Load average when the whole run began.
    """
    for case in cases:
        if options.device in case.devices:
            yield run(case, options, clock, start_load)
            _free(options.device)
