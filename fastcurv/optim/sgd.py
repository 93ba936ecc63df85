"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv.ops import sgd_
from fastcurv.optim._base import MultiTensorOptimizer


class SGD(MultiTensorOptimizer):
    """`torch.optim.SGD` by one fused kernel launch, or one parallel region, per step.

    Takes the place of torch's class: the same keywords, state keys and checkpoints. Differs from it in: the momentum of
    bfloat16 and float16 parameters is float32; a step never writes `p.grad`, not even with `fused=True`, and takes any
    memory layout of it. With `dampening` and `fused=True`, a first step that overflows counts as the first.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        momentum: Decay of the momentum.
        dampening: The gradient enters the momentum times one minus this, but for the first.
        weight_decay: L2 penalty.
        nesterov: Whether to look one step ahead along the momentum.
        maximize: Whether to ascend.
        foreach: Accepted and ignored: `backend` decides.
        differentiable: Must be False.
        fused: Whether the kernel does GradScaler's part, unscaling and skipping overflows without a synchronization; if
            not, GradScaler unscales `p.grad` first. `backend` chooses the kernel.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the momentum of float32 parameters in bfloat16, for `momentum` of at most
            1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Sutskever et al. (2013), equations 1 to 4, in torch's form. The formulas are in `fastcurv.reference.sgd`,
    the cost in `fastcurv.ops.sgd_`.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.SGD([p], lr=0.1, momentum=0.9)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p.data
        tensor([0.9000, 0.9000])
    """

    _op = sgd_
    _optional_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True: expected a momentum above zero and no dampening, as in torch.optim.SGD")

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group["momentum"] != 0 else ("momentum_buffer",)

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"] != 0 and group["dampening"] != 0)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return {**{name: group[name] for name in names}, "is_first_step": False}
