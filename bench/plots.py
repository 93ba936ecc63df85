"""Pictures of the results and of the demo; needs matplotlib (`pip install 'fastcurv[bench]'`)."""

from __future__ import annotations

import itertools
import math
import textwrap
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
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

from .results import Result, Row, digits  # noqa: E402
from .tables import Line  # noqa: E402

OURS, SLOWER, OTHER = "#0b6e99", "#d1495b", "#b9c2cf"
# Other contenders take these in the order in which a picture meets them. Ten and eleven: no pair comes twice in 110.
COLORS = ("#d1495b", "#c77d00", "#5c6779", "#6a4c93", "#3d8b40", "#a3662f", "#c0519b", "#1b1b1e", "#2a9d8f", "#577590")
MARKERS = "DsvP^X<p*>h"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}


def speedups(groups: Mapping[str, Sequence[Line]], machine: str) -> Figure:
    """Speed-ups over the fastest other implementation: one bar to a case, which starts at 1.

    Args:
        groups: Lines of README by family.
        machine: What they were measured on.
    """
    lines = [line for group in groups.values() for line in group]
    with matplotlib.rc_context({**STYLE, "font.size": 12, "axes.titlesize": 12}):
        figure, panels = pyplot.subplots(
            len(groups),
            1,
            figsize=(8, 4.6),
            layout="constrained",
            squeeze=False,
            sharex=True,
            height_ratios=[len(group) + 0.3 for group in groups.values()],
        )
        for axes, (family, group) in zip(panels[:, 0], groups.items(), strict=True):
            for position, line in enumerate(group):
                slower = line.speedup < 1
                axes.barh(
                    position,
                    line.speedup - 1,
                    left=1,
                    color="white" if slower else OURS,
                    edgecolor=SLOWER if slower else OURS,
                    hatch="////" if slower else "",
                )
                axes.annotate(
                    f"{line.speedup:.2f}",
                    (line.speedup, position),
                    (-5 if slower else 5, 0),
                    textcoords="offset points",
                    ha="right" if slower else "left",
                    va="center",
                )
                name = line.other.name + (" *" if line.other.computes else "")
                axes.text(1.02, position, name, transform=axes.get_yaxis_transform(), va="center")
            axes.set_title(family, fontweight="bold", x=0, ha="right")
            axes.set_yticks(range(len(group)), [line.work for line in group])
            axes.set_ylim(len(group) - 0.5, -0.5)
            axes.tick_params(axis="both", length=0)
            axes.axvline(1, color="#1b1b1e", linewidth=1)
            axes.spines["left"].set_visible(False)
            axes.spines["bottom"].set_visible(axes is panels[-1, 0])
        heading = {"transform": panels[0, 0].get_yaxis_transform(), "fontweight": "bold"}
        panels[0, 0].text(1.02, -0.75, "fastest other", **heading)
        _times_axis(axes)
        # Room for the figures beyond the ends of the bars.
        fastest, slowest = max(line.speedup for line in lines), min(line.speedup for line in lines)
        axes.set_xlim(0.6 * min(1, slowest), 1.6 * max(1, fastest))
        remark = "; *: computes something else" if any(line.other.computes for line in lines) else ""
        axes.set_xlabel(f"times as fast; hatched: slower{remark}")
        figure.suptitle(f"fastcurv and the fastest other implementation on\n{machine}", fontsize=12)
    return figure


def _times_axis(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def relative_times(groups: Mapping[str, Sequence[Result]], title: str) -> Figure:
    """Times relative to ours, one line of marks to a case; our own reference is left out.

    Args:
        groups: Results that can be compared, by op; each has a panel.
        title: Of the picture.
    """
    results = [result for group in groups.values() for result in group]
    names = dict.fromkeys(row.name for result in results for row in _others(result))
    marks = dict(zip(names, zip(itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False), strict=False))
    legend: dict[str, Any] = {"fastcurv": _key(OURS, "o")}
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(groups),
            1,
            figsize=(8, 1.6 + 0.3 * len(groups) + 0.27 * len(results)),
            layout="constrained",
            squeeze=False,
            sharex=True,
            height_ratios=[len(group) + 0.3 for group in groups.values()],
        )
        for axes, (op, group) in zip(panels[:, 0], groups.items(), strict=True):
            axes.set_title(op, fontweight="bold", x=0, ha="right")
            for position, result in enumerate(group):
                _relative_line(axes, position, result, marks, legend)
            axes.axvline(1, color=OURS, linewidth=1, zorder=1)
            axes.set_yticks(range(len(group)), [result.work for result in group])
            axes.set_ylim(len(group) - 0.5, -0.5)
            axes.tick_params(axis="both", length=0)
            axes.spines["bottom"].set_visible(axes is panels[-1, 0])
        _times_axis(axes)
        axes.set_xlabel("time relative to fastcurv")
        figure.suptitle(
            f"{title}\nright of the line: slower than fastcurv; bars: p20 to p80; hollow: computes something else\n"
            "figures on the right: speed-up over the fastest implementation that is not ours",
            fontsize=9,
        )
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _others(result: Result) -> list[Row]:
    fit = [row for row in result.rows if row.relative and not (row.note or row.wrong)]
    return [row for row in fit if row is not result.ours() and row.role != "reference"]


def _relative_line(
    axes: Any, position: int, result: Result, marks: Mapping[str, tuple[str, str]], legend: dict[str, Any]
) -> None:
    axes.axhline(position, color="#efefef", linewidth=7, zorder=0)
    ours = result.ours()
    assert ours is not None
    for row in [*_others(result), ours]:
        at = row.relative or 1.0
        color, marker = (OURS, "o") if row is ours else marks[row.name]
        axes.plot(
            [at * row.p20 / row.median, at * row.p80 / row.median], [position] * 2, color=color, linewidth=1, alpha=0.6
        )
        fill = "white" if row.computes else color
        axes.plot(at, position, marker, color=color, markerfacecolor=fill, markersize=6, zorder=3)
        if row is not ours:
            legend.setdefault(row.name, _key(color, marker))
    speedup = f"{result.comparable()[0].relative:.2f}"
    axes.text(1.01, position, speedup, transform=axes.get_yaxis_transform(), va="center", fontsize=8)


def _key(color: str, marker: str) -> Any:
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=6)


def step_times(results: Sequence[Result]) -> Figure:
    """Step times in milliseconds, one panel to a case."""
    measured = [[row for row in result.rows if row.rounds] for result in results]
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(results),
            1,
            figsize=(7, 0.5 + sum(0.55 + 0.27 * len(rows) for rows in measured)),
            layout="constrained",
            squeeze=False,
            height_ratios=[len(rows) for rows in measured],
        )
        for axes, result, rows in zip(panels[:, 0], results, measured, strict=True):
            shades = [OURS if row.role == "ours" else OTHER for row in rows]
            bars = axes.barh([row.name for row in rows], [row.median for row in rows], color=shades)
            axes.bar_label(bars, [f"{digits(row.median)} ms" for row in rows], padding=4)
            axes.margins(x=0.15)
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            unfit = textwrap.wrap(f"no speed-up is given: {result.unfit}", 70) if result.unfit else []
            axes.set_title("\n".join([result.work, *unfit]), fontsize=9)
        panels[-1, 0].set_xlabel("median time of opt.step() in ms")
    return figure


def losses(curves: Mapping[str, Sequence[float]], yardsticks: Mapping[str, str], limit: float, steps: int) -> Figure:
    """Loss against step, and how far curves are from others.

    Args:
        curves: Losses by optimizer.
        yardsticks: By name of a curve, that of the curve its difference is taken from.
        limit: The relative difference that is allowed.
        steps: During how many steps it is.
    """
    shades = dict(zip(curves, COLORS, strict=False))
    marks = dict(zip(yardsticks, ("x", "o", "v"), strict=False))
    dashes = dict(zip(yardsticks, ("--", "-", ":"), strict=False))
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5.4), layout="constrained", sharex=True)
        for name, values in curves.items():
            # Those that differences are taken from are wider, or the others would hide them: they coincide.
            width, order, alpha = (1.5, 3, 1.0) if name in yardsticks else (5, 2, 0.4)
            above.plot(
                range(1, len(values) + 1),
                values,
                dashes.get(name, "-"),
                label=name,
                color=shades[name],
                linewidth=width,
                zorder=order,
                alpha=alpha,
            )
        above.set_ylabel("training loss")
        above.set_title("The same network, data and seed")
        for name, other in yardsticks.items():
            # Equal losses have no place on a logarithmic axis.
            apart = [abs(a - b) / abs(b) or math.nan for a, b in zip(curves[name], curves[other], strict=True)]
            label = f"{name}\nfrom {other}"
            below.plot(range(1, len(apart) + 1), apart, marks[name], label=label, color=shades[name], markersize=3)
        below.plot([1, steps], [limit] * 2, "--", color="#555555", label=f"allowed in the\nfirst {steps} steps")
        below.set_ylabel("relative difference")
        below.set_xlabel("step")
        below.set_title("Differences of the losses; equal losses have no point")
        above.set_yscale("log")
        # Losses of a short run lie within one power of ten.
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        above.yaxis.set_minor_locator(NullLocator())
        below.set_yscale("log")
        for axes in (above, below):
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def against_plain(grid: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> Figure:
    """Mean accuracy of orthogonal versions over that of plain ones, a point to a cell.

    Args:
        grid: Cells with `accuracy`: percentages over seeds by the name of the optimizer.
        pairs: Names of a plain optimizer and its orthogonal version.
    """
    with matplotlib.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(pairs), figsize=(4 * len(pairs), 4.1), layout="constrained", squeeze=False
        )
        for axes, (plain, orthogonal) in zip(panels[0], pairs, strict=True):
            means = [[sum(c["accuracy"][n]) / len(c["accuracy"][n]) for n in (plain, orthogonal)] for c in grid]
            axes.plot([0, 100], [0, 100], "--", color="#555555", linewidth=1, zorder=0)
            axes.plot([x for x, _ in means], [y for _, y in means], "o", color=OURS, alpha=0.5)
            axes.set_box_aspect(1)
            axes.set_xlabel(f"{plain}, test accuracy in %")
            axes.set_ylabel(f"{orthogonal}, test accuracy in %")
        figure.suptitle("A point is a cell of the grid: above the line, the orthogonal version is better", fontsize=10)
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
