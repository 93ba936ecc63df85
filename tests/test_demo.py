"""`fastcurv demo`, shortened."""

import csv

import pytest
import torch

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name)

from fastcurv import cli, demo  # noqa: E402


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Exit code, and folder of results."""
    out = tmp_path_factory.mktemp("demo") / "results"
    return cli.main(["demo", "--short", "--out", str(out)]), out


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_demo_trains_as_torch_does_and_says_so(short):
    code, out = short
    assert code == 0
    losses = rows(out / "losses.csv")
    assert len(losses) >= demo.STEPS_COMPARED and set(losses[0]) == {"step", *demo.TRAINED}
    for row in losses[: demo.STEPS_COMPARED]:
        assert float(row["fastcurv"]) == pytest.approx(float(row["torch fused"]), rel=demo.LOSS_TOLERANCE)
    assert float(losses[-1]["fastcurv"]) < 0.5 * float(losses[0]["fastcurv"])


def test_the_demo_writes_tables_and_plots(short):
    _, out = short
    names = {f"{name}.{suffix}" for name in ("losses", "steps") for suffix in ("csv", "png", "svg")}
    assert {path.name for path in out.iterdir()} == names
    assert all(path.stat().st_size for path in out.iterdir())
    steps = rows(out / "steps.csv")
    assert [row["optimizer"] for row in steps] == ["fastcurv", "torch default", "torch foreach", "torch fused"] * 2
    assert {row["model"] for row in steps} == {"ResNet-50", "GPT-2 124M"}
    for row in steps:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["speedup_over_torch_default"] == ""  # a short run proves nothing about speed


def test_a_run_that_differs_from_torch_is_a_failure():
    fused = demo.Trained([2.0 / step for step in range(1, 31)], 0.98)
    same = demo.Trained([loss * (1 + 0.9e-5) for loss in fused.losses], 0.985)
    assert demo.compare({"fastcurv": same, "torch fused": fused}) == []
    early = demo.Trained([*fused.losses[:19], fused.losses[19] * (1 + 2e-5), *fused.losses[20:]], 0.98)
    assert "in the first 20 steps" in demo.compare({"fastcurv": early, "torch fused": fused})[0]
    late = demo.Trained([*fused.losses[:20], *(2 * loss for loss in fused.losses[20:])], 0.98)
    assert demo.compare({"fastcurv": late, "torch fused": fused}) == []
    worse = demo.Trained(fused.losses, 0.96)
    assert "the accuracy is 96.0 %" in demo.compare({"fastcurv": worse, "torch fused": fused})[0]
    nan = demo.Trained([float("nan")] * 30, float("nan"))
    assert len(demo.compare({"fastcurv": nan, "torch fused": fused})) == 2


def test_the_exit_code_is_that_of_the_comparison(monkeypatch, tmp_path, capsys):
    wrong = {**demo.TRAINED, "fastcurv": lambda params: torch.optim.AdamW(params, lr=2 * demo.LR)}
    monkeypatch.setattr(demo, "TRAINED", wrong)
    assert demo.run(tmp_path, short=True) == 1
    assert "NOT AS EXPECTED: in the first 20 steps the loss differs" in capsys.readouterr().out


def test_one_seed_is_one_run():
    first, again, other = (demo.digits("cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[0].shape == (1437, 1, 8, 8) and first[2].shape == (360, 1, 8, 8)
    assert first[0].min() >= 0 and first[0].max() == 1
