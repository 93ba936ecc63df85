"""The script behind docs/osgd.md."""

import json
import pickle

import pytest
import torch

from fastcurv.bench import osgd_claim


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(osgd_claim, "RATES", (0.01,))
    monkeypatch.setattr(osgd_claim, "MOMENTA", (0.9, 0.0))
    monkeypatch.setattr(osgd_claim, "BATCHES", (128, 256))


def test_it_trains_every_cell_and_writes_what_came_out(small, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert osgd_claim.main(["--epochs", "2", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"osgd.md", "osgd.json", "osgd.png", "osgd.svg"}
    found = json.loads((tmp_path / "osgd.json").read_text())
    assert len(found["grid"]) == len(found["sizes"]) == 2
    for cell in found["grid"]:
        assert set(cell["accuracy"]) == set(osgd_claim.OPTIMIZERS)
        # Better than guessing one of ten, which two epochs are enough for.
        assert all(len(values) == 2 and 12 < max(values) <= 100 for values in cell["accuracy"].values())
    text = (tmp_path / "osgd.md").read_text()
    assert text.count("| 0.01 |") == 2 and "of 2 cells (thesis: 20 of 20)" in text


def test_wins_are_counted_by_cell_and_by_seed():
    grid = [{"accuracy": {"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 9.0]}}, {"accuracy": {"a": [5.0], "b": [4.0]}}]
    assert osgd_claim.wins(grid, "a", "b") == 1
    assert [osgd_claim.seeds_won(cell, "a", "b") for cell in grid] == [2, 0]


def test_cifar_is_read_from_its_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for k, name in enumerate(names):
        data = torch.randint(256, (3, 3072), generator=generator, dtype=torch.uint8).numpy()
        (tmp_path / name).write_bytes(pickle.dumps({b"data": data, b"labels": [k, 1, 2]}))
    images, labels, test_images, test_labels = osgd_claim.cifar(tmp_path)
    assert images.shape == (15, 3, 32, 32) and test_images.shape == (3, 3, 32, 32)
    assert labels[::3].tolist() == [0, 1, 2, 3, 4] and test_labels.tolist() == [5, 1, 2]
    assert -0.5 <= images.min() < images.max() <= 0.5
