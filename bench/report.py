"""Tables in README.md and plots in docs/, from the files in bench/results and nothing else.

`python -m fastcurv.bench.report`, in the root of a checkout; `--check` writes nothing and exits with 1 where README.md
does not say what the results say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcurv._backend import OPS
from fastcurv.cli import program

from . import targets
from .results import Result, Row, load

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PLOT = "![Time of a step or call relative to that of others](docs/benchmarks.png)"
# Columns of the table of times, in this order.
COLUMNS = ("ours", "yardstick", "torch", "peer")
Measured = dict[str, dict[str, tuple[dict[str, Any], list[Result]]]]


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        1 if README.md was to be checked and is out of date, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("."), help="of the checkout")
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    options = parser.parse_args(argv)
    readme = options.root / "README.md"
    measured = collect(options.root / "bench" / "results")
    before = readme.read_text() if readme.exists() else ""
    after = insert(before, section(measured))
    if options.check:
        if before != after:
            print(f"{readme} is out of date: run `python -m fastcurv.bench.report`", file=sys.stderr)
        return int(before != after)
    readme.write_text(after)
    draw(measured, options.root / "docs")
    return 0


def collect(folder: Path) -> Measured:
    """The results in a folder, by op and then by device (`cpu`, `gpu`), each with what it was measured on."""
    found: Measured = {}
    for path in sorted(folder.glob("*-[cg]pu.json")):
        op, _, device = path.stem.rpartition("-")
        found.setdefault(op, {})[device] = load(path)
    return found


def insert(text: str, tables: str) -> str:
    """Puts tables between the markers of a text, or markers and tables at its end where it has none."""
    begin, end = text.find(BEGIN), text.find(END)
    block = f"{BEGIN}\n{tables}\n{END}"
    if begin < 0 or end < begin:
        return f"{text.rstrip()}\n\n{block}\n".lstrip()
    return text[:begin] + block + text[end + len(END) :]


def section(measured: Measured) -> str:
    """All tables, as markdown."""
    rows = targets.load()
    parts = [PLOT] if _drawn(measured)[1] else []
    said: list[str] = []
    for op in dict.fromkeys([row.op for row in rows] + list(measured)):
        by_device = measured.get(op, {})
        for about, results in by_device.values():
            place = "the CPU" if about["device"] == "cpu" else "a GPU"
            machine = machine_line(about, op)
            # Once, where ops were measured together.
            parts += [f"### `{op}` on {place}", *([machine] if machine not in said else []), *times(about, results)]
            said.append(machine)
        verdicts = targets.judge([row for row in rows if row.op == op], {d: r for d, (_, r) in by_device.items()})
        parts += [f"What `{op}` must show (bench/targets.toml):", promises(verdicts)]
    return "\n\n".join(parts)


def machine_line(about: dict[str, Any], op: str) -> str:
    """What the results of an op are, and what they were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    if about["device"] == "cuda":
        where = f"{about['gpu']} (processor: {about['processor']}, {about['cores']} cores)"
    else:
        where = f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, SIMD level {about['simd']}"
    what = "a whole `opt.step()`" if op in OPS else "a call for the whole list (and of a whole training step)"
    lines = f"Median time of {what} in milliseconds. Measured {about['date']} on {where}; {versions}"
    return lines + (f"; commit {about['commit']}." if about["commit"] else ".")


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
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for result in results:
        best = result.ours()
        cells = [result.work, f"{result.size['tensors']:,}", f"{result.size['elements']:,}"]
        for name in columns:
            row = result.row(name)
            cells.append(_time(row) if row and row.rounds else "")
        cells.append(f"{100 * best.ceiling:.0f}" if best and best.ceiling and not result.unfit else "")
        cells.append(f"**{best.speedup:.2f}**" if best and best.speedup is not None else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def _time(row: Row) -> str:
    share = "" if row.share is None else f" ({100 * row.share:.1f} %)"
    digits = f"{row.median:,.0f}" if row.median >= 1000 else f"{row.median:.3g}"
    return digits + ("*" if row.note else "") + share


def losing(results: Sequence[Result]) -> str:
    """Where an implementation that is not ours is faster, in a sentence."""
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
                lost.append(f"{row.name} on {result.work} ({row.median:.3g} ms against {best.median:.3g})")
    if lost:
        return f"Where fastcurv loses: {'; '.join(lost)}."
    return "In no case of this table is another implementation faster."


def promises(verdicts: Sequence[targets.Verdict]) -> str:
    """The rows of targets.toml with their figures."""
    lines = [_line(["", "work", "must show", "measured", ""]), _line(["---"] * 5)]
    for verdict in verdicts:
        target = verdict.target
        figure = target.say(verdict.figure) if verdict.figure is not None else ""
        lines.append(_line([target.device.upper(), target.work, target.wanted(), figure, verdict.status]))
    return "\n".join(lines)


def draw(measured: Measured, folder: Path) -> None:
    """Writes benchmarks.png and benchmarks.svg: step times relative to torch, of the CPU or, once measured, of the GPU.

    Args:
        measured: What `collect` found.
        folder: Created where it is missing.
    """
    about, results = _drawn(measured)
    if not results:
        return
    from . import plots

    where = about["gpu"] if about["device"] == "cuda" else f"{about['processor']}, {about['threads']} threads"
    folder.mkdir(parents=True, exist_ok=True)
    figure = plots.relative_times(
        by_baseline(results),
        f"One optimizer step, or call of orthogonalize, {where}, torch {about['versions']['torch']}",
    )
    plots.save(figure, folder / "benchmarks", ".png", ".svg")


def _drawn(measured: Measured) -> tuple[dict[str, Any], list[Result]]:
    """What the plot shows: the results with speed-ups of the GPU or, as long as there are none, of the CPU."""
    for device in ("gpu", "cpu"):
        files = [by_device[device] for by_device in measured.values() if device in by_device]
        results = [result for _, found in files for result in found if any(row.speedup for row in result.rows)]
        if results:
            return files[0][0], results
    return {}, []


def _names(results: Sequence[Result], role: str) -> list[str]:
    return list(dict.fromkeys(row.name for result in results for row in result.rows if row.role == role))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
