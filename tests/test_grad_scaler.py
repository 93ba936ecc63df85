"""Who unscales gradients under GradScaler: GradScaler by default, the kernel with `fused=True`, as in torch."""

import copy
import pickle

import pytest
import torch
from cases import DEVICE, bits
from torch import nn
from training import OURS, PAIRS, WHOLE, assert_same_weights, make, network, set_grads

import fastcurv

# Those whose kernel can unscale.
SCALING = [name for name in OURS if name not in WHOLE]


@pytest.mark.parametrize("name, fused", [*((name, None) for name in OURS), *((name, True) for name in SCALING)])
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_with_and_without_unscaling(name, fused, clip):
    """As without a scaler, but for the step that overflows, which is as if it had not been."""
    scaled, plain = network(torch.float32), network(torch.float32)
    a, b = make(name, scaled.parameters(), **({"fused": True} if fused else {})), make(name, plain.parameters())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)
    # SGD with dampening says so in its documentation: with fused=True, a first step that overflows counts as the first.
    overflows = (4,) if name == "SGD" and fused else (0, 4)
    for step in range(7):
        set_grads(scaled.parameters(), step)
        set_grads(plain.parameters(), step)
        for p in scaled.parameters():
            p.grad *= scaler.scale(torch.ones((), device=DEVICE))
            if step in overflows:
                p.grad.view(-1)[0] = float("inf")
        if clip:
            scaler.unscale_(a)
            for net in (scaled, plain):
                if step not in overflows:
                    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        grads = [(p.grad, p.grad.clone()) for p in scaled.parameters()]
        # By default GradScaler unscales p.grad itself, as for torch.optim; with fused=True nobody writes it.
        unscaled = 1.0 if fused or clip else scaler.get_scale()
        scaler.step(a)
        scaler.update()
        if step not in overflows:
            b.step()
            for p, (grad, before) in zip(scaled.parameters(), grads, strict=True):
                assert p.grad is grad and torch.equal(bits(grad), bits(before / unscaled))
    assert_same_weights(scaled.parameters(), plain.parameters())  # the scales are powers of two
    assert all(s["step"] == 7 - len(overflows) for s in a.state.values() if "step" in s)


def scales(optimizer):
    """Whether GradScaler leaves unscaling to an optimizer; clients of torch then refuse to clip."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in PAIRS),
    *((name, {"fused": fused}) for name in ("Adam", "AdamW", "SGD") for fused in (None, False, True)),
])  # fmt: skip
def test_grad_scaler_treats_it_as_torchs(name, options):
    theirs, mine = (cls([nn.Parameter(torch.ones(2, device=DEVICE))], **options) for cls in PAIRS[name])
    assert scales(mine) is scales(theirs) is bool(options.get("fused"))


@pytest.mark.parametrize("name", SCALING)
def test_fused_is_of_the_constructor_and_survives_copies(name):
    def parameters():
        return [nn.Parameter(torch.ones(3, 2, device=DEVICE))]

    for fused in (None, False, True):
        optimizer = make(name, parameters(), fused=fused)
        assert scales(optimizer) is bool(fused)
        for other in (None, False, True):
            optimizer.load_state_dict(make(name, parameters(), fused=other).state_dict())
            assert scales(optimizer) is bool(fused)
        for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert scales(again) is bool(fused)
    assert not scales(make(name, [{"params": parameters(), "fused": True}]))
    assert not scales(fastcurv.Lookahead(make(name, parameters(), fused=True)))
    assert not scales(fastcurv.Orthogonal(make(name, parameters(), fused=True)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SCALING)
def test_groups_that_disagree_on_fused_are_all_unscaled(name, fused):
    scaled, plain = ([nn.Parameter(torch.ones(3, 2, device=DEVICE)) for _ in range(2)] for _ in range(2))
    a = make(name, [{"params": [p], "fused": i == 0} for i, p in enumerate(scaled)], fused=fused)
    b = make(name, plain)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    set_grads(scaled, 0)
    set_grads(plain, 0)
    for p in scaled:
        p.grad *= scaler.scale(torch.ones((), device=DEVICE))
    scaler.step(a)
    b.step()
    assert_same_weights(scaled, plain)
