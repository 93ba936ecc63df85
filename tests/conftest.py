"""Shared fixtures. Without a GPU, Triton runs in its interpreter; that must be decided before a kernel is imported."""

import importlib.metadata
import importlib.util
import os
import re

# Threads that wait for one another sleep: they would take the processor from the tests of the other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from packaging.version import Version

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET") or "1"

import pytest

from fastcurv import _alloc, _backend

# Shifts every seed: other inputs, which must pass as well.
SEED = os.environ.get("FASTCURV_TEST_SEED", "").strip() or "0"
if not re.fullmatch("[0-9]{1,9}", SEED):
    raise SystemExit(f"FASTCURV_TEST_SEED={SEED!r}: expected a whole number of at most nine digits, such as 7")
SEED = int(SEED)


class ShiftedGenerator(torch.Generator):
    def manual_seed(self, seed):
        return super().manual_seed(seed + SEED)


if SEED:
    torch.Generator, manual_seed = ShiftedGenerator, torch.manual_seed
    torch.manual_seed = lambda seed: manual_seed(seed + SEED)


def pytest_configure():
    """Triton 3.6's interpreter takes bounds of loops from arrays, as only an older NumPy allows."""
    if importlib.util.find_spec("triton") is not None and _backend.interpreting():
        triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
        if triton < Version("3.7") and numpy >= Version("2.4"):
            raise pytest.UsageError(
                f"Triton {triton}'s interpreter does not run with NumPy {numpy}: pip install 'numpy<2.4'"
            )


def pytest_collection_modifyitems(items):
    """The files that take minutes come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("compile")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """An output that nobody wrote shows up as NaN (or as an absurd integer)."""

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min // 2)

    empty, empty_like = _alloc.empty, _alloc.empty_like
    monkeypatch.setattr(_alloc, "empty", lambda *size, **options: poison(empty(*size, **options)))
    monkeypatch.setattr(_alloc, "empty_like", lambda tensor, **options: poison(empty_like(tensor, **options)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260)
