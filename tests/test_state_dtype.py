"""State of float32 parameters in bfloat16: refused where averages would stand still, right where they move."""

import copy
import inspect

import pytest
import torch
from cases import DEVICE
from torch import nn
from training import OURS, make, set_grads, train

import fastcurv

BOUND = 1 - 2.0**-8
AVERAGES = {
    **{
        name: ("betas", (0.9, 0.999), "beta2") for name in ("Adam", "AdamW", "RAdam", "NAdam", "Yogi", "LAMB", "Ranger")
    },
    **{name: ("momentum", 0.999, "momentum") for name in ("SGD", "LARS", "OSGD", "Muon")},
}
HAVE_STATE_DTYPE = [name for name in OURS if "state_dtype" in inspect.signature(OURS[name][0]).parameters]
every_average = pytest.mark.parametrize("name", AVERAGES)


def ones(*shape):
    return nn.Parameter(torch.ones(shape or (3,), device=DEVICE))


def test_every_class_with_the_option_is_here():
    assert set(HAVE_STATE_DTYPE) == set(AVERAGES)


@every_average
def test_an_average_that_would_stand_still_is_refused_with_the_reason(name):
    option, value, argument = AVERAGES[name]
    match = (
        rf"state_dtype=torch\.bfloat16: expected {argument} of at most .*0\.99609375, got 0\.999: .* leave state_dtype"
    )
    with pytest.raises(ValueError, match=match):
        make(name, [ones()], state_dtype=torch.bfloat16, **{option: value})
    allowed = (0.9, 0.95) if option == "betas" else 0.9
    kept = make(name, [ones()], state_dtype=torch.bfloat16, **{option: allowed})
    with pytest.raises(ValueError, match=match):
        kept.add_param_group({"params": [ones()], option: value})
    assert len(kept.param_groups) == 1


@pytest.mark.parametrize("cls", [fastcurv.Adam, fastcurv.AdamW, fastcurv.LAMB, fastcurv.Ranger])
def test_the_defaults_are_refused(cls):
    with pytest.raises(ValueError, match="expected beta2 of at most"):
        cls([ones()], state_dtype=torch.bfloat16)
    cls([ones()])
    cls([ones()], state_dtype=torch.float32)


@pytest.mark.parametrize("value, fails", [(BOUND, False), (torch.tensor(BOUND), False), (torch.tensor(0.997), True)])
def test_the_bound_is_where_rounding_stops_an_average(value, fails):
    if fails:
        with pytest.raises(ValueError, match="expected beta2 of at most"):
            fastcurv.Adam([ones()], betas=(0.9, value), state_dtype=torch.bfloat16)
    else:
        fastcurv.Adam([ones()], betas=(0.9, value), state_dtype=torch.bfloat16)
    # From just above a power of two, where spacing is widest beside the value, a step at the bound moves it.
    start = torch.tensor(1 + 2.0**-7, dtype=torch.bfloat16)
    assert (start.float() * BOUND).bfloat16() < start
    assert (start.float() * (BOUND + 2.0**-14)).bfloat16() == start


@every_average
def test_a_group_that_is_changed_later_is_refused_before_anything_is_written(name):
    option, value, argument = AVERAGES[name]
    p = ones(2, 3)
    optimizer = make(name, [p], state_dtype=torch.bfloat16, **{option: (0.9, 0.9) if option == "betas" else 0.9})
    train(optimizer, [0])
    before = p.detach().clone()
    optimizer.param_groups[0][option] = value
    set_grads([p], 1)
    with pytest.raises(ValueError, match=f"expected {argument} of at most"):
        optimizer.step()
    assert torch.equal(p, before)


@every_average
def test_a_checkpoint_whose_averages_would_stand_still_loads_nothing(name):
    option, value, argument = AVERAGES[name]
    p, q = ones(2, 3), ones(2, 3)
    saved = make(name, [p], **{option: value})
    train(saved, range(2))
    optimizer = make(name, [q], state_dtype=torch.bfloat16, **{option: (0.9, 0.9) if option == "betas" else 0.9})
    with pytest.raises(ValueError, match=rf"param_groups\[0\] of the checkpoint: .*expected {argument} of at most"):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert not optimizer.state
    train(optimizer, [0])


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_second_moments_fall_with_the_gradients(beta2, backend):
    """Gradients of 1, then of 0.1: v ends within what a rounding a step can hold up.

    v' = (b v + (1 - b) g^2)(1 + u) at most, whose fixed point is (1 - b) g^2 (1 + u) / (1 - b (1 + u)).
    """
    p = ones()
    optimizer = fastcurv.Adam([p], betas=(0.9, beta2), state_dtype=torch.bfloat16, backend=backend)
    for gradient, steps in ((1.0, 300), (0.1, 1500)):
        for _ in range(steps):
            p.grad = torch.full_like(p, gradient)
            optimizer.step()
    unit, square = 2.0**-8, 0.1**2
    most = (1 - beta2) * square * (1 + unit) / (1 - beta2 * (1 + unit))
    assert (optimizer.state[p]["exp_avg_sq"].double() <= most * 1.001).all()
    assert (optimizer.state[p]["exp_avg_sq"].double() >= square * square / most * 0.999).all()
