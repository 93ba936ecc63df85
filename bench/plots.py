"""Plots of the results and of the demo; needs matplotlib (`pip install 'fastcurv[bench]'`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever this runs
# One text of an SVG for one set of numbers: no date, no random identifiers.
matplotlib.rcParams["svg.hashsalt"] = "fastcurv"

# After the choice above, which pyplot takes at import.
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

from .results import Result, Row  # noqa: E402

OURS = "#0b6e99"
COLOURS = {
    "fastcurv triton": "#4aa5a1",
    "torch fused": "#d1495b",
    "torch foreach": "#edae49",
    "torch loop": "#8d99ae",
    "torch compile": "#6a4c93",
    "torch default": "#8d99ae",
    "fastcurv Adam": "#1b1b1e",
    "fastcurv Ranger": "#4aa5a1",
    "eager Ranger": "#a3b18a",
    "torch AdamW": "#8d99ae",
    "torch.linalg.svd": "#d1495b",
    "OSGD by torch.linalg.svd": "#d1495b",
    "torch.linalg.qr": "#d1495b",
    "torch eigh of the Gram matrix": "#edae49",
    "torch eager": "#edae49",
    "torch SGD": "#1b1b1e",
}
PEERS = ("#5b8c5a", "#a3b18a", "#7f5539", "#c08497", "#577590")
MARKERS = {"ours": "o", "reference": "o", "yardstick": "|", "torch": "D", "peer": "s"}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}


def colour(row: Row, others: Sequence[str]) -> str:
    """The colour of a contender, the same in every plot; `others` are the names of those without a fixed one."""
    if row.name in COLOURS:
        return COLOURS[row.name]
    return PEERS[others.index(row.name) % len(PEERS)] if row.name in others else OURS


def relative_times(groups: Mapping[str, Sequence[Result]], title: str) -> Figure:
    """Step times relative to the baseline of each case, one line of dots to a case; our own reference is left out.

    Args:
        groups: Results with speed-ups, by baseline; each has a panel.
        title: Of the plot.
    """
    results = [result for group in groups.values() for result in group]
    names = list(dict.fromkeys(row.name for result in results for row in result.rows))
    peers = list(dict.fromkeys(row.name for result in results for row in result.rows if row.role == "peer"))
    legend: dict[str, Any] = {}
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(groups),
            1,
            figsize=(8, 1 + 0.5 * len(groups) + 0.52 * len(results)),
            layout="constrained",
            squeeze=False,
            height_ratios=[len(group) for group in groups.values()],
        )
        for axes, (baseline, group) in zip(panels[:, 0], groups.items(), strict=True):
            for position, result in enumerate(group):
                _relative_line(axes, position, result, peers, legend)
            axes.axvline(1, color=COLOURS.get(baseline, OURS), linewidth=1, linestyle="--", zorder=0)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_yticks(range(len(group)), [result.work for result in group])
            axes.set_ylim(len(group) - 0.5, -0.7)
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(f"time relative to {baseline}")
        figure.suptitle(f"{title}\nleft is faster; bars span p20 to p80", fontsize=10)
        known = [name for name in names if name in legend]
        figure.legend(
            [legend[name] for name in known], known, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
    return figure


def _relative_line(axes: Any, position: int, result: Result, peers: Sequence[str], legend: dict[str, Any]) -> None:
    base = result.row(result.baseline)
    assert base is not None
    axes.axhline(position, color="#e6e6e6", linewidth=6, zorder=0)
    for row in sorted(result.rows, key=lambda row: row.role == "ours"):
        if row.speedup is None or row.role == "reference":
            continue
        shade = colour(row, peers)
        axes.plot([row.p20 / base.median, row.p80 / base.median], [position] * 2, color=shade, linewidth=1.5)
        size = 9 if row.role == "ours" else 6
        place = (row.median / base.median, position)
        line = axes.plot(*place, MARKERS[row.role], color=shade, markersize=size, linestyle="")
        legend.setdefault(row.name, line[0])
        if row is result.ours():
            axes.annotate(f"{row.speedup:.2f} x", place, (0, 9), textcoords="offset points", ha="center")


def step_times(results: Sequence[Result]) -> Figure:
    """Step times in milliseconds, one panel to a case."""
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(results), figsize=(4.2 * len(results), 2.6), layout="constrained", squeeze=False
        )
        for axes, result in zip(panels[0], results, strict=True):
            rows = [row for row in result.rows if row.rounds]
            bars = axes.barh(
                [row.name for row in rows], [row.median for row in rows], color=[colour(r, []) for r in rows]
            )
            axes.bar_label(bars, [f"{row.median:.3g} ms" for row in rows], padding=4)
            axes.margins(x=0.25)
            axes.invert_yaxis()
            axes.set_title(result.work + (" (the machine was busy)" if result.unfit else ""))
            axes.set_xlabel("median time of opt.step() in ms")
    return figure


def losses(curves: Mapping[str, Sequence[float]], yardsticks: Mapping[str, str], limit: float, steps: int) -> Figure:
    """Loss against step, and how far curves are from others.

    Args:
        curves: Losses by optimizer.
        yardsticks: By name of a curve, that of the curve its difference is taken from.
        limit: The relative difference that is allowed.
        steps: During how many steps it is.
    """
    shades = {name: COLOURS.get(name, OURS) for name in curves}
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.4), layout="constrained", sharex=True)
        for name, values in curves.items():
            # Those that differences are taken from are wider, or the others would hide them: they coincide.
            width, order = (1.2, 3) if name in yardsticks else (4, 2)
            shade = shades[name]
            above.plot(range(1, len(values) + 1), values, label=name, color=shade, linewidth=width, zorder=order)
        above.set_yscale("log")
        above.set_ylabel("training loss")
        above.set_title("The same network, data and seed")
        above.legend(frameon=False)
        for name, other in yardsticks.items():
            # Equal losses have no place on a logarithmic axis.
            apart = [abs(a - b) / abs(b) or math.nan for a, b in zip(curves[name], curves[other], strict=True)]
            label = f"{name} from {other}"
            below.plot(
                range(1, len(apart) + 1), apart, ".-", label=label, color=shades[name], linewidth=1, markersize=2
            )
        below.plot([1, steps], [limit] * 2, "--", color="#555555", label=f"allowed in the first {steps} steps")
        below.set_yscale("log")
        below.set_ylabel("relative difference")
        below.set_xlabel("step")
        below.set_title("Difference of the losses")
        below.legend(frameon=False)
    return figure


def against_plain(grid: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> Figure:
    """Mean accuracy of orthogonal versions over that of plain ones, a point to a cell.

    Args:
        grid: Cells with `accuracy`: percentages over seeds by the name of the optimizer.
        pairs: Names of a plain optimizer and its orthogonal version.
    """
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(pairs), figsize=(4.2 * len(pairs), 4), layout="constrained", squeeze=False
        )
        for axes, (plain, orthogonal) in zip(panels[0], pairs, strict=True):
            means = [[sum(c["accuracy"][n]) / len(c["accuracy"][n]) for n in (plain, orthogonal)] for c in grid]
            axes.plot([0, 100], [0, 100], "--", color="#555555", linewidth=1, zorder=0)
            axes.plot([x for x, _ in means], [y for _, y in means], "o", color=OURS)
            axes.set_xlabel(f"{plain}, test accuracy in %")
            axes.set_ylabel(f"{orthogonal}, test accuracy in %")
            axes.set_title("above the line: the orthogonal version is better")
    return figure


def save(figure: Figure, path: Path, *suffixes: str) -> None:
    """Writes a figure once for each suffix, without a date, and closes it.

    Args:
        figure: What to write.
        path: The file, whose suffix is replaced.
        suffixes: `.png`, `.svg`.
    """
    for suffix in suffixes:
        figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else {"Software": None})
    pyplot.close(figure)
