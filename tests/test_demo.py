"""`fastcurv demo`, shortened."""

import csv

import pytest
import torch

for name in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(name)

from fastcurv import cli, demo  # noqa: E402
from fastcurv.bench import harness  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Exit code, and folder of results."""
    out = tmp_path_factory.mktemp("demo") / "results"
    return cli.main(["demo", "--quick", "--out", str(out)]), out


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


PAIRS = [(demo.OURS, demo.FUSED), (demo.RANGER, demo.EAGER)]


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_the_demo_trains_as_others_do_and_says_so(quick, ours, other):
    code, out = quick
    assert code == 0
    losses = rows(out / "losses.csv")
    assert len(losses) >= demo.STEPS_COMPARED and set(losses[0]) == {"step", *demo.TRAINED}
    for row in losses[: demo.STEPS_COMPARED]:
        assert float(row[ours]) == pytest.approx(float(row[other]), rel=demo.LOSS_TOLERANCE)
    # One epoch; Ranger goes slowly at first.
    assert float(losses[-1][ours]) < (0.9 if ours == demo.RANGER else 0.5) * float(losses[0][ours])


def test_the_demo_writes_tables_and_plots(quick):
    _, out = quick
    names = {f"{name}.{suffix}" for name in ("losses", "steps") for suffix in ("csv", "png", "svg")}
    assert {path.name for path in out.iterdir()} == names
    assert all(path.stat().st_size for path in out.iterdir())
    steps = rows(out / "steps.csv")
    adamw, ranger = (
        ["fastcurv AdamW", "torch default", "torch foreach", "torch fused"],
        ["fastcurv Ranger", "eager Ranger"],
    )
    assert [row["optimizer"] for row in steps] == [*adamw, adamw[0], adamw[-1], *ranger, "torch AdamW"]
    baselines = {
        "AdamW, ResNet-50": "torch default",
        "AdamW, GPT-2 124M": "torch fused",
        "Ranger, ResNet-50": "eager Ranger",
    }
    assert list(dict.fromkeys(row["model"] for row in steps)) == list(baselines)
    for row in steps:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["speedup"] == ""  # a quick run proves nothing about speed
        assert row["over"] == baselines[row["model"]]


def test_everybody_in_the_step_times_computes_what_is_claimed():
    for case in demo.step_cases():
        for contender in case.contenders(harness.Options()):
            assert contender.verify() == "", contender.name


@pytest.mark.parametrize(("ours", "other"), PAIRS)
def test_a_run_that_differs_from_another_is_a_failure(ours, other):
    fused = demo.Trained([2.0 / step for step in range(1, 31)], 0.98)

    def compared(run):
        return demo.compare({**dict.fromkeys(demo.TRAINED, fused), ours: run})

    assert compared(demo.Trained([loss * (1 + 0.9e-5) for loss in fused.losses], 0.985)) == []
    early = demo.Trained([*fused.losses[:19], fused.losses[19] * (1 + 2e-5), *fused.losses[20:]], 0.98)
    assert f"in the first 20 steps the loss of {ours} differs from {other}" in compared(early)[0]
    late = demo.Trained([*fused.losses[:20], *(2 * loss for loss in fused.losses[20:])], 0.98)
    assert compared(late) == []
    assert f"the accuracy of {ours} is 96.0 %" in compared(demo.Trained(fused.losses, 0.96))[0]
    assert len(compared(demo.Trained([float("nan")] * 30, float("nan")))) == 2


def test_the_exit_code_is_that_of_the_comparison(monkeypatch, tmp_path, capsys):
    wrong = {**demo.TRAINED, demo.OURS: lambda params: torch.optim.AdamW(params, lr=2 * demo.LR)}
    monkeypatch.setattr(demo, "TRAINED", wrong)
    assert demo.run(tmp_path, quick=True) == 1
    assert "NOT AS EXPECTED: in the first 20 steps the loss of fastcurv AdamW differs" in capsys.readouterr().out


def test_one_seed_is_one_run():
    first, again, other = (demo.digits("cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[0].shape == (1437, 1, 8, 8) and first[2].shape == (360, 1, 8, 8)
    assert first[0].min() >= 0 and first[0].max() == 1
