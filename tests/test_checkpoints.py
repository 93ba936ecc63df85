"""State of every optimizer: copies, checkpoints of ours and of torch, and state that somebody replaced."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn
from training import OURS, PAIRS, assert_same_weights, copy_weights, make, network, parameters_of, set_grads, train

import fastcurv

every_optimizer = pytest.mark.parametrize("name", OURS)
counting = pytest.mark.parametrize("name", [name for name in OURS if name not in ("SGD", "LARS", "OSGD", "Muon")])


def through_a_file(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def missing_second(step):
    """A parameter whose count of steps is not that of the others."""
    return {1} if step == 1 else ()


@every_optimizer
@pytest.mark.parametrize("kind", ["state_dict", "pickle", "deepcopy", "weights_only"])
def test_continues_from_a_copy(name, kind):
    source, target = network(), network()
    a = make(name, source.parameters())
    train(a, range(4), missing_second)
    if kind in ("state_dict", "weights_only"):
        saved = a.state_dict() if kind == "state_dict" else through_a_file(a.state_dict(), weights_only=True)
        b = OURS[name][0](target.parameters())
        b.load_state_dict(saved)
        copy_weights(source.parameters(), target.parameters())  # Nero's constructor changes them
    else:
        b = pickle.loads(pickle.dumps(a)) if kind == "pickle" else copy.deepcopy(a)
        assert type(b) is type(a) and (b.backend, b.state_dtype) == (None, None)
        assert all(p is not q for p, q in zip(parameters_of(a), parameters_of(b), strict=True))
    train(a, range(4, 9))
    train(b, range(4, 9))
    assert_same_weights(parameters_of(a), parameters_of(b))
    for p, q in zip(parameters_of(a), parameters_of(b), strict=True):
        assert set(a.state[p]) == set(b.state[q])
        assert all(value.data_ptr() != b.state[q][key].data_ptr() for key, value in a.state[p].items())


def in_bfloat16(name):
    """Options for state in bfloat16, with averages that move there."""
    has_betas = "betas" in inspect.signature(OURS[name][0]).parameters
    return {"state_dtype": torch.bfloat16, **({"betas": (0.9, 0.95)} if has_betas else {})}


@every_optimizer
def test_options_and_back_ends_survive_copies(name):
    (p,) = parameters = [nn.Parameter(torch.ones(3, 2, device=DEVICE))]
    options = {} if name == "Nero" else in_bfloat16(name)
    optimizer = make(name, parameters, backend="reference", **options)
    train(optimizer, range(2))
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again.backend == "reference" and again.state_dtype == options.get("state_dtype")
        assert set(optimizer.param_groups[0]) <= set(again.param_groups[0])
        train(again, [2])
        assert {k: v.dtype for k, v in again.state[parameters_of(again)[0]].items()} == {
            k: v.dtype for k, v in optimizer.state[p].items()
        }


CROSSINGS = [
    *(("Adam", how, options) for how in ("foreach", "fused", "capturable") for options in ({}, {"amsgrad": True})),
    *(("AdamW", how, options) for how in ("foreach", "fused") for options in ({}, {"amsgrad": True})),
    *(("RAdam", how, {}) for how in ("foreach", "capturable")),
    *(("NAdam", how, {}) for how in ("foreach", "capturable")),
    *(("SGD", how, options) for how in ("foreach", "fused") for options in ({}, {"momentum": 0.9, "nesterov": True})),
]


@pytest.mark.parametrize("direction", ["torch-to-fastcurv", "fastcurv-to-torch"])
@pytest.mark.parametrize("name, how, options", CROSSINGS)
def test_checkpoints_interchange_with_torch_mid_run(name, how, options, direction):
    if how == "capturable" and DEVICE.type == "cpu":
        pytest.skip("torch refuses capturable optimizers on the CPU")
    straight, crossing = network(), network()
    theirs, mine = PAIRS[name]
    a = theirs(straight.parameters(), lr=0.05, **{how: True}, **options)
    first, second = (theirs, mine) if direction == "torch-to-fastcurv" else (mine, theirs)
    b = first(crossing.parameters(), lr=0.05, **({"foreach": True} if first is mine else {how: True}), **options)
    for step in range(8):
        if step == 4:
            saved = through_a_file(b.state_dict(), weights_only=True)
            b = second(crossing.parameters(), lr=1.0, **({how: True} if second is theirs else {}))
            b.load_state_dict(saved)
            assert b.param_groups[0]["lr"] == 0.05
            if second is theirs:  # torch's loader casts NAdam's mu_product to the parameter's dtype, also its own
                saved, a = a.state_dict(), theirs(straight.parameters(), **{how: True})
                a.load_state_dict(saved)
        for optimizer in (a, b):
            train(optimizer, [step], lambda step: {1} if step == 2 else ())
    for x, y in zip(straight.parameters(), crossing.parameters(), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
        assert set(a.state[x]) == set(b.state.get(y, {}))


def half_precision(name, dtype=torch.bfloat16):
    p = nn.Parameter(torch.linspace(-1, 1, 100, device=DEVICE).view(4, 25).to(dtype))
    return p, make(name, [p])


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_state_of_half_precision_parameters_survives_loading(name, dtype):
    (p, a), (q, b) = half_precision(name, dtype), half_precision(name, dtype)
    train(a, range(2))
    for value in a.state[p].values():
        value.mul_(1 + 2.0**-20)  # representable in neither
    b.load_state_dict(a.state_dict())
    for key, value in a.state[p].items():
        assert b.state[q][key].dtype == torch.float32 and torch.equal(b.state[q][key], value), key
        assert b.state[q][key].data_ptr() != value.data_ptr()  # a copy, not an alias


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_state_of_torch_is_widened(name):
    p, q = (nn.Parameter(torch.ones(100, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2))
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    a, b = (cls([x], **momentum) for cls, x in zip(PAIRS[name], (p, q), strict=True))
    train(a, range(1))
    b.load_state_dict(a.state_dict())
    train(b, range(1))
    assert all(value.dtype == torch.float32 for value in b.state[q].values())
    assert all(s["step"] == 2 for s in b.state.values() if "step" in s)


@pytest.mark.parametrize("name", [name for name in OURS if name != "Nero"])
def test_bfloat16_state_of_float32_parameters(name):
    p = nn.Parameter(torch.ones(100, device=DEVICE))
    optimizer = make(name, [p], **in_bfloat16(name))
    train(optimizer, range(2))
    key = "exp_avg" if "exp_avg" in optimizer.state[p] else "momentum_buffer"
    assert optimizer.state[p][key].dtype == torch.bfloat16
    assert all(
        optimizer.state[p][k].dtype == torch.float32
        for k in ("step", "slow_buffer", "mu_product")
        if k in optimizer.state[p]
    )
    again = make(name, [p], **in_bfloat16(name))
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p][key], optimizer.state[p][key])
    wide = make(name, [p])
    wide.load_state_dict(optimizer.state_dict())
    assert wide.state[p][key].dtype == torch.float32


@counting
@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.float64)])
def test_step_counts_of_any_kind_load(name, step):
    p = nn.Parameter(torch.ones(4, 2, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(1))
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    optimizer.load_state_dict(state)
    loaded = optimizer.state[p]["step"]
    assert loaded.shape == () and loaded.dtype == torch.float32 and loaded.device == p.device and loaded == 3
    train(optimizer, range(1))
    assert optimizer.state[p]["step"] == 4
    assert not isinstance(step, torch.Tensor) or step == 3


@every_optimizer
def test_state_replaced_by_hand_is_noticed(name):
    """Offloading frameworks move state and bring it back; the cached lists must not keep the old tensors."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50, device=DEVICE).view(5, 10)) for _ in range(2))
    a, b = make(name, [p]), make(name, [q])
    for step in range(5):
        state = a.state[p] if step else {}
        old = [(value, value.clone()) for value in state.values()]
        if step == 1:  # values replaced in the same dict
            state.update({key: value.clone() for key, value in state.items()})
        elif step == 2:  # another dict, another dtype
            a.state[p] = {key: value.double() for key, value in state.items()}
        elif step == 3:  # another layout
            a.state[p] = {
                key: value.t().contiguous().t() if value.shape == p.shape else value.clone()
                for key, value in state.items()
            }
        train(a, [step])
        train(b, [step])
        assert torch.equal(p, q), step
        if step in (1, 2, 3):  # what was taken away is not written any more
            assert all(torch.equal(value, before) for value, before in old)
    a.state.clear()
    p.data = torch.zeros_like(p)
    train(a, [5])
    assert p.any() and all(s["step"] == 1 for s in a.state.values() if "step" in s)


@every_optimizer
def test_a_checkpoint_of_the_future_or_past(name):
    """Options that a saved group does not have take their defaults; unknown ones are kept."""
    p = nn.Parameter(torch.ones(3, 2, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [{"lr": 0.25, "params": [0], "of_tomorrow": 7}]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.25 and group["of_tomorrow"] == 7 and set(optimizer.defaults) <= set(group)
    train(optimizer, range(1))


@every_optimizer
def test_an_empty_checkpoint_starts_anew(name):
    """Saved before the first step, as frameworks do."""
    p = nn.Parameter(torch.ones(3, 2, device=DEVICE))
    saved = make(name, [p]).state_dict()
    optimizer = make(name, [p], lr=0.5)
    train(optimizer, range(2))
    optimizer.load_state_dict(saved)
    assert not optimizer.state.get(p) and optimizer.param_groups[0]["lr"] == OURS[name][1]["lr"]
    train(optimizer, range(1))
    assert all(s["step"] == 1 for s in optimizer.state.values() if "step" in s)


@every_optimizer
def test_hooks_may_change_what_is_loaded(name):
    p = nn.Parameter(torch.ones(3, 2, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(1))

    def halve(_, saved):
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] /= 2
        return saved

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == OURS[name][1]["lr"] / 2


@every_optimizer
def test_hooks_may_change_what_was_loaded(name):
    p = nn.Parameter(torch.ones(3, 2, device=DEVICE))
    optimizer = make(name, [p])
    train(optimizer, range(2))
    key = next(key for key, value in optimizer.state[p].items() if value.dim())

    def zero(optimizer):
        optimizer.state[p][key].zero_()

    handle = optimizer.register_load_state_dict_post_hook(zero)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[p][key].any()
    handle.remove()
    optimizer.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.clear())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


def test_a_checkpoint_without_the_maximum_starts_it_anew():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer, plain = fastcurv.Adam([p], amsgrad=True), fastcurv.Adam([p])
    set_grads([p], 0)
    plain.step()
    saved = plain.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    optimizer.load_state_dict(saved)
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["max_exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


BAD_OPTIONS = {
    "Adam": ("betas", (0.9, 1.5), "beta2"), "AdamW": ("eps", "tiny", "eps"), "RAdam": ("lr", -1.0, "lr"),
    "NAdam": ("momentum_decay", -1.0, "momentum_decay"), "Yogi": ("initial_accumulator", -1.0, "initial_accumulator"),
    "SGD": ("nesterov", "maybe", "nesterov"), "LARS": ("trust_coefficient", None, "trust_coefficient"),
    "LAMB": ("adaptive", "no", "adaptive"), "OSGD": ("orthogonal", "all", "orthogonal"),
    "Muon": ("ns_coefficients", [1.0, 2.0], "ns_coefficients"), "Nero": ("constraints", "yes", "constraints"),
    "Ranger": ("compat", "21", "compat"),
}  # fmt: skip


@every_optimizer
def test_an_option_that_a_step_would_refuse_is_refused_on_load(name):
    option, value, argument = BAD_OPTIONS[name]
    source, target = network(), network()
    a, b = (make(name, model.parameters()) for model in (source, target))
    train(a, range(2))
    train(b, range(1))
    saved = copy.deepcopy(a.state_dict())
    saved["param_groups"][0][option] = value
    before = copy.deepcopy(b.state_dict())
    with pytest.raises((TypeError, ValueError), match=rf"param_groups\[0\] of the checkpoint: {argument}: expected"):
        b.load_state_dict(saved)
    after = b.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][i][k]) for i, s in before["state"].items() for k, x in s.items())
