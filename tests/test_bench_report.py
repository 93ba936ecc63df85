"""Results of benchmarks: how they are summed up, judged by the targets, kept, and reported."""

import collections
import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest
import torch

from fastcurv.bench import BENCHMARKS, report, results, targets
from fastcurv.bench.harness import Options
from fastcurv.bench.results import Result, Row
from fastcurv.bench.tables import chosen

ROOT = Path(__file__).parent.parent


def result(case="c", unfit="", **milliseconds):
    """A result of known times: 28 MB a step, a ceiling of 20 GB/s."""
    roles = {"ours": "fastcurv cpp", "fused": "torch fused", "foreach": "torch foreach", "peer": "a peer"}
    rows = [Row(roles[k], "ours" if k == "ours" else "peer" if k == "peer" else "torch") for k in milliseconds]
    empty = Result(case, f"work {case}", "torch fused", {"tensors": 1, "elements": 10**6, "bytes": 28 * 10**6}, rows)
    empty.unfit = unfit
    seconds = {"stream": 1.0, **{roles[k]: x / 1e3 for k, x in milliseconds.items()}}
    rounds = [{name: x * slower for name, x in seconds.items()} for slower in (0.5, 1.0, 1.0, 4.0)]
    return results.summarise(empty, rounds, {"stream": 20 * 10**9})


def test_medians_bandwidths_percentages_and_speedups():
    measured = result(ours=2.0, fused=3.0, peer=1.0)
    ours, fused = measured.rows[:2]
    assert (ours.median, fused.median, ours.rounds) == (2.0, 3.0, 4)
    assert ours.p20 == pytest.approx(1.6) and ours.p80 == pytest.approx(4.4)
    assert ours.rate == pytest.approx(14.0)
    assert measured.ceiling == pytest.approx(20.0) and ours.ceiling == pytest.approx(0.7)
    assert ours.speedup == pytest.approx(1.5) and fused.speedup == 1.0


def test_calls_of_one_round_are_compared():
    """The machine is slow in every second round; one of two equals has sat out a fast one, and one a slow one."""
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 4.0}, {"a": 1.0}, {"b": 4.0}]
    assert results.samples(rounds, "a") == [1.0, 2.0, 1.0]
    assert results.ratio(rounds, "b", "a") == 2.0 and results.ratio(rounds, "a", "b") == 0.5
    assert results.difference(rounds, "b", "a") == 1500.0
    assert results.ratio(rounds, "a", "c") is None and results.difference([{}], "a", "b") is None


def test_an_unfit_run_gives_times_and_no_speedups():
    measured = result(unfit="others used 1.00 of a core", ours=2.0, fused=3.0)
    assert all(row.rounds and row.speedup is None for row in measured.rows)
    text = results.table(measured)
    assert "no speed-up is given: others used 1.00 of a core" in text and "2.000" in text


def speedup_target(**changes):
    row = {
        "op": "adam",
        "case": "test",
        "device": "cpu",
        "work": "w",
        "measure": "speedup",
        "against": ("torch fused",),
    }
    return targets.Target(**{**row, "at_least": 1.5, **changes})


def test_every_target_names_a_case_and_what_it_is_compared_with():
    rows = targets.load()
    assert len({(row.op, row.case, row.device, row.measure, row.against) for row in rows}) == len(rows)
    for row in rows:
        assert (row.at_least is None) != (row.at_most is None)
        module = pytest.importorskip(f"fastcurv.bench.bench_{row.op}")
        case = next(case for case in module.CASES if case.name == row.case)
        assert {"cpu": "cpu", "gpu": "cuda"}[row.device] in case.devices
        everybody = Options(peers=True, compile=True)
        names = {contender.name for contender in case.contenders(everybody)}
        assert bool(row.against) == (row.measure in ("speedup", "time", "dispatch"))
        # Those of other libraries that are not installed are not there.
        assert all(name in names or name.startswith(("torch-optimi", "pytorch_optimizer")) for name in row.against)
        assert row.measure != "ceiling" or case.has_ceiling


def test_judgement_of_targets():
    def status(target, **by_device):
        return targets.judge([target], by_device)[0].status

    measured = dataclasses.replace(result(case="test", ours=2.0, fused=3.0), overhead=0.3)
    assert status(speedup_target(), cpu=[measured]) == "holds"
    assert status(speedup_target(at_least=1.51), cpu=[measured]) == "does not hold"
    assert status(speedup_target(measure="ceiling", against=(), at_least=0.71), cpu=[measured]) == "does not hold"
    assert status(speedup_target(measure="overhead", against=(), at_least=None, at_most=0.3), cpu=[measured]) == "holds"
    assert status(speedup_target(device="gpu"), cpu=[measured]) == "not yet measured on a GPU"
    assert status(speedup_target(case="other"), cpu=[measured]) == "not measured"
    assert status(speedup_target(against=("torch foreach",)), cpu=[measured]).startswith("not measured")
    contended = result(case="test", unfit="busy", ours=2.0, fused=3.0)
    assert status(speedup_target(), cpu=[contended]) == "not measured: busy"
    on_gpu = result(case="test", ours=2.0, fused=3.0)
    on_gpu.rows[0].extra, on_gpu.rows[1].extra = {"launches": 1.0, "dispatch": 0.2}, {"launches": 2.0, "dispatch": 0.1}
    assert status(speedup_target(measure="launches", against=(), at_least=None, at_most=1), cpu=[on_gpu]) == "holds"
    verdict = targets.judge([speedup_target(measure="dispatch", at_least=None, at_most=1.0)], {"cpu": [on_gpu]})[0]
    assert verdict.figure == 2.0 and verdict.status == "does not hold"
    assert "2 x the dispatch time of torch fused: does not hold" in targets.table([verdict])


def test_the_fastest_of_several_counts():
    measured = result(case="test", ours=2.0, fused=6.0, foreach=5.0, peer=1.0)
    both = ("torch fused", "torch foreach")

    def judged(**changes):
        return targets.judge([speedup_target(**changes)], {"cpu": [measured]})[0]

    assert judged(against=both, at_least=2.5).figure == pytest.approx(2.5)
    assert judged(measure="time", against=both, at_least=None, at_most=0.4).status == "holds"
    assert judged(against=both).target.wanted() == ">= 1.5 x the fastest of torch fused, torch foreach"
    assert judged(against=(*both, "torch compile")).status == "not measured: torch compile took no part"
    measured.rows.append(Row("torch compile", "torch", note="not measured: needs memory"))
    assert judged(against=(*both, "torch compile")).figure is None
    measured.rows[-1].note = "does not run: RuntimeError"
    assert judged(against=(*both, "torch compile")).figure == pytest.approx(2.5)
    assert judged(against=("torch compile",)).figure is None


def test_results_survive_a_file(tmp_path):
    measured = [result(ours=2.0, fused=3.0), result(case="d", unfit="busy", ours=1.0)]
    measured[0].rows.append(Row("absent", "peer", note="not measured: needs memory"))
    results.store(tmp_path / "adam-cpu.json", "adam", "cpu", measured)
    about, found = results.load(tmp_path / "adam-cpu.json")
    results.store(tmp_path / "again.json", "adam", "cpu", found)
    assert results.load(tmp_path / "again.json") == (about, found)
    assert [(r.case, r.unfit, [row.name for row in r.rows]) for r in found] == [
        (r.case, r.unfit, [row.name for row in r.rows]) for r in measured
    ]
    assert found[0].rows[0].speedup == pytest.approx(measured[0].rows[0].speedup, rel=1e-5) == pytest.approx(1.5)
    assert found[0].rows[2] == measured[0].rows[2] and found[1].rows[0].speedup is None
    assert about["versions"]["torch"] == torch.__version__
    assert about["cores"] >= 1 and about["date"] and about["processor"]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n\n{report.BEGIN}\nstale\n{report.END}\n\nafter\n")
    return tmp_path


def tables(checkout):
    return (checkout / "docs" / "benchmarks.md").read_text()


def test_every_benchmark_has_a_family():
    assert sorted(op for ops in report.FAMILIES.values() for op in ops) == list(BENCHMARKS)


def test_readme_shows_known_cases_and_at_most_ten_to_a_device():
    per_device = collections.Counter()
    for choice in targets.choices():
        module = pytest.importorskip(f"fastcurv.bench.bench_{choice.op}")
        per_device.update(next(case for case in module.CASES if case.name == choice.case).devices)
    assert 0 < max(per_device.values()) <= 10


def test_readme_shows_a_case_that_we_lose():
    """As long as there is one in the results."""
    measured = report.collect(ROOT / "bench" / "results")
    for device in report.DEVICES:
        results = [result for by_device in measured.values() if device in by_device for result in by_device[device][1]]
        if any(other.relative < 1 for result in results for other in result.comparable()):
            assert any(line.speedup < 1 for line in chosen(measured, device))


def test_the_fastest_that_may_be_compared_comes_first():
    measured = result(ours=2.0, fused=3.0, foreach=4.0, peer=1.0)
    assert [row.name for row in measured.comparable()] == ["a peer", "torch fused", "torch foreach"]
    measured.rows[3].wrong = "off by 1"
    measured.rows[1].note = "its state is bfloat16"
    assert [row.name for row in measured.comparable()] == ["torch foreach"]
    assert result(unfit="busy", ours=2.0, fused=3.0).comparable() == []


@pytest.mark.parametrize(("value", "text"), [(0.2459, "0.246"), (13.76, "13.8"), (99.96, "100"), (1234.5, "1,234")])
def test_digits_of_a_time(value, text):
    assert results.digits(value) == text


def test_report_says_what_the_results_say_and_nothing_else(checkout, capsys):
    pytest.importorskip("matplotlib")
    root = ["--root", str(checkout)]
    fast, slow = result(case="c", ours=2.0, fused=3.0, peer=1.0), result(case="1x50M", ours=4.0, fused=3.0)
    path = checkout / "bench" / "results" / "adam-cpu.json"
    results.store(path, "adam", "cpu", [fast, slow])
    assert report.main([*root, "--check"]) == 1
    assert report.main(root) == 0
    written = {p: p.read_bytes() for p in [checkout / "README.md", *(checkout / "docs").iterdir()]}
    names = {f"benchmarks-{name}.{suffix}" for name in ("cpu", "updates-cpu") for suffix in ("png", "svg")}
    assert {path.name for path in written} == {"README.md", "benchmarks.md", *names}

    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| Adam, one tensor of 50M | 4 | torch fused 3 | 0.75 (slower) |" in text and "work c" not in text
    assert "![Speed-up over the fastest other implementation](docs/benchmarks-cpu.png)" in text

    text = tables(checkout)
    assert "| work c | 1 | 1,000,000 | 2 | 3 | 1 | 70 | **1.50** |" in text
    slower = "than a peer on work c (2 ms against 1); than torch fused on work 1x50M (4 ms against 3)."
    assert f"fastcurv is slower {slower}" in text
    assert "| CPU | Adam, one tensor of 50M | >= 0.95 x torch fused | 0.75 x torch fused | does not hold |" in text
    assert text.count("not yet measured on a GPU") == sum(row.device == "gpu" for row in targets.load())
    # Tables without rows are left out.
    assert "Targets of `lookahead`" not in text and "Targets of `adam`" in text

    assert report.main(root) == 0 and report.main([*root, "--check"]) == 0
    assert {path: path.read_bytes() for path in written} == written

    for stale in ("README.md", "docs/benchmarks.md"):
        (checkout / stale).write_text(f"{report.BEGIN}\n{report.END}\n")
        capsys.readouterr()
        assert report.main([*root, "--check"]) == 1
        assert capsys.readouterr().err == f"{checkout / stale} is out of date: run `python -m fastcurv.bench.report`\n"
        report.main(root)

    path.unlink()
    assert report.main([*root, "--check"]) == 1
    report.main(root)
    assert "**1.50**" not in tables(checkout)


def test_a_gpu_has_its_table_and_pictures_beside_those_of_the_cpu(checkout):
    pytest.importorskip("matplotlib")
    folder = checkout / "bench" / "results"
    results.store(folder / "adam-cpu.json", "adam", "cpu", [result(case="resnet50", ours=4.0, fused=3.0)])
    document = json.loads((folder / "adam-cpu.json").read_text())
    document.update(device="cuda", gpu="a fast GPU")
    (folder / "adam-gpu.json").write_text(json.dumps(document))
    assert report.main(["--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert text.count("| Adam, ResNet-50 | 4 | torch fused 3 |") == 2 and "Medians on a fast GPU (processor: " in text
    assert "docs/benchmarks-gpu.png" in text and "(benchmarks-updates-gpu.png)" in tables(checkout)
    assert "### `adam` on the GPU" in tables(checkout) and (checkout / "docs/benchmarks-updates-gpu.png").exists()


def test_pictures_of_all_results_fit_a_screen_or_two(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(report.collect(ROOT / "bench" / "results"), tmp_path)
    sizes = {path.stem: struct.unpack(">II", path.read_bytes()[16:24]) for path in tmp_path.glob("*.png")}
    assert len(sizes) == 1 + len(report.FAMILIES) or any(name.endswith("gpu") for name in sizes)
    for name, (width, height) in sizes.items():
        assert width <= 1200 and height <= (700 if name in ("benchmarks-cpu", "benchmarks-gpu") else 1800), name


def test_all_contenders_of_a_picture_look_different():
    plots = pytest.importorskip("fastcurv.bench.plots", exc_type=ImportError)
    assert math.gcd(len(plots.COLORS), len(plots.MARKERS)) == 1
    assert len(set(plots.COLORS)) == len(plots.COLORS) and len(set(plots.MARKERS)) == len(plots.MARKERS)


def test_cases_with_different_baselines_are_in_tables_of_their_own(checkout):
    pytest.importorskip("matplotlib")
    with_fused, without = result(case="c", ours=2.0, fused=3.0), result(case="d", ours=2.0, foreach=3.0, peer=1.0)
    without.baseline, without.rows[2].computes, without.rows[2].role = "torch foreach", "Adam", "yardstick"
    for row, speedup in zip(without.rows, (1.5, 1.0, 3.0), strict=True):
        row.speedup = speedup
    for op in ("adam", "ranger"):
        results.store(checkout / f"bench/results/{op}-cpu.json", op, "cpu", [with_fused, without])
    assert report.main(["--root", str(checkout)]) == 0
    text = tables(checkout)
    assert "| work | tensors | parameters | fastcurv cpp | torch fused | % of ceiling | x torch fused |" in text
    assert (
        "| work | tensors | parameters | fastcurv cpp | a peer | torch foreach | % of ceiling | x torch foreach |"
        in text
    )
    assert "a peer computes Adam." in text and "No other implementation is faster" in text
    assert text.count("Median time of a whole `opt.step()`") == text.count("Load average") == 2


def test_a_contender_that_computes_something_else_is_named(checkout):
    pytest.importorskip("matplotlib")
    wrong = result(case="c", ours=2.0, fused=3.0, peer=1.0)
    peer = wrong.rows[-1]
    peer.wrong, peer.speedup = "off by 1 after 13 steps, 1e-06 allowed", None
    results.store(checkout / "bench/results/adam-cpu.json", "adam", "cpu", [wrong])
    assert report.main(["--root", str(checkout)]) == 0
    assert "a peer on work c is off by 1 after 13 steps, 1e-06 allowed." in tables(checkout)


def test_report_makes_a_readme_where_there_is_none(tmp_path):
    assert report.main(["--root", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text().startswith(report.BEGIN)


def test_report_gives_no_speedup_of_an_unfit_run(checkout):
    results.store(checkout / "bench/results/adam-cpu.json", "adam", "cpu", [result(unfit="busy", ours=2.0, fused=3.0)])
    pytest.importorskip("matplotlib")
    report.main(["--root", str(checkout)])
    text = tables(checkout)
    assert "No speed-up is given for work c: busy." in text
    assert "| work c | 1 | 1,000,000 | 2 | 3 |  |  |" in text
