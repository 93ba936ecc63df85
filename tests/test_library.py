"""What torch.library promises: opcheck, fake tensors, torch.compile, version counters."""

import cases
import pytest
import torch
from cases import DEVICE, OPTIONS, assert_same_bits, make_case, op_of, options_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training import OURS, make, set_grads

import fastcurv
from fastcurv import _backend

OPS = _backend.OPS
every_op = pytest.mark.parametrize("op", OPS)
SHAPES = [(3, 4), (), (0,), (9,)]


def busy(op, shapes=SHAPES, **options):
    name = "everything" if "everything" in OPTIONS[op] else "plain"
    return make_case(op, shapes, **{**options_of(op, name), **options})


def registered(op):
    return getattr(torch.ops.fastcurv, f"{op}_").default


def arguments(case, **tensors):
    """As the schema has them: numbers, and the tensors that take the place of some."""
    scalars = op_of(case.op).scalars
    return tuple(case.arguments), {**case.options_in_full, "tensors": [tensors.get(name) for name in scalars]}


@pytest.mark.parametrize("op, options", [
    *((op, name) for op in OPS for name in ("plain", "everything") if name in OPTIONS[op]),
    ("adam", "nadam"), ("sgd", "no-momentum"),
])  # fmt: skip
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, options, requires_grad):
    case = make_case(op, SHAPES, **options_of(op, options))
    for p in case["params"]:
        p.requires_grad_(requires_grad)
    positional, keywords = arguments(case)
    torch.library.opcheck(registered(op), positional, keywords)


@every_op
def test_opcheck_with_tensor_hyper_parameters(op):
    name = op_of(op).scalars[0]
    positional, keywords = arguments(busy(op, [(3, 4)]), **{name: torch.tensor(0.5, device=DEVICE)})
    torch.library.opcheck(registered(op), positional, keywords)


@every_op
def test_registered_op_is_the_op(op):
    case = busy(op, **({"k": 1} if op == "ranger" else {}))
    expected, through = cases.run(case, None), case.clone()
    positional, keywords = arguments(through)
    versions = {name: [t._version for t in tensors] for name, tensors in through.lists.items()}
    registered(op)(*positional, **keywords)
    assert_same_bits(through, expected)
    for name, tensors in through.lists.items():
        for tensor, version in zip(tensors, versions[name], strict=True):
            assert not tensor.numel() or (tensor._version > version) == (name in through.outputs), name


@every_op
def test_fake_and_meta_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = make_case(op, SHAPES, device=torch.device("meta"))
    op_of(op)(*case.arguments, **case.options)
    with FakeTensorMode():
        case = make_case(op, [(3, 2)], device=torch.device("cpu"))
        op_of(op)(*case.arguments, **case.options)


# Inductor once per family; aot_eager everywhere.
INDUCTOR = ("adam", "ranger")


@pytest.mark.compile
@pytest.mark.parametrize("op, compiler", [*((op, "aot_eager") for op in OPS), *((op, "inductor") for op in INDUCTOR)])
def test_compiled_op(op, compiler):
    torch._dynamo.reset()
    case = busy(op, [(3, 4), (65,)])
    compiled, rate = case.clone(), op_of(op).scalars[0]

    @torch.compile(fullgraph=True, backend=compiler)
    def step(lists, lr):
        op_of(op)(*lists, **{**compiled.options, rate: lr})

    step(compiled.arguments, case.options[rate])
    assert_same_bits(compiled, cases.run(case, None))


@pytest.mark.compile
@pytest.mark.parametrize("name, compiler", [*((n, "aot_eager") for n in OURS), ("AdamW", "inductor"), ("Ranger", "inductor")])  # fmt: skip
@pytest.mark.parametrize("started", [False, True])
def test_compiled_step(name, compiler, started):
    torch._dynamo.reset()
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(DEVICE)
        optimizer = make(name, net.parameters(), lr=torch.tensor(0.125))
        eager = optimizer.step
        for step in range(4):
            set_grads(net.parameters(), step)
            optimizer.param_groups[0]["lr"].fill_(0.125 / (step + 1))
            if compile_it and (step or not started):
                torch.compile(optimizer.step, fullgraph=True, backend=compiler)()
            else:
                eager()
        results.append([p.detach() for p in net.parameters()])
        assert all(s["step"] == 4 for s in optimizer.state.values() if "step" in s)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Ranger", "Nero"])
def test_changing_a_tensor_learning_rate_recompiles_nothing(name):
    torch._dynamo.reset()
    p = nn.Parameter(torch.ones(5, 2, device=DEVICE))
    optimizer = make(name, [p], lr=torch.tensor(0.1))
    p.grad = torch.ones_like(p)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    step()
    frames = counter.frame_count
    for lr in (0.2, 0.3, 0.4):
        optimizer.param_groups[0]["lr"].fill_(lr)
        step()
    assert counter.frame_count - frames <= 1  # the state exists from the second step on
    assert all(s["step"] == 4 for s in optimizer.state.values() if "step" in s)


@pytest.mark.compile
def test_lookahead_compiles_around_what_it_wraps():
    """Without fullgraph: whether this is a slow step is decided in Python, on a count that changes each time."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        p = nn.Parameter(torch.ones(5, device=DEVICE))
        optimizer = fastcurv.Lookahead(fastcurv.SGD([p], lr=0.1), k=2)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for i in range(4):
            set_grads([p], i)
            step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", OURS)
def test_tensors_without_memory(name, kind):
    """People size a training run by them."""
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
        optimizer = make(name, params)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
    assert optimizer.state[params[0]] and all(v.numel() for v in optimizer.state[params[0]].values())
