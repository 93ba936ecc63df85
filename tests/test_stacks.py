"""Which matrices a tensor is made of: rows, columns, or a batch of them."""

import warnings

import pytest
import torch
from cases import DEVICE
from torch import nn
from training import set_grads, train

import fastcurv


def muon(params, **options):
    return fastcurv.Muon(params, lr=0.1, weight_decay=0.0, momentum=0.0, **options)


def osgd(params, **options):
    return fastcurv.OSGD(params, lr=0.1, momentum=0.0, **options)


def orthogonal(params, **options):
    return fastcurv.Orthogonal(torch.optim.SGD(params, lr=0.1), **options)


MAKERS = [muon, osgd, orthogonal]
every_maker = pytest.mark.parametrize("make", MAKERS)


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape, device=DEVICE))


def step(make, grads, **group):
    """What a step makes of zeros."""
    params = [parameter(*grad.shape) for grad in grads]
    optimizer = make([{"params": params, **group}])
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    return [param.detach() for param in params]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@every_maker
@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 5, 9), (2, 3, 6, 4), (1, 4, 4), (4, 1, 3), (0, 3, 4), (2, 0, 3)])
def test_a_stack_is_each_of_its_matrices(make, shape):
    grad = random(*shape)
    (stack,) = step(make, [grad], matrix="batch")
    assert stack.shape == grad.shape
    if grad.numel():
        pieces = step(make, list(grad.flatten(0, -3).unbind()))
        torch.testing.assert_close(stack.flatten(0, -3), torch.stack(pieces), rtol=1e-6, atol=1e-7)
        assert not torch.equal(stack, step(make, [grad], matrix="rows")[0])


@every_maker
def test_a_group_of_stacks_takes_plain_matrices_too(make):
    grads = [random(3, 4, 5), random(6, 4)]
    stack, plain = step(make, grads, matrix="batch")
    assert torch.equal(plain, step(make, grads[1:])[0])
    assert torch.equal(stack, step(make, grads[:1], matrix="batch")[0])


@every_maker
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 3, 2, 2)])
def test_columns_are_the_rows_of_the_transposed_weight(make, shape):
    grad = random(*shape)
    (columns,) = step(make, [grad], matrix="columns")
    (rows,) = step(make, [grad.transpose(0, 1).contiguous()], matrix="rows")
    torch.testing.assert_close(columns, rows.transpose(0, 1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_the_rate_of_muon_is_that_of_each_matrix(adjust):
    def make(params):
        return muon(params, adjust_lr_fn=adjust)

    grad = random(3, 8, 2)
    (stack,) = step(make, [grad], matrix="batch")
    torch.testing.assert_close(stack[1], step(make, [grad[1]])[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize, dims", [("layer", (1, 2)), ("component", (2,))])
def test_controls_normalize_each_matrix(normalize, dims):
    grad = random(3, 4, 5)
    (stack,) = step(lambda params: osgd(params, normalize=normalize), [grad], matrix="batch")
    torch.testing.assert_close(stack, -0.1 * grad / torch.linalg.vector_norm(grad, dim=dims, keepdim=True))


@every_maker
def test_an_option_of_the_optimizer_is_for_groups_that_do_not_say_it(make):
    grad = random(3, 4, 5)

    def batched(params):
        return make(params, matrix="batch")

    assert torch.equal(step(batched, [grad])[0], step(make, [grad], matrix="batch")[0])
    assert torch.equal(step(batched, [grad], matrix="rows")[0], step(make, [grad], matrix="rows")[0])


@every_maker
def test_three_dimensions_without_a_choice_warn_once_and_say_which_was_taken(make):
    params = [("experts", parameter(3, 4, 5)), ("kernels", parameter(3, 4, 3, 3)), ("plain", parameter(4, 5))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(params)
        for seed in range(3):
            set_grads([p for _, p in params], seed)
            optimizer.step()
    (message,) = (str(warning.message) for warning in caught if "three dimensions" in str(warning.message))
    assert "'experts'" in message and "'rows'" in message and "matrix='batch'" in message
    assert "kernels" not in message and "plain" not in message
    chosen = step(make, [random(3, 4, 5)], matrix="rows")[0]
    with pytest.warns(UserWarning, match=r"params\[0\] \(3, 4, 5\): of three dimensions"):
        assert torch.equal(step(make, [random(3, 4, 5)])[0], chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(make, [random(3, 4, 5)], matrix="rows")


@every_maker
def test_one_expert_that_is_not_finite_spoils_no_other(make):
    param = parameter(3, 4, 5)
    optimizer = make([{"params": [("experts", param)], "matrix": "batch"}])
    grad = random(3, 4, 5)
    param.grad = grad.clone()
    param.grad[1, 0, 0] = float("nan")
    optimizer.step()
    assert (param[1] == 0).all() and (param[0] != 0).any() and (param[2] != 0).any()
    param.grad = grad
    with pytest.warns(UserWarning, match="the gradient of 'experts', matrix 1 held NaN"):
        optimizer.step()
    assert param.isfinite().all()


@every_maker
def test_a_choice_that_is_none_is_refused(make):
    with pytest.raises(ValueError, match="matrix: expected one of rows, columns, batch, or None, got 'experts'"):
        make([parameter(3, 4)], matrix="experts")
    with pytest.raises(ValueError, match="matrix: expected one of"):
        make([{"params": [parameter(3, 4)], "matrix": "slices"}])
    param = parameter(3, 4)
    optimizer = make([param])
    with pytest.raises(ValueError, match="matrix: expected one of"):
        optimizer.add_param_group({"params": [parameter(3, 4)], "matrix": "slices"})
    optimizer.param_groups[0]["matrix"], param.grad = "slices", torch.ones_like(param)
    with pytest.raises(ValueError, match="matrix: expected one of"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1 and not param.any() and not optimizer.state


def test_the_choice_is_saved_and_one_that_is_missing_stays():
    p, q = parameter(3, 4, 5), parameter(3, 4, 5)
    source = muon([{"params": [p], "matrix": "batch"}])
    train(source, [0])
    target = muon([{"params": [q], "matrix": "rows"}])
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["matrix"] == "batch"
    saved = source.state_dict()
    del saved["param_groups"][0]["matrix"]
    target.param_groups[0]["matrix"] = "columns"
    target.load_state_dict(saved)
    assert target.param_groups[0]["matrix"] == "columns"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 6, 8))
        self.bias = nn.Parameter(torch.zeros(4, 8))


class Conv1D(nn.Module):
    """As transformers has it: (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 8))
        self.bias = nn.Parameter(torch.zeros(8))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.positions = nn.Parameter(torch.zeros(1, 9, 6))
        self.mixing = Experts()
        self.dense = Conv1D()
        self.filters = nn.Conv1d(6, 6, 3)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3))
        self.norm = nn.LayerNorm((4, 9, 6))
        self.head = nn.Linear(6, 2)


def test_param_groups_see_stacks_and_transposed_weights_and_print_what_went_where(capsys):
    groups = fastcurv.param_groups(Model())
    found = {(g["orthogonal"], g.get("matrix")): [name for name, _ in g["params"]] for g in groups}
    assert found[True, "rows"] == ["filters.weight", "head.weight"]
    assert found[True, "columns"] == ["dense.weight"]
    assert found[True, "batch"] == ["mixing.up"]
    assert {"class_token", "positions", "mixing.bias", "norm.weight"} <= set(found[False, None])
    assert sum(len(names) for names in found.values()) == len(list(Model().parameters()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "orthogonal, matrix='batch': 1 parameters, 192 elements: mixing.up" in lines
    assert lines[-1].startswith("not orthogonal: ") and "positions" in lines[-1]
    fastcurv.param_groups(Model(), verbose=False)
    assert not capsys.readouterr().out
    assert "mixing.up" not in dict(fastcurv.param_groups(Model(), "conv", verbose=False)[0]["params"])


@every_maker
def test_groups_of_a_model_train_without_a_warning(make):
    model = Model().to(DEVICE)
    optimizer = make(fastcurv.param_groups(model, verbose=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, range(2))
    assert all(param.isfinite().all() and param.any() for param in model.parameters())
