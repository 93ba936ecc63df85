"""What torch.library promises: opcheck, fake tensors, torch.compile, export, version counters."""

import cases
import pytest
import torch
from cases import DEVICE, adam_case, adam_options, assert_same_bits
from torch import nn

import fastcurv
from fastcurv import ops


def arguments(case):
    options = {
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "maximize": False,
        "grad_scale": None,
        "found_inf": None,
    }
    return tuple(case.lists), {**options, **case.options, "tensors": [None] * 5}


@pytest.mark.parametrize("options", ["plain", "amsgrad", "everything"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(options, requires_grad, generator):
    case = adam_case([(3, 4), (), (0,), (9,)], generator=generator, **adam_options(options))
    for p in case.params:
        p.requires_grad_(requires_grad)
    positional, keywords = arguments(case)
    torch.library.opcheck(torch.ops.fastcurv.adam_.default, positional, keywords)


def test_opcheck_with_tensor_hyper_parameters(generator):
    case = adam_case([(3, 4)], generator=generator)
    positional, keywords = arguments(case)
    keywords["tensors"] = [torch.tensor(0.5, device=DEVICE), None, None, None, None]
    torch.library.opcheck(torch.ops.fastcurv.adam_.default, positional, keywords)


def test_registered_op_is_the_op(generator):
    case = adam_case(generator=generator)
    expected, through = cases.run_adam(case, None), case.clone()
    positional, keywords = arguments(through)
    versions = [p._version for p in through.params]
    torch.ops.fastcurv.adam_(*positional, **keywords)
    assert_same_bits(through, expected)
    assert all(p._version > v for p, v in zip(through.params, versions, strict=True))


def test_fake_and_meta_tensors(generator):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p, m, v, t = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
        ops.adam_([p], [p], [m], [v], [], [t])
    case = adam_case([(3,)], device=torch.device("meta"))
    ops.adam_(*case.lists, **case.options)


# One family, one Inductor run; aot_eager everywhere.
@pytest.mark.compile
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_op(compiler, generator):
    case = adam_case([(3, 4), (65,)], generator=generator, amsgrad=True, weight_decay=0.1)
    compiled = case.clone()

    @torch.compile(fullgraph=True, backend=compiler)
    def step(lists, lr):
        ops.adam_(*lists, **{**case.options, "lr": lr})

    step(compiled.lists, case.options["lr"])
    assert_same_bits(compiled, cases.run_adam(case, None))


@pytest.mark.compile
@pytest.mark.parametrize("cls", [fastcurv.Adam, fastcurv.AdamW])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("started", [False, True])
def test_compiled_step(cls, compiler, started):
    if compiler == "inductor" and cls is fastcurv.Adam:
        pytest.skip("one Inductor run per family")
    torch._dynamo.reset()
    nets, results = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(DEVICE))
    for net, compile_it in zip(nets, (False, True), strict=True):
        optimizer = cls(net.parameters(), lr=torch.tensor(0.1), amsgrad=True)
        eager = optimizer.step
        for step in range(4):
            for i, p in enumerate(net.parameters()):
                p.grad = torch.full_like(p, 0.1 * step + i)
            optimizer.param_groups[0]["lr"].fill_(0.1 / (step + 1))
            if compile_it and (step or not started):
                torch.compile(optimizer.step, fullgraph=True, backend=compiler)()
            else:
                eager()
        results.append([p.detach() for p in net.parameters()])
        assert all(s["step"] == 4 for s in optimizer.state.values())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compile
def test_changing_a_tensor_learning_rate_recompiles_nothing():
    torch._dynamo.reset()
    p = nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = fastcurv.AdamW([p], lr=torch.tensor(0.1))
    p.grad = torch.ones_like(p)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    step()
    frames = counter.frame_count
    for lr in (0.2, 0.3, 0.4):
        optimizer.param_groups[0]["lr"].fill_(lr)
        step()
    assert counter.frame_count - frames <= 1  # the state exists from the second step on
    assert optimizer.state[p]["step"] == 4
