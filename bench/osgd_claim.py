"""The thesis's untuned comparison, scaled down: optimizers against their orthogonal versions, cell by cell.

`python -m fastcurv.bench.osgd_claim` trains a small convolutional network on scikit-learn's digits (or, with `--cifar
PATH`, on CIFAR-10) for every cell of the grid of tables 5.3 and 5.4 (Tuddenham, 2026), over several seeds, and for
mini-batches of several sizes (section 5.5.7), and writes docs/osgd.md, docs/osgd.json and a plot. Whatever comes out.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastcurv
from fastcurv.cli import program

from . import machine

RATES = (1e-1, 1e-2, 1e-3, 1e-4)
MOMENTA = (0.95, 0.9, 0.8, 0.5, 0.0)
BATCHES = (4, 8, 16, 32, 64, 128, 256)
WEIGHT_DECAY = 5e-4

Groups = list[dict[str, Any]]
# Name of an optimizer: what makes it from groups, a learning rate and a momentum.
OPTIMIZERS: dict[str, Callable[[Groups, float, float], Optimizer]] = {
    "SGDM": lambda groups, lr, beta: torch.optim.SGD(groups, lr=lr, momentum=beta, weight_decay=WEIGHT_DECAY),
    "Orthogonal-SGDM": lambda groups, lr, beta: fastcurv.OSGD(groups, lr=lr, momentum=beta, weight_decay=WEIGHT_DECAY),
    "Adam": lambda groups, lr, beta: torch.optim.Adam(groups, lr=lr, betas=(beta, 0.999), weight_decay=WEIGHT_DECAY),
    "Orthogonal-Adam": lambda groups, lr, beta: fastcurv.Orthogonal(
        torch.optim.Adam(groups, lr=lr, betas=(beta, 0.999), weight_decay=WEIGHT_DECAY)
    ),
}
PAIRS = (("SGDM", "Orthogonal-SGDM"), ("Adam", "Orthogonal-Adam"))

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """Training and test images and labels of scikit-learn's digits: 1797 of 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.5
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def cifar(folder: Path) -> Data:
    """The same of CIFAR-10 from the folder `cifar-10-batches-py` of its Python version."""
    images, labels = [], []
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
        images.append(torch.tensor(batch[b"data"]).view(-1, 3, 32, 32).float() / 255 - 0.5)
        labels.append(torch.tensor(batch[b"labels"]))
    return torch.cat(images[:5]), torch.cat(labels[:5]), images[5], labels[5]


def network(data: Data, seed: int) -> nn.Sequential:
    """The thesis's BasicCNN: three convolutions of stride 2 with batch norm, and a linear layer."""
    torch.manual_seed(seed)
    channels, side = data[0].shape[1], data[0].shape[2]
    layers: list[nn.Module] = []
    for inputs in (channels, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * side * side, 10))


def accuracy(data: Data, name: str, lr: float, beta: float, batch: int, epochs: int, seed: int) -> float:
    """Test accuracy in percent after training; 0 where it diverged.

    Args:
        data: Training and test images and labels.
        name: One of `OPTIMIZERS`.
        lr: Learning rate.
        beta: Momentum, or Adam's first beta.
        batch: Size of a mini-batch.
        epochs: How often the data is gone through.
        seed: Of the weights and the order of the data.
    """
    images, labels, test_images, test_labels = data
    model = network(data, seed)
    optimizer = OPTIMIZERS[name](fastcurv.param_groups(model, verbose=False), lr, beta)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            if len(chosen) < min(batch, 2):  # batch norm needs two
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            if not loss.isfinite():
                return 0.0
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)
        )
    return 100 * right / len(test_labels)


def repeated(data: Data, name: str, lr: float, beta: float, batch: int, epochs: int, seeds: int) -> list[float]:
    """Accuracies over seeds."""
    return [accuracy(data, name, lr, beta, batch, epochs, seed) for seed in range(seeds)]


def summary(values: Sequence[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def run(data: Data, batch: int, epochs: int, seeds: int) -> dict[str, Any]:
    """Trains everything.

    Args:
        data: Training and test images and labels.
        batch: Size of a mini-batch on the grid.
        epochs: On the grid; mini-batches of other sizes go through the data as often.
        seeds: How many.
    """
    grid = []
    for beta in MOMENTA:
        for lr in RATES:
            cell = {name: repeated(data, name, lr, beta, batch, epochs, seeds) for name in OPTIMIZERS}
            grid.append({"lr": lr, "momentum": beta, "accuracy": cell})
            print(lr, beta, {name: summary(values) for name, values in cell.items()}, flush=True)
    sizes = []
    for size in BATCHES:
        cell = {name: repeated(data, name, 1e-2, 0.9, size, epochs, seeds) for name in ("SGDM", "Orthogonal-SGDM")}
        sizes.append({"batch": size, "accuracy": cell})
        print(size, {name: summary(values) for name, values in cell.items()}, flush=True)
    return {"grid": grid, "sizes": sizes, "batch": batch, "epochs": epochs, "seeds": seeds}


def wins(grid: Sequence[dict[str, Any]], plain: str, orthogonal: str) -> int:
    """Cells in which the orthogonal version is better on average."""
    means = [{name: statistics.mean(cell["accuracy"][name]) for name in (plain, orthogonal)} for cell in grid]
    return sum(mean[orthogonal] > mean[plain] for mean in means)


def seeds_won(cell: dict[str, Any], plain: str, orthogonal: str) -> int:
    """Seeds with which the orthogonal version of a cell is better."""
    return sum(a > b for a, b in zip(cell["accuracy"][orthogonal], cell["accuracy"][plain], strict=True))


def page(found: dict[str, Any], source: str) -> str:
    """What came out, as markdown."""
    grid, sizes = found["grid"], found["sizes"]
    lines = [
        "# Orthogonalised gradients against plain ones, untuned",
        "",
        f"Test accuracy in percent (mean ± standard error over {found['seeds']} seeds) of the thesis's BasicCNN on "
        f"{source}, {found['epochs']} epochs, mini-batches of {found['batch']}, weight decay {WEIGHT_DECAY:g}, nothing "
        "tuned; 0 where training diverged; wins: seeds with which the orthogonal version is better. Made by `python -m "
        "fastcurv.bench.osgd_claim`; compare tables 5.3 and 5.4 "
        "of Tuddenham (2026).",
        "",
        "![Accuracy over the grid](osgd.png)",
        "",
        "| learning rate | momentum | " + " | ".join(f"{a} | {b} | wins" for a, b in PAIRS) + " |",
        "| ---: | ---: |" + " ---: | ---: | ---: |" * len(PAIRS),
    ]
    for cell in grid:
        values = [
            f"{summary(cell['accuracy'][a])} | {summary(cell['accuracy'][b])} | {seeds_won(cell, a, b)}"
            for a, b in PAIRS
        ]
        lines.append(f"| {cell['lr']:g} | {cell['momentum']:g} | {' | '.join(values)} |")
    lines.append("")
    for plain, orthogonal in PAIRS:
        best = [max(statistics.mean(cell["accuracy"][name]) for cell in grid) for name in (plain, orthogonal)]
        lines.append(
            f"- {orthogonal} is better than {plain} in {wins(grid, plain, orthogonal)} of {len(grid)} cells (thesis: "
            f"20 of 20); best cells {best[1]:.2f} and {best[0]:.2f}."
        )
    lines += [
        "",
        "## Size of the mini-batch",
        "",
        "Learning rate 0.01, momentum 0.9; the thesis finds plain SGDM better at 4, and a crossover at about 32.",
        "",
        "| mini-batch | SGDM | Orthogonal-SGDM |",
        "| ---: | ---: | ---: |",
    ]
    for cell in sizes:
        both = " | ".join(summary(cell["accuracy"][name]) for name in ("SGDM", "Orthogonal-SGDM"))
        lines.append(f"| {cell['batch']} | {both} |")
    return "\n".join(lines) + "\n"


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes the page.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.osgd_claim", description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar", type=Path, help="the folder cifar-10-batches-py, in the place of the digits")
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="default: %(default)s")
    options = parser.parse_args(argv)
    from . import plots  # needs matplotlib, unlike --help

    data = cifar(options.cifar) if options.cifar else digits()
    found = run(data, options.batch, options.epochs, options.seeds)
    found["commit"] = machine.commit()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "osgd.json").write_text(json.dumps(found, indent=1) + "\n")
    source = "CIFAR-10" if options.cifar else "scikit-learn's digits (1797 images of 8 x 8)"
    (options.out / "osgd.md").write_text(page(found, source))
    plots.save(plots.against_plain(found["grid"], PAIRS), options.out / "osgd.png", ".png", ".svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
