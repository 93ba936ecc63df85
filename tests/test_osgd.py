"""fastcurv.OSGD, fastcurv.Orthogonal and fastcurv.param_groups, against Algorithm 6 of the thesis."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import DEVICE, matrix_backends
from torch import nn
from training import assert_same_weights, copy_weights, network, parameters_of, set_grads, train

import fastcurv

BACKENDS = [*matrix_backends(), "reference"]
BASES = {
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "torch Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "fastcurv SGD": lambda p: fastcurv.SGD(p, lr=0.1, momentum=0.9),
    "fastcurv Adam": lambda p: fastcurv.Adam(p, lr=0.05),
    "fastcurv Lookahead": lambda p: fastcurv.Lookahead(torch.optim.SGD(p, lr=0.1), k=2),
}
every_base = pytest.mark.parametrize("base", BASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def nearest_orthonormal(grad):
    """Equation 5.7, with the thin decomposition."""
    u, _, vh = torch.linalg.svd(grad.flatten(1), full_matrices=False)
    return (u @ vh).view(grad.shape)


def algorithm_6(params, take_step, grads):
    """Line by line: gradients of matrices are replaced, then any optimizer takes its step."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = nearest_orthonormal(grad) if grad.dim() > 1 else grad.clone()
    take_step()


def assert_close(a, b, tolerance=1e-11):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def grads_of(params):
    return [p.grad.clone() for p in params]


@every_backend
@every_base
def test_algorithm_6_around_any_optimizer(base, backend):
    mine, theirs = network(), network()
    optimizer = fastcurv.Orthogonal(BASES[base](mine.parameters()), backend=backend)
    plain = BASES[base](theirs.parameters())
    a, b = list(mine.parameters()), list(theirs.parameters())
    for step in range(6):
        set_grads(a, step)
        objects, contents = [p.grad for p in a], grads_of(a)
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(a, objects, contents, strict=True))
        algorithm_6(b, plain.step, contents)
    assert_close(a, b)


@every_backend
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.0}, {"weight_decay": 0.1}, {"nesterov": True}, {"dampening": 0.3}, {"maximize": True, "lr": 0.3},
])  # fmt: skip
def test_osgd_is_sgd_on_orthogonalised_gradients(options, backend):
    mine, theirs = network(), network()
    a, b = list(mine.parameters()), list(theirs.parameters())
    settings = {"lr": 0.1, "momentum": 0.9, **options}
    optimizer, plain = fastcurv.OSGD(a, backend=backend, **settings), torch.optim.SGD(b, **settings)
    for step in range(6):
        set_grads(a, step)
        contents = grads_of(a)
        optimizer.step()
        assert all(torch.equal(p.grad, c) for p, c in zip(a, contents, strict=True))
        algorithm_6(b, plain.step, contents)
    assert_close(a, b)


@pytest.mark.parametrize("method, options", [
    ("polar", {}), ("polar", {"rank_policy": "complete"}), ("gram_schmidt", {}),
    ("gram_schmidt", {"rank_policy": "complete"}), ("newton_schulz", {"coefficients": "polar_express", "steps": 9}),
])  # fmt: skip
@pytest.mark.parametrize("cls", ["OSGD", "Orthogonal"])
def test_methods(cls, method, options):
    p = nn.Parameter(torch.zeros(6, 4, 3, device=DEVICE))
    optimizer = (
        fastcurv.OSGD([p], lr=1.0, momentum=0.0, method=method, **options)
        if cls == "OSGD"
        else fastcurv.Orthogonal(torch.optim.SGD([p], lr=1.0), method=method, **options)
    )
    set_grads([p], 0)
    with torch.no_grad():
        p.grad[2] = 0
    expected = fastcurv.ops.orthogonalize([p.grad], method=method, **options)[0]
    optimizer.step()
    assert torch.equal(p, -expected)
    assert bool(p[2].any()) is (options.get("rank_policy") == "complete")


def test_controls_of_table_5_5():
    p = nn.Parameter(torch.zeros(6, 4, 3, device=DEVICE))
    set_grads([p], 0)
    for how, expected in [
        ("layer", p.grad / p.grad.norm()),
        ("component", p.grad / p.grad.flatten(1).norm(dim=1)[:, None, None]),
    ]:
        p.data.zero_()
        fastcurv.OSGD([p], lr=1.0, momentum=0.0, normalize=how).step()
        torch.testing.assert_close(p.data, -expected)


def test_clipping_comes_after():
    net = network()
    params = list(net.parameters())
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    contents = grads_of(params)
    fastcurv.OSGD(params, lr=1.0, momentum=0.0, max_norm=0.5).step()
    moved = [b - p for b, p in zip(before, params, strict=True)]
    shown = [nearest_orthonormal(g) if g.dim() > 1 else g for g in contents]
    total = torch.stack([g.norm() for g in shown]).norm()
    assert_close(moved, [0.5 / total * g for g in shown], 1e-5)
    assert all(torch.equal(p.grad, c) for p, c in zip(params, contents, strict=True))


def test_gradients_come_back_after_an_exception():
    p, q = (nn.Parameter(torch.zeros(4, 3, device=DEVICE)) for _ in range(2))

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            assert not torch.equal(p.grad, contents)
            raise RuntimeError("on purpose")

    set_grads([p], 0)
    grad, contents = p.grad, p.grad.clone()
    with pytest.raises(RuntimeError, match="on purpose"):
        fastcurv.Orthogonal(Fails([p, q], lr=0.1)).step()
    assert p.grad is grad and torch.equal(grad, contents) and q.grad is None


@pytest.mark.parametrize("make", [
    lambda p: fastcurv.OSGD(p, lr=0.01), lambda p: fastcurv.Orthogonal(torch.optim.SGD(p, lr=0.01)),
    lambda p: fastcurv.Orthogonal(torch.optim.LBFGS(p, lr=0.01, max_iter=3)),
])  # fmt: skip
def test_closure_runs_first_and_its_loss_is_returned(make):
    p = nn.Parameter(torch.eye(3, 4, device=DEVICE))
    optimizer = make([p])
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        seen.append(p.grad.clone())
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and losses[0] == 3.0
    assert torch.equal(p.grad, seen[-1])


@pytest.mark.parametrize("wrapped", [False, True])
def test_grad_scaler(wrapped):
    def make(params):
        return fastcurv.Orthogonal(torch.optim.Adam(params, lr=0.1)) if wrapped else fastcurv.OSGD(params, lr=0.1)

    a, b = list(network(torch.float32).parameters()), list(network(torch.float32).parameters())
    mine, plain = make(a), make(b)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=100)
    for step in range(5):
        set_grads(a, step)
        set_grads(b, step)
        for p in a:
            p.grad *= scaler.scale(torch.ones((), device=DEVICE))
        if step == 2:
            a[0].grad.view(-1)[0] = float("inf")
        scaler.step(mine)
        scaler.update()
        if step != 2:
            plain.step()
    assert_close(a, b, 1e-5)


@pytest.mark.parametrize("make", [
    lambda p: fastcurv.OSGD(p, lr=0.1, method="gram_schmidt"),
    lambda p: fastcurv.Orthogonal(torch.optim.Adam(p, lr=0.1), method="gram_schmidt"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_continues_from_a_copy(make, how):
    source, target = network(), network()
    groups = fastcurv.param_groups(source, skip_last_linear=True)
    a = make(groups)
    train(a, range(3))
    if how == "state_dict":
        copy_weights(source.parameters(), target.parameters())
        b = make(fastcurv.param_groups(target, skip_last_linear=True))
        saved = copy.deepcopy(a.state_dict())
        for group in saved["param_groups"]:
            del group["orthogonal"]  # as torch.optim would have saved it
        b.load_state_dict(saved)
        assert [g["orthogonal"] for g in b.param_groups] == [True, False]
    else:
        b = pickle.loads(pickle.dumps(a)) if how == "pickle" else copy.deepcopy(a)
    train(a, range(3, 7))
    train(b, range(3, 7))
    assert_same_weights(parameters_of(a), parameters_of(b))


@pytest.mark.parametrize("wrapped", [False, True])
def test_groups_say_what_is_orthogonalised(wrapped):
    net = network()
    groups = fastcurv.param_groups(net, orthogonal="conv")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = (
        fastcurv.Orthogonal(torch.optim.SGD(groups, lr=1.0)) if wrapped else fastcurv.OSGD(groups, lr=1.0, momentum=0.0)
    )
    train(optimizer, [0])
    for name, p in net.named_parameters():
        shown = nearest_orthonormal(p.grad) if name == "0.weight" else p.grad
        torch.testing.assert_close(before[name] - p, shown)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_that_is_not_finite_is_left_out_and_named_at_the_next_step(named, wrapped):
    net = network(torch.float32)
    params = net.named_parameters() if named else net.parameters()
    optimizer = (
        fastcurv.Orthogonal(torch.optim.SGD(params, lr=0.1)) if wrapped else fastcurv.OSGD(params, lr=0.1, momentum=0.0)
    )
    weights = list(net.parameters())
    set_grads(weights, 0)
    weights[0].grad[1] = float("nan")
    before = [p.detach().clone() for p in weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(weights[0], before[0]) and not torch.equal(weights[4], before[4])
    set_grads(weights, 1)
    name = "'0.weight'" if named else r"group 0, params\[0\] \(5, 2, 3, 3\)"
    with pytest.warns(UserWarning, match=f"the gradient of {name} held NaN or infinity"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(p.isfinite().all() for p in weights)


@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_fire_once_and_schedulers_take_either(wrapped):
    p = nn.Parameter(torch.eye(3, device=DEVICE))
    optimizer = fastcurv.Orthogonal(torch.optim.SGD([p], lr=1.0)) if wrapped else fastcurv.OSGD([p], lr=1.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    set_grads([p], 0)
    optimizer.step()
    scheduler.step()
    assert calls == ["before", "after"] and optimizer.param_groups[0]["lr"] == 0.5
    optimizer.zero_grad()
    assert p.grad is None


def test_gradients_accumulate_before_they_are_orthogonalised():
    p, q = (nn.Parameter(torch.eye(3, 4, device=DEVICE)) for _ in range(2))
    batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3)]
    for batch in batches:
        (batch @ p.t()).square().sum().backward()
    torch.cat([batch @ q.t() for batch in batches]).square().sum().backward()
    for x in (p, q):
        fastcurv.OSGD([x], lr=0.1).step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_step(fullgraph):
    a, b = network(), network()
    compiled, eager = (fastcurv.OSGD(n.parameters(), lr=0.1) for n in (a, b))
    step = torch.compile(lambda: compiled.step(), backend="aot_eager", fullgraph=fullgraph)
    for number in range(3):
        set_grads(list(a.parameters()), number)
        set_grads(list(b.parameters()), number)
        step()
        eager.step()
    assert_close(a.parameters(), b.parameters())


@pytest.mark.parametrize("options, match", [
    ({"method": "svd"}, "method: expected one of polar, gram_schmidt, newton_schulz"),
    ({"rank_policy": "full"}, "rank_policy: expected one of isometry, complete"),
    ({"normalize": "filter"}, "normalize: expected 'layer', 'component' or None, got 'filter'"),
    ({"max_norm": -1.0}, r"max_norm: expected a value in \[0, inf\)"),
])  # fmt: skip
def test_constructors(options, match):
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=match):
        fastcurv.OSGD([p], **options)
    with pytest.raises(ValueError, match=match):
        fastcurv.Orthogonal(torch.optim.SGD([p], lr=0.1), **options)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got str"):
        fastcurv.Orthogonal("sgd")


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"normalize": "layer"}])
def test_a_bad_gradient_is_named_and_nothing_is_written(options):
    p, q = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = fastcurv.OSGD([("first", p), ("second", q)], lr=0.1, **options)
    p.grad, q.grad = torch.ones(3, 3), torch.ones(3, 3).to_sparse()
    with pytest.raises(ValueError, match="the gradient of 'second': expected a dense tensor, got layout"):
        optimizer.step()
    assert p.sum() == 9 and not optimizer.state and q.grad.is_sparse


def test_a_wrapper_in_a_wrapper_around_lbfgs():
    makes = {
        "one": lambda p: fastcurv.Orthogonal(torch.optim.LBFGS(p, max_iter=3)),
        "two": lambda p: fastcurv.Orthogonal(fastcurv.Orthogonal(torch.optim.LBFGS(p, max_iter=3))),
        "Lookahead": lambda p: fastcurv.Orthogonal(fastcurv.Lookahead(torch.optim.LBFGS(p, max_iter=3), k=9)),
    }
    found = {}
    for name, make in makes.items():
        p = nn.Parameter(torch.eye(3, 4, dtype=torch.float64, device=DEVICE))
        optimizer = make([p])

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p - 2).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) == (torch.eye(3, 4) - 2).square().sum()
        found[name] = p.detach()
    assert_close([found["two"], found["Lookahead"]], [found["one"], found["one"]])


def test_what_is_not_finite_spoils_nothing_else():
    w, bias = nn.Parameter(torch.ones(2, 3, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer = fastcurv.OSGD([w, bias], lr=0.1, max_norm=1.0)
    w.grad, bias.grad = torch.eye(2, 3, device=DEVICE), torch.full((2,), torch.nan, device=DEVICE)
    optimizer.step()
    torch.testing.assert_close(
        w.detach(), torch.ones(2, 3, device=DEVICE) - 0.1 * torch.eye(2, 3, device=DEVICE) / 2**0.5
    )
    for normalize in ("layer", "component"):
        v = nn.Parameter(torch.ones(2, 3, device=DEVICE))
        optimizer = fastcurv.OSGD([v], lr=0.1, normalize=normalize)
        v.grad = torch.full((2, 3), torch.inf, device=DEVICE)
        optimizer.step()
        assert torch.equal(v, torch.ones_like(v))
        v.grad = torch.ones(2, 3, device=DEVICE)
        with pytest.warns(UserWarning, match="held NaN or infinity"):
            optimizer.step()


def test_controls_of_float16_gradients():
    for value in (300.0, 6e-8):
        p = nn.Parameter(torch.zeros(300, 300, dtype=torch.float16, device=DEVICE))
        p.grad = torch.full_like(p, value)
        fastcurv.OSGD([p], lr=1.0, momentum=0.0, normalize="layer").step()
        torch.testing.assert_close(p.detach().float().norm(), torch.tensor(1.0, device=DEVICE), rtol=1e-2, atol=0)


def test_inference_mode_on_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            params = [nn.Parameter(torch.zeros(150, 200, device=DEVICE)) for _ in range(4)]
            for p in params:
                p.grad = torch.randn(150, 200, device=DEVICE)
            fastcurv.OSGD(params, lr=0.1).step()
            assert all(p.any() for p in params)
    finally:
        torch.set_num_threads(before)


def test_a_switch_that_is_none():
    with pytest.raises(ValueError, match="orthogonal: expected True or False, got 'x'"):
        fastcurv.OSGD([{"params": [nn.Parameter(torch.zeros(2, 2))], "orthogonal": "x"}])


@pytest.mark.parametrize("option", [{"method": "gram_schmidt"}, {"max_norm": 1.0}, {"steps": 3}])
def test_a_group_with_an_option_of_all_groups(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: expected as an argument of the optimizer, for all its groups"):
        fastcurv.OSGD([{"params": [nn.Parameter(torch.zeros(2, 2))], **option}])


def test_gradients_that_are_negated_views():
    grad = torch.randn(4, 6, device=DEVICE)
    for method in ("polar", "gram_schmidt", "newton_schulz"):
        (found,), (expected,) = (fastcurv.ops.orthogonalize([g], method=method) for g in (torch._neg_view(grad), -grad))
        assert torch.equal(found, expected)
