"""The rows of targets.toml: what README shows, and whether a result shows what is promised."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .harness import DOES_NOT_RUN
from .results import Result, Row

Measure = Literal["speedup", "time", "ceiling", "overhead", "launches", "dispatch", "share"]


@dataclasses.dataclass(frozen=True)
class Target:
    """One row; the fields are explained in targets.toml."""

    op: str
    case: str
    device: Literal["cpu", "gpu"]
    work: str
    measure: Measure
    against: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, figure: float) -> bool:
        """Whether a figure meets the threshold."""
        return figure >= self.at_least if self.at_least is not None else figure <= (self.at_most or 0.0)

    def wanted(self) -> str:
        """The threshold in words."""
        sign, value = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {self.say(value or 0.0)}"

    def say(self, value: float) -> str:
        """A figure of this row in words."""
        if self.measure == "ceiling":
            return f"{100 * value:.0f} % of the ceiling"
        if self.measure == "overhead":
            return f"{value:.2f} ms"
        if self.measure == "launches":
            return f"{value:.0f} launch" + ("" if value == 1 else "es")
        if self.measure == "share":
            return f"{100 * value:.1f} % of a training step"
        other = self.against[0] if len(self.against) == 1 else f"the fastest of {', '.join(self.against)}"
        kind = {"dispatch": "the dispatch time of ", "time": "the time of "}.get(self.measure, "")
        return f"{value:.3g} x {kind}{other}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A case that README shows."""

    op: str
    case: str
    work: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A row with its figure, and `holds`, `does not hold`, or why there is none."""

    target: Target
    figure: float | None
    status: str


def choices() -> list[Choice]:
    """The cases that README shows, in its order."""
    return [Choice(**row) for row in _document()["readme"]]


def load() -> list[Target]:
    """Lists the targets of each op with their figures."""
    rows = []
    for row in _document()["target"]:
        against = row.pop("against", ())
        rows.append(Target(**row, against=(against,) if isinstance(against, str) else tuple(against)))
    return rows


def _document() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("targets.toml").read_text())


def judge(rows: Sequence[Target], measured: Mapping[str, Sequence[Result]]) -> list[Verdict]:
    """Compares rows with results.

    Args:
        rows: Of one op.
        measured: Results of that op by device, `cpu` and `gpu`, as far as there are any.
    """
    return [_verdict(row, measured.get(row.device)) for row in rows]


def _verdict(target: Target, measured: Sequence[Result] | None) -> Verdict:
    if measured is None:
        return Verdict(target, None, "not yet measured on a GPU" if target.device == "gpu" else "not yet measured")
    result = next((result for result in measured if result.case == target.case), None)
    if result is None:
        return Verdict(target, None, "not measured")
    if result.unfit:
        return Verdict(target, None, f"not measured: {result.unfit}")
    if missing := [name for name in target.against if not _took_part(result.row(name))]:
        return Verdict(target, None, f"not measured: {', '.join(missing)} took no part")
    value = _figure(target, result)
    if value is None:
        return Verdict(target, None, "not measured: a part of it did not run")
    return Verdict(target, value, "holds" if target.holds(value) else "does not hold")


def _took_part(row: Row | None) -> bool:
    """Whether a row was measured and compared, or could not be run at all: what does not run is not the fastest."""
    return row is not None and (row.note.startswith(DOES_NOT_RUN) or bool(row.rounds and not row.note))


def _figure(target: Target, result: Result) -> float | None:
    ours = result.ours()
    if ours is None or not ours.rounds:
        return None
    if target.measure == "ceiling":
        return ours.ceiling
    if target.measure == "overhead":
        return result.overhead
    if target.measure == "launches":
        return ours.extra.get("launches")
    if target.measure == "share":
        return ours.share
    others = [row for row in result.rows if row.name in target.against and row.rounds]
    if target.measure == "dispatch":
        if "dispatch" not in ours.extra or any("dispatch" not in row.extra for row in others):
            return None
        return max((ours.extra["dispatch"] / row.extra["dispatch"] for row in others), default=None)
    fastest = min((row.relative for row in others if row.relative), default=None)
    if fastest is None:
        return None
    return fastest if target.measure == "speedup" else 1 / fastest


def table(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as text."""
    width = max((len(v.target.work) for v in verdicts), default=0)
    lines = []
    for verdict in verdicts:
        target = verdict.target
        device = "GPU" if target.device == "gpu" else "CPU"
        figure = f"{target.say(verdict.figure)}: " if verdict.figure is not None else ""
        lines.append(f"{device}  {target.work:{width}}  wanted {target.wanted():44} {figure}{verdict.status}")
    return "\n".join(lines)
