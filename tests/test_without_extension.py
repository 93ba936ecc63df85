"""Where `fastcurv._C` was not built everything runs by the references, to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import digests
import pytest

SCRIPT = """
import sys, warnings
sys.modules["fastcurv._C"] = None  # an import of it fails
warnings.simplefilter("ignore")
import digests, fastcurv
assert not any(row.available for row in fastcurv.backends() if row.backend in ("cpp", "triton", "cuda"))
for name, call in [*digests.chosen("reference", "torch"), *digests.optimizers([None])]:
    print(name, digests.digest(call()))
"""


@pytest.mark.filterwarnings("ignore")
def test_every_op_and_optimizer_runs_by_its_reference():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, text=True, check=True, stdout=subprocess.PIPE
    ).stdout.splitlines()
    expected = [f"{name} {digests.digest(call())}" for name, call in digests.chosen("reference", "torch")]
    assert found[: len(expected)] == expected
    by_name = dict(line.rsplit(" ", 1) for line in expected)
    rest = dict(line.rsplit(" ", 1) for line in found[len(expected) :])
    assert rest and all(value == by_name[name.replace("None", "reference")] for name, value in rest.items())
