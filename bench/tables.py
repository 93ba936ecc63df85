"""Results as markdown: the short table of README, and the full tables of docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastcurv._backend import OPS

from . import targets
from .results import Result, Row, digits

# Columns of the table of times, in this order.
COLUMNS = ("ours", "yardstick", "torch", "peer")
# Results and what they were measured on, by op and then by device (`cpu`, `gpu`).
Measured = dict[str, dict[str, tuple[dict[str, Any], list[Result]]]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of README: a case, our time, and the fastest other implementation."""

    op: str
    work: str
    ours: Row
    other: Row
    about: dict[str, Any]

    @property
    def speedup(self) -> float:
        """The other's time over ours: the median over rounds in which they followed each other."""
        return self.other.relative or 0.0


def chosen(measured: Measured, device: str) -> list[Line]:
    """The lines of README, as far as their cases were measured on a device beside another implementation."""
    lines = []
    for choice in targets.choices():
        about, results = measured.get(choice.op, {}).get(device, ({}, []))
        result = next((result for result in results if result.case == choice.case), None)
        if result and (ours := result.ours()) and (others := result.comparable()):
            lines.append(Line(choice.op, choice.work, ours, others[0], about))
    return lines


def summary(lines: Sequence[Line]) -> str:
    """The table of README for a device, with what it was measured on below."""
    rows = [[":--", "--:", ":--", "--:"]]
    for line in lines:
        other = f"{line.other.name} {digits(line.other.median)}" + (" \\*" if line.other.computes else "")
        speedup = f"**{line.speedup:.2f}**" if line.speedup >= 1 else f"{line.speedup:.2f} (slower)"
        rows.append([line.work, digits(line.ours.median), other, speedup])
    table = markdown(["work", "fastcurv, ms", "fastest other, ms", "speed-up"], rows)
    others = [line.other for line in lines if line.other.computes]
    remarks = dict.fromkeys(f" \\* {other.name} computes {other.computes}." for other in others)
    return f"{table}\n\nMedians on {place([line.about for line in lines])}.{''.join(remarks)}"


def place(abouts: Sequence[dict[str, Any]]) -> str:
    """Names the machine, the versions and the dates of the results of one device."""

    def all_of(values: Sequence[Any]) -> str:
        return " / ".join(dict.fromkeys(str(value) for value in values))

    where = all_of([about["processor"] for about in abouts])
    if abouts[0]["device"] == "cuda":
        where = f"{all_of([about['gpu'] for about in abouts])} (processor: {where})"
    else:
        where += f", {all_of([about['threads'] for about in abouts])} threads"
    cores = all_of([about["cores"] for about in abouts])
    names = dict.fromkeys(name for about in abouts for name in about["versions"])
    versions = [
        f"{name} {all_of([about['versions'][name] for about in abouts if name in about['versions']])}" for name in names
    ]
    dates = sorted({about["date"] for about in abouts})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{where}, {cores} cores; {', '.join(versions)}; {when}"


def machine_line(about: dict[str, Any], op: str) -> str:
    """Says in a sentence how the results of an op are to be read and where they were measured."""
    what = "a whole `opt.step()`" if op in OPS else "a call for the whole list (and of a whole training step)"
    line = f"Median time of {what} in milliseconds, on {place([about])}"
    line += f"; SIMD level {about['simd']}" if about["device"] == "cpu" else ""
    return line + (f"; commit {about['commit']}." if about["commit"] else ".")


def times(about: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """The tables of times, one to a baseline, and what there is to say of them."""
    parts = [_times(baseline, group) for baseline, group in by_baseline(results).items()]
    rows = [row for result in results for row in result.rows]
    remarks = [row.note for row in rows if row.note and row.rounds]
    parts += [f"\\* {remark}." for remark in dict.fromkeys(remarks)]
    parts += dict.fromkeys(f"{row.name} computes {row.computes}." for row in rows if row.computes and row.rounds)
    parts += [f"{row.name} on {r.work} is {row.wrong}." for r in results for row in r.rows if row.wrong and row.rounds]
    if any(row.share is not None for row in rows):
        parts.append("In brackets: the part of it that is `opt.step()`.")
    parts += [f"No speed-up is given for {result.work}: {result.unfit}." for result in results if result.unfit]
    parts.append(losing(results))
    if about["device"] == "cpu":
        before, after = results[0].load[0], results[-1].load[1]
        busiest = max(result.others for result in results)
        load = f"Load average {before:.2f} before and {after:.2f} after (our own threads count too)"
        parts.append(f"{load}; others used at most {busiest:.2f} of a core.")
    return parts


def by_baseline(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by what their speed-ups are relative to; those without are with the first."""
    first = next((result.baseline for result in results if result.baseline), "")
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.baseline or first, []).append(result)
    return groups


def _times(baseline: str, results: Sequence[Result]) -> str:
    columns = [name for role in COLUMNS for name in _names(results, role)]
    header = ["work", "tensors", "parameters", *columns, "% of ceiling", f"x {baseline}" if baseline else ""]
    rows = [["---", *["---:"] * (len(header) - 1)]]
    for result in results:
        best = result.ours()
        cells = [result.work, f"{result.size['tensors']:,}", f"{result.size['elements']:,}"]
        for name in columns:
            row = result.row(name)
            cells.append(_time(row) if row and row.rounds else "")
        cells.append(f"{100 * best.ceiling:.0f}" if best and best.ceiling and not result.unfit else "")
        cells.append(f"**{best.speedup:.2f}**" if best and best.speedup is not None else "")
        rows.append(cells)
    return markdown(header, rows)


def _time(row: Row) -> str:
    share = "" if row.share is None else f" ({100 * row.share:.1f} %)"
    return digits(row.median) + ("*" if row.note else "") + share


def losing(results: Sequence[Result]) -> str:
    """The cases in which an implementation that is not ours is faster, in a sentence."""
    lost = []
    for result in results:
        best = result.ours()
        for row in result.rows:
            if (
                row.role in ("torch", "peer")
                and best
                and best.speedup is not None
                and row.speedup is not None
                and row.median < best.median
            ):
                lost.append(f"than {row.name} on {result.work} ({digits(best.median)} ms against {digits(row.median)})")
    if lost:
        return f"fastcurv is slower {'; '.join(lost)}."
    return "No other implementation is faster in any of these cases."


def promises(verdicts: Sequence[targets.Verdict]) -> str:
    """The rows of targets.toml with their figures."""
    rows = [["---"] * 5]
    for verdict in verdicts:
        target = verdict.target
        figure = target.say(verdict.figure) if verdict.figure is not None else ""
        rows.append([target.device.upper(), target.work, target.wanted(), figure, verdict.status])
    return markdown(["", "work", "must show", "measured", ""], rows)


def _names(results: Sequence[Result], role: str) -> list[str]:
    return list(dict.fromkeys(row.name for result in results for row in result.rows if row.role == role))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Args:
        header: The names of the columns.
        rows: First their alignments, then the cells.
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, *rows])
