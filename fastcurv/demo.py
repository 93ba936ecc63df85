"""`fastcurv demo`: the same training runs as with torch.optim and with an eager Ranger, and the steps beside theirs."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import fastcurv
from fastcurv.bench import clocks, harness, models, plots, truths
from fastcurv.bench.stepping import Implementation, StepCase

EPOCHS, QUICK_EPOCHS, BATCH, TEST_IMAGES = 16, 1, 64, 360
LR, WEIGHT_DECAY = 2e-3, 1e-2
# Two implementations of one optimizer round differently, and training amplifies it: later steps prove nothing.
STEPS_COMPARED, LOSS_TOLERANCE, ACCURACY_TOLERANCE = 20, 1e-5, 0.01

Make = Callable[[Any], Optimizer]
OURS, FOREACH, FUSED = "fastcurv AdamW", "torch foreach", "torch fused"
RANGER, EAGER = "fastcurv Ranger", "eager Ranger"
TRAINED: dict[str, Make] = {
    FOREACH: lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, foreach=True),
    FUSED: lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True),
    OURS: lambda params: fastcurv.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY),
    EAGER: lambda params: truths.Ranger(params, lr=LR),
    RANGER: lambda params: fastcurv.Ranger(params, lr=LR),
}
# By run: the run that it must not differ from, or is only compared with.
YARDSTICKS = {FOREACH: FUSED, OURS: FUSED, RANGER: EAGER}


@dataclasses.dataclass
class Trained:
    """A training run: the loss of every step, and the share of unseen images classified rightly."""

    losses: list[float]
    accuracy: float


def digits(device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, shuffled and split.

    Args:
        device: Where to put them.
        seed: Of the split.

    Returns:
        Training images (n, 1, 8, 8) and labels, test images and labels.
    """
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.as_tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].to(device), labels[order].to(device)
    return images[:-TEST_IMAGES], labels[:-TEST_IMAGES], images[-TEST_IMAGES:], labels[-TEST_IMAGES:]


def network() -> nn.Module:
    """Two convolutions with batch normalisation, and a linear classifier."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def train(name: str, make: Make, device: str, seed: int, epochs: int) -> Trained:
    """Trains the network from a seed, with a progress bar.

    Args:
        name: Of the optimizer, for the bar.
        make: The optimizer for the parameters.
        device: Where to train.
        seed: Of the initial weights, the split and the order of the images.
        epochs: Passes over the training images.
    """
    images, labels, test_images, test_labels = digits(device, seed)
    torch.manual_seed(seed)
    model = network().to(device)
    optimizer = make(model.parameters())
    batches = list(_batches(len(labels), epochs, seed))
    losses = []
    with tqdm(batches, desc=f"{name:16}", unit="step") as bar:
        for batch in bar:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    model.eval()
    with torch.no_grad():
        right = model(test_images).argmax(1) == test_labels
    return Trained(losses, float(right.float().mean()))


def _batches(images: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(images, generator=generator).split(BATCH)


def apart(a: Sequence[float], b: Sequence[float], steps: int) -> float:
    """The largest relative difference of two lists of losses over the first steps."""
    return max(abs(x - y) / abs(y) for x, y in zip(a[:steps], b[:steps], strict=True))


def step_cases() -> list[StepCase]:
    """The step of AdamW on the parameter lists of two models and that of Ranger on one, by all who compute it here."""

    def adamw(**options: Any) -> Callable[[list[nn.Parameter], float], Optimizer]:
        return lambda params, lr: torch.optim.AdamW(params, lr=lr, **options)

    default = Implementation("torch default", "torch", adamw(), state_bytes=8)
    of_adamw = [
        Implementation(OURS, "ours", lambda params, lr: fastcurv.AdamW(params, lr=lr), state_bytes=8),
        default,
        Implementation(FOREACH, "torch", adamw(foreach=True), state_bytes=8),
        Implementation(FUSED, "torch", adamw(fused=True), state_bytes=8),
    ]
    of_ranger = [
        Implementation(RANGER, "ours", lambda params, lr: fastcurv.Ranger(params, lr=lr), state_bytes=12),
        Implementation(EAGER, "torch", truths.Ranger, state_bytes=12),
        dataclasses.replace(default, name="torch AdamW", computes="AdamW", truth=adamw(foreach=False)),
    ]
    step = functools.partial(
        StepCase,
        "adam",
        truth=adamw(foreach=False),
        bytes_per_element=28,
    )
    ranger = StepCase(
        "ranger",
        "ranger-resnet50",
        "Ranger, ResNet-50",
        shapes=models.resnet50,
        implementations=lambda options, dtype: of_ranger,
        truth=truths.Ranger,
        bytes_per_element=28 + 8 / 6,
        baseline=EAGER,
        period=6,
    )
    return [
        step(
            "resnet50",
            "AdamW, ResNet-50",
            shapes=models.resnet50,
            implementations=lambda options, dtype: of_adamw,
            baseline="torch default",
        ),
        # Beside torch's fastest only: a step of the others takes half a second, and a measurement many of them.
        step(
            "gpt2",
            "AdamW, GPT-2 124M",
            shapes=models.gpt2,
            implementations=lambda options, dtype: [of_adamw[0], of_adamw[-1]],
            baseline=FUSED,
        ),
        ranger,
    ]


def run(out: Path, seed: int = 0, quick: bool = False) -> int:
    """Trains, measures, writes tables and plots, and prints a summary.

    Args:
        out: Folder for the results; created where it is missing.
        seed: Of the training runs.
        quick: A few steps, and small lists: to see that everything runs.

    Returns:
        0 if fastcurv trained as torch and the eager Ranger do, 1 if not.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    print(f"Handwritten digits, a small convolutional network, AdamW and Ranger on {device}, seed {seed}:", flush=True)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        trained = {
            name: train(name, make, device, seed, QUICK_EPOCHS if quick else EPOCHS) for name, make in TRAINED.items()
        }
    complaints = compare(trained)

    print("\nOne optimizer step over the parameter lists of real models:", flush=True)
    cases = step_cases()
    options = harness.Options(device, quick=quick)
    measured = []
    # The load average still remembers the installation and the training; what others do meanwhile is watched anyway.
    runs = harness.run_all(cases, options, clocks.clock(device), start_load=0.0)
    for result in tqdm(runs, total=len(cases), unit="model"):
        measured.append(result)

    write(out, trained, measured)
    print()
    print(summary(trained, measured))
    for complaint in complaints:
        print(f"NOT AS EXPECTED: {complaint}")
    print(f"\nTables and plots are in {out.resolve()}")
    return 1 if complaints else 0


def compare(trained: dict[str, Trained]) -> list[str]:
    """What is wrong with the runs of fastcurv beside those they must not differ from; empty when nothing is."""
    complaints = []
    for name in (OURS, RANGER):
        ours, yardstick, other = trained[name], trained[YARDSTICKS[name]], YARDSTICKS[name]
        difference = apart(ours.losses, yardstick.losses, STEPS_COMPARED)
        if not difference <= LOSS_TOLERANCE:
            complaints.append(
                f"in the first {STEPS_COMPARED} steps the loss of {name} differs from {other} by {difference:.1e}, "
                f"more than {LOSS_TOLERANCE:g}"
            )
        if not abs(ours.accuracy - yardstick.accuracy) <= ACCURACY_TOLERANCE:
            complaints.append(
                f"the accuracy of {name} is {100 * ours.accuracy:.1f} %, that of {other} "
                f"{100 * yardstick.accuracy:.1f} %: more than {100 * ACCURACY_TOLERANCE:g} points apart"
            )
    return complaints


def write(out: Path, trained: dict[str, Trained], measured: Sequence[Any]) -> None:
    """Writes losses.csv, steps.csv and their plots.

    Args:
        out: Existing folder.
        trained: Training runs by optimizer.
        measured: Results of the step cases.
    """
    with open(out / "losses.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", *trained])
        for step, values in enumerate(zip(*(t.losses for t in trained.values()), strict=True), start=1):
            table.writerow([step, *values])
    with open(out / "steps.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["model", "optimizer", "median_ms", "p20_ms", "p80_ms", "speedup", "over"])
        for result in measured:
            for row in result.rows:
                speedup = "" if row.speedup is None else f"{row.speedup:.3f}"
                table.writerow(
                    [
                        result.work,
                        row.name,
                        f"{row.median:.4f}",
                        f"{row.p20:.4f}",
                        f"{row.p80:.4f}",
                        speedup,
                        result.baseline,
                    ]
                )
    curves = {name: t.losses for name, t in trained.items()}
    plots.save(plots.losses(curves, YARDSTICKS, LOSS_TOLERANCE, STEPS_COMPARED), out / "losses", ".png", ".svg")
    plots.save(plots.step_times(measured), out / "steps", ".png", ".svg")


def summary(trained: dict[str, Trained], measured: Sequence[Any]) -> str:
    """The figures of a run as text."""
    lines = [f"{'':16}{'final loss':>12}{'accuracy':>10}   largest difference of the loss from another"]
    lines.append(f"{'':16}{'':12}{'':10}   {f'in {STEPS_COMPARED} steps':>14}{'in all':>12}")
    for name, run in trained.items():
        differences = ""
        if other := YARDSTICKS.get(name):
            early, all_ = (apart(run.losses, trained[other].losses, n) for n in (STEPS_COMPARED, len(run.losses)))
            differences = f"   {early:14.1e}{all_:12.1e}  from {other}"
        lines.append(f"{name:16}{run.losses[-1]:12.2e}{100 * run.accuracy:8.1f} %{differences}")
    for result in measured:
        lines += ["", f"{result.work}: {result.size['tensors']} tensors, {result.size['elements']:,} parameters"]
        for row in result.rows:
            times = f"{row.median:10.2f} ms  [{row.p20:.2f}, {row.p80:.2f}]" if row.rounds else f"  {row.note}"
            compared = row.speedup is not None and row.name != result.baseline
            speed = f"   {row.speedup:.2f} x as fast as {result.baseline}" if compared else ""
            lines.append(f"  {row.name:16}{times:>34}{speed}")
        if result.unfit:
            lines.append(f"  no speed-up is given: {result.unfit}")
    return "\n".join(lines)
