"""Every op and optimizer runs whatever torch's default device is, and gives the same bits."""

import itertools
import subprocess
import sys

import digests
import pytest
import torch
from cases import OPTIONS

import fastcurv

# Triton's interpreter takes seconds for what is not small.
SLOW = ("triton", "emulator", "cuda_host", "products")


def is_chosen(name):
    op, *words = name.split()
    is_few = op not in OPTIONS or words[0] in (next(iter(OPTIONS[op])), list(OPTIONS[op])[-1])
    if words[-1] in SLOW:
        return words[-1] == "triton" and op in OPTIONS and words[0] == next(iter(OPTIONS[op])) and "float32" in words
    return is_few and not {"float16", "torch.float16", "float64"} & set(words)


CALLS = {name: call for name, call in digests.calls() if is_chosen(name)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_default_device_changes_nothing(name):
    expected = digests.digest(CALLS[name]())
    with torch.device("meta"):
        found = list(CALLS[name]())
    assert digests.digest(found) == expected


@pytest.mark.filterwarnings("ignore")
def test_set_default_device_changes_nothing():
    calls = list(itertools.islice(digests.optimizers(["cpp"]), 0, None, 4))
    expected = [digests.digest(call()) for _, call in calls]
    torch.set_default_device("meta")
    try:
        found = [list(call()) for _, call in calls]
    finally:
        torch.set_default_device(None)
    assert [digests.digest(tensors) for tensors in found] == expected


def test_checkpoints_load_under_a_default_device():
    """Also those whose steps are numbers."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    source, target = fastcurv.AdamW([p], lr=0.1), fastcurv.AdamW([q], lr=0.1)
    for param, optimizer in ((p, source), (q, target)):
        param.grad = torch.ones(3)
        optimizer.step()
    saved = source.state_dict()
    saved["state"][0]["step"] = 1
    with torch.device("meta"):
        target.load_state_dict(saved)
        source.step(), target.step()
    assert torch.equal(p, q)


def test_the_library_is_imported_and_used_under_a_default_device():
    script = """if True:
        import torch
        torch.set_default_device("meta")
        import fastcurv, fastcurv.bench, fastcurv.kernels
        p = torch.nn.Parameter(torch.ones(3, device="cpu"))
        p.grad = torch.ones(3, device="cpu")
        fastcurv.Ranger([p], lr=0.1).step()
        assert p.device.type == "cpu" and float(p[0]) != 1
    """
    subprocess.run([sys.executable, "-c", script], check=True)
