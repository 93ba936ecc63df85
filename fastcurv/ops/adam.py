"""The op `adam`: Adam, AdamW and AMSGrad over lists of tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor

from fastcurv import _check, _library
from fastcurv._chunks import Workspace

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
MUTATED = (True, False, True, True, True, True)


def workspace() -> Workspace:
    """What a caller keeps between steps on the same lists, so that they are not checked and tabled anew."""
    return Workspace(LISTS, MUTATED)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    decoupled_weight_decay: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of Adam, AdamW or AMSGrad on a list of parameters, in place.

    The formulas are in `fastcurv.reference.adam`. Differs from `torch.optim.Adam` in: the state of half-precision
    parameters is float32; `grads` are never written, not even with `grad_scale`; bias corrections are computed in
    double precision wherever the step count is.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        exp_avgs: First moments, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones.
        exp_avg_sqs: Second moments, of the dtype of `exp_avgs`.
        max_exp_avg_sqs: Running maxima of the second moments with `amsgrad`, else empty.
        steps: Steps taken by each parameter, one float32 element each, on its device; advanced by one.
        lr: Learning rate. Like the next four: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 penalty, or decoupled decay.
        decoupled_weight_decay: Whether weight decay acts on the parameters (AdamW) and not through the gradient.
        amsgrad: Whether to use the running maximum of the second moment.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Kingma and Ba (2015), Algorithm 1; Reddi et al. (2018), Algorithm 2; Loshchilov and Hutter (2019),
    Algorithm 2; spec first_order 1.1, errata 3.1 items 1 and 3.

    Cost: 28 bytes per float32 element (22 for bfloat16 parameters with float32 state; 36 in float32 with `amsgrad`) and
    13 flops; one launch, or one parallel region, for the whole list.

    Example:
        >>> import torch
        >>> from fastcurv.ops import adam_
        >>> p, m, v, t = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
        >>> adam_([p], [torch.full((3,), 2.0)], [m], [v], [], [t], lr=0.1)
        >>> p, t
        (tensor([0.9000, 0.9000, 0.9000]), tensor(1.))
    """
    scalars = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    check_scalars(scalars)
    if len(params) == 0:
        return
    lists = [list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else (), steps)]
    flags = {"decoupled_weight_decay": decoupled_weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    if amsgrad and not max_exp_avg_sqs:
        raise ValueError(f"max_exp_avg_sqs: expected {len(params)} tensors with amsgrad=True, got none")
    if _library.must_dispatch(params):
        numbers, tensors = _library.split_scalars(scalars)
        dispatch(*lists, **numbers, **flags, **scaling, tensors=tensors, backend=backend)
    else:
        space = _workspace_at(params[0].data_ptr(), len(params)) if _check.is_addressable(params[0]) else workspace()
        space.launch("adam", space.prepare(lists), backend, **scalars, **flags, **scaling)


def check_scalars(scalars: dict[str, float | Tensor]) -> None:
    """Raises on a hyper-parameter outside its interval; tensors are not read."""
    for name, value in scalars.items():
        _check.number(name, value, below=1.0 if name.startswith("beta") else math.inf)


@functools.lru_cache(maxsize=64)
def _workspace_at(address: int, count: int) -> Workspace:
    """For callers that keep none of their own. Any workspace is right for any lists; this one is likely to match."""
    return workspace()


def _registered(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    tensors: Sequence[Tensor | None],
    backend: str | None = None,
) -> None:
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    adam_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        **_library.join_scalars(numbers, tensors),
        decoupled_weight_decay=decoupled_weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        backend=backend,
    )


dispatch = _library.register(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, *, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled_weight_decay, bool amsgrad, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor?[] tensors, str? backend=None) -> ()",
    _registered,
)
