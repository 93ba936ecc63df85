"""What was measured: rows and results, how they are summed up, printed, and kept in files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import machine
from .clocks import quantile

# Rounds of calls that followed each other closely: in each, the seconds of those that took part.
Rounds = list[dict[str, float]]


def samples(rounds: Rounds, name: str) -> list[float]:
    """The times of a call."""
    return [times[name] for times in rounds if name in times]


def ratio(rounds: Rounds, one: str, other: str) -> float | None:
    """Median over the rounds of the time of one call over that of another; None where they have none in common.

    A machine changes its speed, by half and for seconds: two times of a round have met the same, two medians need not.
    """
    found = [times[one] / times[other] for times in rounds if one in times and other in times]
    return quantile(found, 0.5) if found else None


def difference(rounds: Rounds, one: str, other: str) -> float | None:
    """Median over the rounds of the time of one call less that of another, in milliseconds."""
    found = [times[one] - times[other] for times in rounds if one in times and other in times]
    return 1e3 * quantile(found, 0.5) if found else None


def digits(milliseconds: float) -> str:
    """Three significant digits of a time, or all digits before the point."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


@dataclasses.dataclass
class Row:
    """What was measured of one contender, in milliseconds; `rounds` is 0 where it was not measured.

    Attributes:
        rate: Amount of work in 1e9 units a second; which units, the result says.
        ceiling: The same as a fraction of the ceiling.
        share: The part of its time that is an optimizer's, where the case is of more than that.
        relative: Its time over that of the back end a user gets.
        speedup: Over the baseline; None where none may be given.
        wrong: What is wrong with its results, if anything is.
        note: In what it differs from the others, or why it was not measured.
        computes: What it computes where that is not what the case asks for.
        extra: On a GPU, what `clocks.CudaClock.extra` returns.
    """

    name: str
    role: str
    median: float = 0.0
    p20: float = 0.0
    p80: float = 0.0
    rounds: int = 0
    rate: float = 0.0
    ceiling: float | None = None
    relative: float | None = None
    speedup: float | None = None
    wrong: str = ""
    note: str = ""
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    computes: str = ""
    share: float | None = None


@dataclasses.dataclass
class Result:
    """What was measured of one case.

    Attributes:
        unfit: Why speed-ups and figures are withheld; empty when they are not.
        size: `tensors`, `elements`, and the amount of work that has to be done: `bytes` moved, or `flops`; neither
            where no rate is wanted.
        ceiling: The highest rate a ceiling reached, and `ceiling_name`, which one.
        overhead: Milliseconds of a step of the first contender outside its bare kernel, the two alternating with
            nothing in between.
        overhead_among_others: The same when the other contenders run in between and take the caches.
    """

    case: str
    work: str
    baseline: str
    size: dict[str, int]
    rows: list[Row]
    ceiling: float | None = None
    ceiling_name: str = ""
    overhead: float | None = None
    overhead_among_others: float | None = None
    load: tuple[float, float] = (0.0, 0.0)
    others: float = 0.0
    unfit: str = ""

    @property
    def amount(self) -> int:
        """The work of a call, in `unit`."""
        return self.size.get("flops", self.size.get("bytes", 0))

    @property
    def unit(self) -> str:
        """Of the work."""
        return "FLOP" if "flops" in self.size else "B"

    def row(self, name: str) -> Row | None:
        """The row of a contender by name."""
        return next((row for row in self.rows if row.name == name), None)

    def ours(self) -> Row | None:
        """The row of the back end that a user gets: the best that runs."""
        return next((row for row in self.rows if row.role == "ours"), None)

    def comparable(self) -> list[Row]:
        """The rows of other implementations that may be compared with ours, the fastest first."""
        rows = [row for row in self.rows if row.role in ("torch", "peer") and row.relative]
        fit = [row for row in rows if not (self.unfit or row.note or row.wrong)]
        return sorted(fit, key=lambda row: row.relative or 0.0)


def summarise(result: Result, rounds: Rounds, ceilings: Mapping[str, int]) -> Result:
    """Fills in medians, bandwidths, percentages and speed-ups.

    Args:
        result: Of a case, with rows not yet filled in.
        rounds: Times of the contenders, the ceilings and `kernel`.
        ceilings: The amount of work that each ceiling does.
    """
    speeds = {name: amount / quantile(samples(rounds, name), 0.5) / 1e9 for name, amount in ceilings.items()}
    if speeds:
        result.ceiling_name, result.ceiling = max(speeds.items(), key=lambda item: item[1])
    ours = result.ours()
    name_of_ours = ours.name if ours else ""
    result.overhead_among_others = difference(rounds, name_of_ours, "kernel")
    base = result.row(result.baseline)
    for row in result.rows:
        times = samples(rounds, row.name)
        if not times:
            continue
        row.rounds = len(times)
        row.p20, row.median, row.p80 = (1e3 * quantile(times, q) for q in (0.2, 0.5, 0.8))
        row.relative = ratio(rounds, row.name, name_of_ours)
        if not row.note and not row.computes:
            row.rate = result.amount / row.median / 1e6
            if reached := ratio(rounds, result.ceiling_name, row.name):
                row.ceiling = reached * result.amount / ceilings[result.ceiling_name]
        # The baseline is what the others are compared with, however precise it is.
        if base and not (base.note or result.unfit or row.note or (row.wrong and row is not base)):
            row.speedup = ratio(rounds, base.name, row.name)
    return result


def table(result: Result) -> str:
    """A result as text."""
    size = result.size
    amount = f", {result.amount:,} {result.unit} a call" if result.amount else ""
    lines = [f"{result.work}: {size['tensors']} tensors, {size['elements']:,} parameters{amount}"]
    if result.ceiling:
        lines.append(f"  ceiling {result.ceiling:.1f} G{result.unit}/s ({result.ceiling_name})")
    against = f"x {result.baseline}" if result.baseline else ""
    lines.append(
        f"  {'':26}{'median':>10} {'[p20, p80] ms':>20} {f'G{result.unit}/s':>8} {'% ceiling':>10} {against:>14}"
    )
    for row in result.rows:
        if not row.rounds:
            lines.append(f"  {row.name:26} {row.note}")
            continue
        spread = f"[{row.p20:.3f}, {row.p80:.3f}]"
        percent = f"{100 * row.ceiling:.0f}" if row.ceiling else ""
        speed = f"{row.speedup:.2f}" if row.speedup else ""
        remark = row.wrong or row.note or (f"computes {row.computes}" if row.computes else "")
        if row.share is not None:
            remark = f"{100 * row.share:.2f} % of it opt.step()  {remark}".rstrip()
        rate = f"{row.rate:.1f}" if row.rate else ""
        figures = f"{row.median:>10.3f} {spread:>20} {rate:>8} {percent:>10} {speed:>14}"
        lines.append(f"  {row.name:26}{figures}  {remark}".rstrip())
    ours = result.ours()
    # Below that it is the difference of two long times, and noise.
    if ours and result.overhead_among_others is not None and (result.overhead or 0.0) > 0.05 * ours.median:
        among = f"{result.overhead_among_others:.3f} ms with the others in between"
        lines.append(f"  outside the kernel: {result.overhead:.3f} ms; {among}")
    if result.unfit:
        lines.append(f"  no speed-up is given: {result.unfit}")
    load = "load average {:.2f} before, {:.2f} after".format(*result.load)
    lines.append(f"  {load}; others used {result.others:.2f} of a core")
    return "\n".join(lines)


def store(path: Path, op: str, device: str, measured: Sequence[Result]) -> None:
    """Writes results, and what they were measured on, to a JSON file; replaces it as a whole.

    Args:
        path: The file.
        op: Name of the op.
        device: `cpu` or `cuda`.
        measured: The results.
    """
    document = {"op": op, **machine.describe(device), "cases": [dataclasses.asdict(result) for result in measured]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_rounded(document), indent=1) + "\n")
    temporary.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Reads what `store` wrote.

    Returns:
        Op, device, machine and versions; and the results.
    """
    document = json.loads(path.read_text())
    measured = []
    for case in document.pop("cases"):
        rows = [Row(**row) for row in case["rows"]]
        measured.append(Result(**{**case, "rows": rows, "load": tuple(case["load"])}))
    return document, measured


def _rounded(value: Any) -> Any:
    """Six significant digits are more than a clock gives."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
