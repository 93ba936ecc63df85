"""Inputs, implementations and error bounds that the tests of several ops share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcurv import _backend, ops, reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

# Where something has broken somebody: empty, 0-d, one element, around vector widths, around chunks.
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
    (8193,),
    (16385,),
    (3, 2, 5, 1),
    (0,),
)

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """Arguments of one call of the op `adam`."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps]

    @property
    def outputs(self) -> list[list[Tensor]]:
        return [self.params, *self.lists[2:]]

    def clone(self, dtype: torch.dtype | None = None) -> Case:
        """A copy with the same memory layouts; in another dtype, if one is given."""
        lists = [
            [t.clone() if dtype is None or name == "steps" else t.to(dtype, copy=True) for t in getattr(self, name)]
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
        ]
        return Case(*lists, options=dict(self.options))

    def with_grads(self, grads: list[Tensor]) -> Case:
        return replace(self, grads=grads)


def adam_case(
    shapes=AWKWARD_SHAPES, dtype="float32", *, device=DEVICE, generator=None, amsgrad=False, step=3.0, **options
) -> Case:
    """A case in the middle of training: state that is not zero, steps that differ from tensor to tensor."""
    param, state = DTYPES[dtype]
    generator = generator or torch.Generator().manual_seed(1)

    def draw(shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    params, grads, exp_avgs = ([draw(s, d) for s in shapes] for d in (param, param, state))
    exp_avg_sqs = [draw(s, state).square() for s in shapes]
    maxima = [draw(s, state).square() for s in shapes] if amsgrad else []
    steps = [torch.tensor(step + i % 3, device=device) for i in range(len(shapes))]
    options = {"lr": 0.1, "beta1": 0.75, "beta2": 0.9, "eps": 1e-3, **options, "amsgrad": amsgrad}
    return Case(params, grads, exp_avgs, exp_avg_sqs, maxima, steps, options)


# The options that change what is computed; lr and betas large enough that nothing hides behind a small step.
ADAM_OPTIONS = {
    "plain": {},
    "l2": {"weight_decay": 0.3},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "grad_scale": {"grad_scale": 24.0},
    "zero-betas": {"beta1": 0.0, "beta2": 0.0},
    "everything": {
        "amsgrad": True, "maximize": True, "grad_scale": 3.0, "weight_decay": 0.2, "decoupled_weight_decay": True,
    },
}  # fmt: skip


def adam_options(name: str, device=DEVICE) -> dict[str, Any]:
    options = dict(ADAM_OPTIONS[name])
    if "grad_scale" in options:
        options["grad_scale"] = torch.tensor(options["grad_scale"], device=device)
    return options


def backends(op="adam", device=DEVICE) -> list[str]:
    """The compiled back ends that can be tested here, the CUDA source in the host emulator included."""
    named = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable(op, name, device)]
    return named if device.type == "cuda" else [*named, "cuda_host"]


def run_adam(case: Case, backend: str, space=None) -> Case:
    """Runs a copy of the case and returns it."""
    case = case.clone()
    if backend == "cuda_host":
        from cuda_host import emulator

        space = ops.adam.workspace() if space is None else space
        lists = space.prepare(case.lists)
        emulator.emulated("adam")(*lists, space._device_table(2048, torch.device("cpu")), **full(case.options))
    else:
        ops.adam_(*case.lists, **case.options, backend=backend)
    return case


def truth(case: Case) -> list[list[np.ndarray]]:
    """The outputs of the call in 80-bit arithmetic, by the formulas of the papers; torch has no part in it."""

    def long(tensors):
        return [t.detach().cpu().double().numpy().astype(np.longdouble) for t in tensors]

    o = {name: float(x) if isinstance(x, Tensor) else x for name, x in full(case.options).items()}
    params, grads, exp_avgs, exp_avg_sqs, maxima, steps = map(long, case.lists)
    outputs = [[], [], [], [], []]
    one = np.longdouble(1)
    for i, t in enumerate(steps):
        p, t = params[i], t + 1
        g = grads[i] / np.longdouble(o["grad_scale"] or 1) * (-1 if o["maximize"] else 1)
        if o["decoupled_weight_decay"]:
            p = p * (one - np.longdouble(o["lr"]) * o["weight_decay"])
        else:
            g = g + np.longdouble(o["weight_decay"]) * p
        beta1, beta2 = np.longdouble(o["beta1"]), np.longdouble(o["beta2"])
        m = beta1 * exp_avgs[i] + (one - beta1) * g
        v = u = beta2 * exp_avg_sqs[i] + (one - beta2) * g * g
        if o["amsgrad"]:
            u = np.maximum(maxima[i], v)
            outputs[3].append(u)
        m_hat, v_hat = m / (one - beta1**t), u / (one - beta2**t)
        outputs[0].append(p - np.longdouble(o["lr"]) * m_hat / (np.sqrt(v_hat) + np.longdouble(o["eps"])))
        outputs[1].append(m)
        outputs[2].append(v)
        outputs[4].append(t)
    return outputs


def assert_as_accurate_as_torch(result: Case, case: Case) -> None:
    """For each list: the largest error against the truth is at most twice that of torch arithmetic, plus two ulp."""
    same_dtype = case.clone()
    reference.adam_(*same_dtype.lists, None, **full(same_dtype.options))

    def flat(arrays):
        return np.concatenate([a.ravel() for a in arrays] or [np.zeros(0)])

    def error(got, want):
        exact = flat([t.detach().cpu().double().numpy().astype(np.longdouble) for t in got])
        return float(np.abs(exact - want).max(initial=0))

    for got, torchs, arrays in zip(result.outputs, same_dtype.outputs, truth(case), strict=True):
        want = flat(arrays)
        if want.size:
            ulp = torch.finfo(got[0].dtype).eps * float(np.abs(want).max())
            assert error(got, want) <= 2 * error(torchs, want) + 2 * ulp, got[0].dtype


def full(options: dict[str, Any]) -> dict[str, Any]:
    defaults = {"weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False, "grad_scale": None}
    return {**defaults, "found_inf": None, **options}


def differing(a: Case, b: Case) -> int:
    """Number of elements of the outputs whose bits differ, wherever the two cases are."""
    pairs = zip(itertools.chain(*a.outputs), itertools.chain(*b.outputs), strict=True)
    return sum(int((bits(x.cpu()) != bits(y.cpu())).sum()) for x, y in pairs)


def assert_same_bits(a: Case, b: Case) -> None:
    for x_list, y_list in zip(a.outputs, b.outputs, strict=True):
        for x, y in zip(x_list, y_list, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            # equal_nan would not tell -0 from 0 nor two NaNs apart; the bits do.
            assert torch.equal(bits(x), bits(y))


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
