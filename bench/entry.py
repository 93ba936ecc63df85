"""What `pytest bench` runs of the cases in a module, to compare commits."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Options

__all__ = ["pytest_generate_tests", "test_step"]


def pytest_generate_tests(metafunc: Any) -> None:
    """One benchmark for each back end of fastcurv that runs here, in each case of the module."""
    options = Options("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in metafunc.module.CASES if options.device in case.devices]
    rows = [(case, contender) for case in cases for contender in case.contenders(options) if contender.role == "ours"]
    metafunc.parametrize("contender", [c for _, c in rows], ids=[f"{case.name}-{c.name}" for case, c in rows])


def test_step(benchmark: Any, contender: Any) -> None:
    """`opt.step()`, right and then timed."""
    assert not contender.verify()
    call = contender.prepare().call

    def step() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark(step)
