"""Lightning, accelerate and transformers train with our optimizers what they train with torch's."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from training import OURS, PAIRS, assert_same_weights

import fastcurv

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.clients

every_pair = pytest.mark.parametrize("name", PAIRS)

EVERY = {
    **{name: functools.partial(cls, **options) for name, (cls, options) in OURS.items()},
    "Lookahead": lambda params: fastcurv.Lookahead(fastcurv.AdamW(params, lr=0.05), k=2),
    "Orthogonal": lambda params: fastcurv.Orthogonal(fastcurv.AdamW(params, lr=0.05)),
}
every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@pytest.fixture(scope="module")
def clients():
    for name in ("accelerate", "lightning", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install 'fastcurv[dev]'")
    with pytest.MonkeyPatch.context() as patch:
        # transformers would take our folder kernels/ for the package of that name.
        patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != ROOT])
        import clients

        yield clients


def both(name, **options):
    """A maker of torch's optimizer, and one of ours."""
    options |= {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    return [functools.partial(cls, **options) for cls in PAIRS[name]]


def assert_close(ours, theirs, steps):
    # A step rounds about 16 times and moves a parameter by at most a few lr, which is below one here.
    tolerance = 16 * steps * torch.finfo(torch.float32).eps * 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_pair
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_and_skips_as_with_torch(clients, name, precision, manual):
    data = clients.batches(5, overflows=(1,) if precision == "16-mixed" else ())
    theirs, mine = (clients.lightning(make, precision, data, manual=manual) for make in both(name))
    assert_close(mine.params, theirs.params, len(data))
    assert mine.lrs == theirs.lrs


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_lightning_refuses_to_clip_with_fused_as_with_torch(clients, name):
    for make in both(name, fused=True):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            clients.lightning(make, "bf16-mixed", clients.batches(1))


@every_optimizer
def test_lightning_clips_for_every_optimizer(clients, make):
    assert_trained(clients, clients.lightning(make, "bf16-mixed", clients.batches(3)))
    assert_trained(clients, clients.lightning(make, "16-mixed", clients.batches(3, overflows=(0,))))


def assert_trained(clients, seen):
    """The loss, which is linear in the parameters, fell over the batches."""
    before, after = clients.layer(), clients.layer()
    with torch.no_grad():
        for p, q in zip(after.parameters(), seen.params, strict=True):
            p.copy_(q)
        total, was = (sum(clients.loss_of(model, batch) for batch in clients.batches(3)) for model in (after, before))
    assert math.isfinite(total) and total < was


@every_optimizer
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_continues_from_a_checkpoint(clients, make, precision, tmp_path):
    data, saved = clients.batches(3), str(tmp_path / "checkpoint")
    straight = clients.lightning(make, precision, data, epochs=2)
    clients.lightning(make, precision, data, epochs=1, save=saved)
    resumed = clients.lightning(make, precision, data, epochs=2, resume=saved)
    assert straight.lrs[3:] == resumed.lrs
    assert_same_weights(straight.params, resumed.params)


@every_pair
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_accelerate_clips_and_skips_as_with_torch(clients, name, precision):
    data = clients.batches(10, overflows=(3,) if precision == "fp16" else ())
    theirs, mine = (clients.accelerate(make, precision, data, accumulate=2) for make in both(name))
    assert_close(mine.params, theirs.params, len(data))
    assert (mine.lrs, mine.skipped) == (theirs.lrs, theirs.skipped)


@every_optimizer
def test_accelerate_knows_of_skipped_steps_and_holds_the_schedule(clients, make):
    seen = clients.accelerate(make, "fp16", clients.batches(4, overflows=(1,)))
    lr = seen.lrs[0]
    assert seen.skipped == [False, True, False, False]
    assert seen.lrs == [lr, lr, lr / 2, lr / 2]
    assert all(p.isfinite().all() for p in seen.params)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_accelerate_does_not_know_of_skipped_steps_with_fused_as_with_torch(clients, name):
    data = clients.batches(4, overflows=(1,))
    theirs, mine = (clients.accelerate(make, "fp16", data) for make in both(name, fused=True))
    assert_close(mine.params, theirs.params, len(data))
    assert (mine.lrs, mine.skipped) == (theirs.lrs, theirs.skipped) and not any(mine.skipped)


@every_optimizer
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_accelerate_continues_from_a_saved_state(clients, make, precision, tmp_path):
    data, saved = clients.batches(6), str(tmp_path / "state")
    straight = clients.accelerate(make, precision, data)
    clients.accelerate(make, precision, data[:3], save=saved)
    resumed = clients.accelerate(make, precision, data[3:], resume=saved)
    assert straight.lrs[3:] == resumed.lrs
    assert_same_weights(straight.params, resumed.params)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_transformers_trains_as_with_torch(clients, name, tmp_path):
    theirs, mine = (
        clients.transformers(functools.partial(make, lr=0.01), tmp_path / str(i)) for i, make in enumerate(both(name))
    )
    # Losses and norms are float32 sums over 28 tokens of some 16 values each.
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert len(a) == 6 and a == pytest.approx(b, rel=64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", ["AdamW", "Ranger", "Muon", "Lookahead"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_transformers_continues_from_a_checkpoint(clients, name, bf16, tmp_path):
    make = EVERY[name]
    straight = clients.transformers(make, tmp_path / "straight", bf16=bf16)
    resumed = clients.transformers(make, tmp_path / "resumed", bf16=bf16, resume=tmp_path / "straight" / "checkpoint-3")
    assert resumed[1] == straight[1]
    assert_same_weights(straight[0], resumed[0])
