"""Cases of the op `adam`: for `fastcurv bench adam`, and for `pytest bench`, which compares commits."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastcurv
from fastcurv import _backend
from fastcurv.ops import adam as op

from . import models
from .harness import Case, Options, Role
from .stepping import Buffers, Implementation, StepCase, state_lists


def _torch(**options: Any) -> Callable[[list[Parameter], float], Optimizer]:
    return lambda params, lr: torch.optim.Adam(params, lr=lr, **options)


def _compiled(params: list[Parameter], lr: float) -> Optimizer:
    # A tensor, for a number would be a constant of the compiled code; on a GPU torch takes one only with capturable.
    rate = torch.tensor(lr, device=params[0].device)
    return torch.optim.Adam(params, lr=rate, capturable=params[0].is_cuda)


def _optimi(params: list[Parameter], lr: float) -> Optimizer:
    on_gpu = params[0].is_cuda
    optimizer = importlib.import_module("optimi").Adam
    return optimizer(  # type: ignore[no-any-return]
        params, lr=lr, betas=(0.9, 0.999), eps=1e-8, foreach=not on_gpu, triton=on_gpu
    )


def _qhadam(params: list[Parameter], lr: float) -> Optimizer:
    # Its Adam is torch's own class; of what it implements itself, QHAdam with its default nus=(1, 1) is Adam.
    optimizer = importlib.import_module("pytorch_optimizer").QHAdam
    return optimizer(params, lr=lr, foreach=True)  # type: ignore[no-any-return]


PEERS = {"torch-optimi": ("optimi", _optimi), "pytorch_optimizer QHAdam": ("pytorch_optimizer", _qhadam)}


def implementations(options: Options, dtype: torch.dtype) -> list[Implementation]:
    """Who computes Adam: the back ends of fastcurv that can run, torch, and other libraries.

    Args:
        options: Device; whether to include torch.compile and other libraries.
        dtype: Of the parameters.
    """
    on_gpu = options.device == "cuda"
    half = dtype.itemsize == 2
    ours = 8 if half else 2 * dtype.itemsize
    theirs = 2 * dtype.itemsize
    # In 16 bits they keep 16-bit state: less to move, and less precise.
    note = f"its state is {dtype}, ours float32".replace("torch.", "") if half else ""
    found = []
    for backend in _backend.BACKENDS:
        interpreted = backend == "triton" and _backend.interpreting()
        if not interpreted and not _backend.unusable("adam", backend, torch.device(options.device)):
            make = functools.partial(_fastcurv, backend=backend)
            role: Role = "reference" if backend == "reference" else "ours"
            found.append(Implementation(f"fastcurv {backend}", role, make, ours))
    found += [
        # On a GPU its step counts are on the device in any case; capturable only allows it into a CUDA graph.
        Implementation("torch fused", "torch", _torch(fused=True, capturable=on_gpu), theirs, note=note),
        Implementation("torch foreach", "torch", _torch(foreach=True), theirs, note=note),
        Implementation("torch loop", "torch", _torch(foreach=False), theirs, note=note),
    ]
    if options.compile:
        found.append(Implementation("torch compile", "torch", _compiled, theirs, compiled=True, note=note))
    for name, (module, make_peer) in PEERS.items() if options.peers else ():
        if importlib.util.find_spec(module) is not None:
            found.append(Implementation(name, "peer", make_peer, theirs, note=note))
    return found


def _fastcurv(params: list[Parameter], lr: float, backend: str) -> Optimizer:
    return fastcurv.Adam(params, lr=lr, backend=backend)


def buffers(optimizer: Any) -> Buffers:
    """What a step of `fastcurv.Adam` reads and writes, and the bare call of its implementation.

    Args:
        optimizer: A `fastcurv.Adam`, after a step.
    """
    params, (exp_avgs, exp_avg_sqs, steps) = state_lists(optimizer, ("exp_avg", "exp_avg_sq", "step"))
    grads = [param.grad for param in params if param.grad is not None]
    device = params[0].device
    name, implementation = _backend.choose("adam", device, optimizer.backend)
    space = op.workspace()
    lists = space.prepare([params, grads, exp_avgs, exp_avg_sqs, [], steps])
    table = space._device_table(_backend.CHUNK_ELEMENTS[name], device)
    scalars = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    flags = {"decoupled_weight_decay": False, "amsgrad": False, "maximize": False}
    kernel = functools.partial(implementation, *lists, table, **scalars, **flags, grad_scale=None, found_inf=None)
    return Buffers(read=[grads], written=[params, exp_avgs, exp_avg_sqs], kernel=kernel)


_adam = functools.partial(
    StepCase,
    "adam",
    implementations=implementations,
    truth=_torch(foreach=False),
    buffers=buffers,
    bytes_per_element=28,
)
_half = functools.partial(_adam, dtype=torch.bfloat16, bytes_per_element=22, baseline="")
_CPU, _GPU = ("cpu",), ("cuda",)

CASES: list[Case] = [
    _adam("1x50M", "Adam, one tensor of 50M", devices=_CPU, shapes=lambda: models.single(50_000_000)),
    _adam("2000x5k", "Adam, 2000 tensors of 5000", shapes=lambda: models.many(2000, 5000)),
    _adam("resnet20", "Adam, ResNet-20", shapes=models.resnet20),
    _adam("resnet50", "Adam, ResNet-50", shapes=models.resnet50),
    _adam("mnist", "Adam, MNIST autoencoder", shapes=models.mnist),
    _adam("gpt2", "Adam, GPT-2 124M", shapes=models.gpt2),
    _half("1x50M-bf16", "Adam, one bfloat16 tensor of 50M", devices=_CPU, shapes=lambda: models.single(50_000_000)),
    _adam("300x64", "Adam, 300 tensors of 64", shapes=lambda: models.many(300, 64), has_ceiling=False),
    _adam("1x1e9", "Adam, one tensor of 1e9", devices=_GPU, shapes=lambda: models.single(1_000_000_000)),
    _half("1x1e9-bf16", "Adam, one bfloat16 tensor of 1e9", devices=_GPU, shapes=lambda: models.single(1_000_000_000)),
    _adam("llama_1b", "Adam, Llama 3.2 1B", devices=_GPU, shapes=models.llama_1b),
]


def pytest_generate_tests(metafunc: Any) -> None:
    """One benchmark for each back end of fastcurv that runs here, in each case."""
    options = Options("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in CASES if options.device in case.devices]
    rows = list(itertools.chain.from_iterable(((case, c) for c in case.contenders(options)) for case in cases))
    rows = [(case, contender) for case, contender in rows if contender.role == "ours"]
    metafunc.parametrize("contender", [c for _, c in rows], ids=[f"{case.name}-{c.name}" for case, c in rows])


def test_step(benchmark: Any, contender: Any) -> None:
    """`opt.step()`, right and then timed."""
    assert not contender.verify()
    call = contender.prepare().call

    def step() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark(step)
