"""README's table, docs/benchmarks.md and the pictures in docs/, from the files in bench/results and nothing else.

`python -m fastcurv.bench.report`, in the root of a checkout; `--check` writes nothing and exits with 1 if README.md or
docs/benchmarks.md does not say what the results say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcurv.cli import program

from . import tables, targets
from .results import Result, load
from .tables import Measured

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FAMILIES = {
    "updates": ("adam", "sgd", "ranger", "lookahead", "nero", "lars", "lamb"),
    "orthogonal": ("orthogonalize",),
    "kronecker": ("kron_factor", "kron_inverse", "kron_root", "kron_apply"),
}
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
INTRODUCTION = """# Benchmarks

`python -m fastcurv.bench.report` writes this page from `bench/results/`. Contenders run in one process, interleaved,
after the correctness cases of the op have passed. A speed-up is the median over rounds of calls that followed each
other: it need not be the quotient of two medians. [performance.md](performance.md) explains the figures."""


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        1 if a file was to be checked and is out of date, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("."), help="of the checkout")
    parser.add_argument("--check", action="store_true", help="only say which files are out of date")
    options = parser.parse_args(argv)
    readme, docs = options.root / "README.md", options.root / "docs"
    measured = collect(options.root / "bench" / "results")
    texts = {readme: insert(_text(readme), front(measured)), docs / "benchmarks.md": page(measured)}
    if options.check:
        stale = [path for path, text in texts.items() if _text(path) != text]
        for path in stale:
            print(f"{path} is out of date: run `python -m fastcurv.bench.report`", file=sys.stderr)
        return int(bool(stale))
    docs.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text)
    draw(measured, docs)
    return 0


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


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


def front(measured: Measured) -> str:
    """README's part: for each device that was measured, a picture and the table it shows."""
    parts = []
    for device in DEVICES:
        if lines := tables.chosen(measured, device):
            parts += [_picture("Speed-up over the fastest other implementation", f"docs/benchmarks-{device}")]
            parts += [tables.summary(lines)]
    return "\n\n".join(parts)


def page(measured: Measured) -> str:
    """docs/benchmarks.md: a picture of each family, and for each op the tables of times and of promises."""
    rows = targets.load()
    parts = [INTRODUCTION]
    for family, ops in FAMILIES.items():
        parts.append(f"## {family}")
        for device in _drawn(measured, ops):
            text = f"Times of {family} relative to fastcurv on the {DEVICES[device]}"
            parts.append(_picture(text, f"benchmarks-{family}-{device}"))
        for op in ops:
            by_device = measured.get(op, {})
            for device, (about, results) in by_device.items():
                parts += [f"### `{op}` on the {DEVICES[device]}", tables.machine_line(about, op)]
                parts += tables.times(about, results)
            promised = [row for row in rows if row.op == op]
            if promised:
                verdicts = targets.judge(promised, {device: results for device, (_, results) in by_device.items()})
                parts += [f"Targets of `{op}` (bench/targets.toml):", tables.promises(verdicts)]
    return "\n\n".join(parts) + "\n"


def _picture(text: str, path: str) -> str:
    """A picture that leads to its drawing without pixels."""
    return f"[![{text}]({path}.png)]({path}.svg)"


def draw(measured: Measured, folder: Path) -> None:
    """Writes the pictures of README and of docs/benchmarks.md.

    Args:
        measured: What `collect` found.
        folder: An existing folder.
    """
    if not measured:
        return
    from . import plots

    for device in DEVICES:
        if lines := tables.chosen(measured, device):
            family_of = {op: family for family, ops in FAMILIES.items() for op in ops}
            groups: dict[str, list[tables.Line]] = {}
            for line in lines:
                groups.setdefault(family_of[line.op], []).append(line)
            figure = plots.speedups(groups, _machine(lines[0].about))
            plots.save(figure, folder / f"benchmarks-{device}", ".png", ".svg")
    for family, ops in FAMILIES.items():
        for device, by_op in _drawn(measured, ops).items():
            about = next(measured[op][device][0] for op in by_op)
            figure = plots.relative_times(by_op, f"{family} on {_machine(about)}")
            plots.save(figure, folder / f"benchmarks-{family}-{device}", ".png", ".svg")


def _machine(about: dict[str, Any]) -> str:
    where = about["gpu"] if about["device"] == "cuda" else f"{about['processor']}, {about['threads']} threads"
    return f"{where}, torch {about['versions']['torch']}"


def _drawn(measured: Measured, ops: Sequence[str]) -> dict[str, dict[str, list[Result]]]:
    """Results that can be compared with another implementation, by device and op."""
    found: dict[str, dict[str, list[Result]]] = {}
    for device in DEVICES:
        for op in ops:
            _, results = measured.get(op, {}).get(device, ({}, []))
            if comparable := [result for result in results if result.comparable()]:
                found.setdefault(device, {})[op] = comparable
    return found


if __name__ == "__main__":
    sys.exit(main())
