"""Inputs, implementations and error bounds that the tests of all ops share."""

from __future__ import annotations

import importlib
import inspect
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import truths
from torch import Tensor

from fastcurv import _backend, _check, ops
from fastcurv.ops._multi_tensor import MultiTensorOp

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CPU = torch.device("cpu")

# Where something has broken somebody: empty, 0-d, one element, rows of one or none, around vector widths and chunks.
AWKWARD_SHAPES = (
    (0,),
    (3, 4),
    (),
    (1,),
    (0, 5),
    (7,),
    (8,),
    (9,),
    (64, 33),
    (8191,),
    (5, 1),
    (8193,),
    (2, 0),
    (16385,),
    (3, 2, 5, 1),
    (1, 6),
    (0,),
)
SMALL_SHAPES = ((0,), (3, 4), (), (7,), (0, 5), (4, 33), (5, 1), (3, 2, 5, 1), (0,))  # for Triton's interpreter

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
}

# Large steps, so that nothing hides behind a small one. k = 4: of the steps 3 to 8 two synchronise; beta2 = 0.9: RAdam
# rectifies from the sixth on.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.1, "beta1": 0.75, "beta2": 0.9, "eps": 1e-3},
    "lamb": {"lr": 0.1, "beta1": 0.75, "beta2": 0.9, "eps": 1e-3},
    "lars": {"lr": 0.1, "momentum": 0.75, "trust_coefficient": 0.5, "eps": 1e-3},
    "lookahead": {"alpha": 0.3},
    "nero": {"lr": 0.1, "beta": 0.9},
    "ranger": {"lr": 0.1, "beta1": 0.75, "beta2": 0.9, "eps": 1e-3, "alpha": 0.3, "k": 4},
    "sgd": {"lr": 0.1, "momentum": 0.75},
}

_SCALED = {"grad_scale": 24.0}
_REVERSED = {"maximize": True, "weight_decay": 0.1}
# The options that change what is computed.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {
        "plain": {},
        "l2": {"weight_decay": 0.3},
        "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
        "amsgrad": {"rule": "amsgrad"},
        "radam": {"rule": "radam", "weight_decay": 0.1},
        "radam-decoupled": {"rule": "radam", "weight_decay": 0.1, "decoupled_weight_decay": True},
        "nadam": {"rule": "nadam", "mu_decay": 0.96**0.5},
        "nadam-decoupled": {"rule": "nadam", "mu_decay": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
        "yogi": {"rule": "yogi"},
        "maximize": _REVERSED,
        "grad_scale": _SCALED,
        "zero-betas": {"beta1": 0.0, "beta2": 0.0},
        "everything": {
            "rule": "amsgrad", "maximize": True, "grad_scale": 3.0, "weight_decay": 0.2, "decoupled_weight_decay": True,
        },
    },
    "lamb": {
        "plain": {},
        "decay": {"weight_decay": 0.3},
        "not-adaptive": {"adaptive": False, "weight_decay": 0.3},
        "zero-betas": {"beta1": 0.0, "beta2": 0.0},
        "everything": {"maximize": True, "grad_scale": 3.0, "weight_decay": 0.2},
    },
    "lars": {
        "plain": {},
        "decay": {"weight_decay": 0.3},
        "nesterov": {"nesterov": True, "weight_decay": 0.1},
        "not-adaptive": {"adaptive": False, "weight_decay": 0.3},
        "no-momentum": {"momentum": 0.0},
        "everything": {"nesterov": True, "maximize": True, "grad_scale": 3.0, "weight_decay": 0.2},
    },
    "lookahead": {"plain": {}, "zero": {"alpha": 0.0}, "one": {"alpha": 1.0}},
    "nero": {
        "plain": {},
        "unconstrained": {"constraints": False},
        "zero-beta": {"beta": 0.0},
        "everything": {"maximize": True, "grad_scale": 3.0},
    },
    "ranger": {
        "plain": {},
        "decay": {"weight_decay": 0.3},
        "scaled-decay": {"weight_decay": 0.3, "scaled_weight_decay": True},
        "no-gc": {"use_gc": False},
        "gc-conv-only": {"gc_conv_only": True},
        "every-step": {"k": 1},
        "threshold": {"n_sma_threshold": 3.0},
        "never-rectified": {"beta2": 0.5},
        "zero-betas": {"beta1": 0.0, "beta2": 0.0},
        "everything": {"maximize": True, "grad_scale": 3.0, "weight_decay": 0.2, "alpha": 1.0},
    },
    "sgd": {
        "plain": {},
        "no-momentum": {"momentum": 0.0, "weight_decay": 0.1},
        "l2": {"weight_decay": 0.3},
        "nesterov": {"nesterov": True, "weight_decay": 0.1},
        "dampening": {"dampening": 0.25},
        "first-step": {"dampening": 0.25, "is_first_step": True},
        "everything": {"nesterov": True, "maximize": True, "grad_scale": 3.0, "weight_decay": 0.2},
    },
}  # fmt: skip


def op_of(name: str) -> MultiTensorOp[Any]:
    return getattr(ops, f"{name}_")


def full(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """All keyword arguments of the implementations."""
    parameters = inspect.signature(op_of(op)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "backend"}
    return {**defaults, **options}


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@dataclass(frozen=True)
class Case:
    """Arguments of one call of an op."""

    op: str
    lists: dict[str, list[Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.lists[name]

    @property
    def arguments(self) -> list[list[Tensor]]:
        return list(self.lists.values())

    @property
    def options_in_full(self) -> dict[str, Any]:
        return full(self.op, self.options)

    @property
    def outputs(self) -> dict[str, list[Tensor]]:
        mutated = itertools.compress(self.lists, op_of(self.op).mutated)
        return {name: self.lists[name] for name in mutated}

    def map(self, change: Any, names: Any = None) -> Case:
        """A copy with every tensor of the lists (or of the named ones) changed; the others are cloned."""
        lists = {
            name: [change(t) if names is None or name in names else t.clone() for t in tensors]
            for name, tensors in self.lists.items()
        }
        return Case(self.op, lists, dict(self.options))

    def clone(self) -> Case:
        """A copy with the same memory layouts."""
        return self.map(Tensor.clone)

    @property
    def shaped(self) -> list[str]:
        """The lists whose tensors have their parameters' shape."""
        return [name for name in self.lists if _check.kind(name) in ("param", "grad", "state", "exact")]


def make_case(
    op: str, shapes=AWKWARD_SHAPES, dtype="float32", *, device=DEVICE, generator=None, step=2.0, **options
) -> Case:
    """A case in the middle of training: state that is not zero, step counts that differ from tensor to tensor."""
    param_dtype, state_dtype = DTYPES[dtype]
    generator = generator or torch.Generator().manual_seed(1)
    options = {**DEFAULTS[op], **options}

    def draw(name: str, i: int, param: Tensor) -> Tensor:
        kind = _check.kind(name)
        shape, stored = _check.template(kind, param, param_dtype if kind in ("param", "grad") else state_dtype)
        if name == "steps":
            return torch.tensor(step + i % 6, device=device)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("sqs"):
            values = values.square()
        elif kind in ("one", "count"):
            values = torch.sigmoid(values)
        return values.to(device, stored)

    # Meta tensors say shape and dtype where there are no values yet.
    models = [torch.empty(shape, dtype=param_dtype, device="meta") for shape in shapes]
    lists = {name: [draw(name, i, p) for i, p in enumerate(models)] for name in op_of(op).lists}
    for name in unused(op, options):
        lists[name] = []
    return Case(op, lists, options)


def unused(op: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The optional lists that a call with these options leaves empty."""
    if op == "adam":
        needed = {"amsgrad": "max_exp_avg_sqs", "nadam": "mu_products"}.get(options.get("rule", "adam"))
        return tuple(name for name in op_of(op).optional if name != needed)
    return ("momentum_buffers",) if op == "sgd" and options["momentum"] == 0 else ()


def options_of(op: str, name: str, device=DEVICE) -> dict[str, Any]:
    """A row of `OPTIONS`, ready for a call."""
    options = dict(OPTIONS[op][name])
    if "grad_scale" in options:
        options["grad_scale"] = torch.tensor(options["grad_scale"], device=device)
    return options


def backends(op="adam", device=DEVICE) -> list[str]:
    """The compiled back ends that can be tested here, the CUDA source in the host emulator included."""
    named = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable(op, name, device)]
    return named if device.type == "cuda" or _backend.native() is None else [*named, "cuda_host"]


def matrix_backends(device=DEVICE) -> list[str]:
    """The back ends of ops on matrices that can be tested here, but for the reference.

    Triton's interpreter takes seconds for each: tests/test_matrix_triton.py is for it.
    """
    named = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable("polar", name, device)]
    return [name for name in named if name != "triton" or not _backend.interpreting()]


def call(case: Case, backend: str | None) -> None:
    """Runs the case in place; `cuda_host` is the CUDA source in the emulator."""
    op = op_of(case.op)
    if backend != "cuda_host":
        op(*case.arguments, **case.options, backend=backend)
        return
    from cuda_host import emulator

    space, arguments = op.workspace(), case.options_in_full
    lists = space.prepare(case.arguments)
    emulator.emulated(case.op)(*lists, space.table(2048, CPU, op.rows(arguments)), **arguments)


def run(case: Case, backend: str | None) -> Case:
    """Runs a copy of the case and returns it."""
    case = case.clone()
    call(case, backend)
    return case


def by_reference(case: Case) -> Case:
    """Runs a copy by the reference, past the checks."""
    case = case.clone()
    getattr(importlib.import_module("fastcurv.reference"), f"{case.op}_")(*case.arguments, None, **case.options_in_full)
    return case


def truth(case: Case) -> dict[str, list[np.ndarray]]:
    """The lists after the call in 80-bit arithmetic."""
    return truths.truth(case.op, case.lists, case.options_in_full)


def bounds(case: Case) -> list[tuple[np.ndarray, float]]:
    """For each list that is written: the truth, and twice the largest error of torch arithmetic plus two ulp."""
    wanted, found = truth(case), []
    for name, torchs in by_reference(case).outputs.items():
        want = _flat(wanted[name])
        ulp = torch.finfo(torchs[0].dtype).eps * float(np.abs(want).max(initial=0)) if torchs else 0.0
        found.append((want, 2 * _error(torchs, want) + 2 * ulp))
    return found


def assert_as_accurate_as_torch(result: Case, case: Case, known: list[tuple[np.ndarray, float]] | None = None) -> None:
    """The largest error in each list is within the bounds of the case, which may be known already."""
    for (name, got), (want, bound) in zip(result.outputs.items(), known or bounds(case), strict=True):
        assert _error(got, want) <= bound, name


def _error(got: list[Tensor], want: np.ndarray) -> float:
    return float(np.abs(_flat(map(truths.long, got)) - want).max(initial=0))


def _outputs(case: Case) -> list[list[Tensor]]:
    return list(case.outputs.values())


def _flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays] or [np.zeros(0, np.longdouble)])


def differing(a: Case, b: Case) -> int:
    """Number of elements of the outputs whose bits differ, wherever the two cases are."""
    pairs = zip(itertools.chain(*_outputs(a)), itertools.chain(*_outputs(b)), strict=True)
    return sum(int((bits(x.cpu()) != bits(y.cpu())).sum()) for x, y in pairs)


def assert_same_bits(a: Case, b: Case) -> None:
    for name, x_list in a.outputs.items():
        for i, (x, y) in enumerate(zip(x_list, b[name], strict=True)):
            assert x.dtype == y.dtype and x.shape == y.shape
            # equal_nan would not tell -0 from 0 nor two NaNs apart; the bits do.
            assert torch.equal(bits(x), bits(y)), f"{name}[{i}] {tuple(x.shape)}"
