"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcurv._chunks import Workspace
from fastcurv.ops import adam as op
from fastcurv.optim._base import MultiTensorOptimizer


class Adam(MultiTensorOptimizer):
    """`torch.optim.Adam` by one fused kernel launch, or one parallel region, per step.

    Takes the place of torch's class: the same keywords, state keys and checkpoints. Differs from it in:

    * the state of bfloat16 and float16 parameters is float32 (22 bytes a parameter and step instead of 14, and no
      rounding of small updates to the moments);
    * `p.grad` is never written, not even with GradScaler, and may have another memory layout than its parameter;
    * `step` is a tensor on the parameter's device, so that every step can be captured in a CUDA graph.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 penalty; decoupled from the gradient with `decoupled_weight_decay`.
        amsgrad: Whether to use the running maximum of the second moment.
        foreach: Accepted and ignored: `backend` decides.
        maximize: Whether to ascend.
        capturable: Accepted; every step can be captured.
        differentiable: Must be False.
        fused: Accepted and ignored: `backend` decides.
        decoupled_weight_decay: Whether weight decay acts on the parameters, as in AdamW.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the moments of float32 parameters in bfloat16 (20 bytes a parameter and step
            instead of 28); None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Kingma and Ba (2015), Algorithm 1; spec first_order 1.1 with errata 3.1. The formulas are in
    `fastcurv.reference.adam`, the cost in `fastcurv.ops.adam_`.

    Example:
        >>> import fastcurv, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastcurv.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.bias]["step"]
        tensor(1.)
    """

    _op = "adam"
    _optional_keys = ("max_exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; its hyper-parameters are checked first."""
        group = {**self.defaults, **param_group}
        op.check_scalars(_scalars(group))
        if group["differentiable"]:
            raise ValueError(
                "differentiable=True: the fused step writes its results by address, which autograd cannot follow. "
                "Use torch.optim.Adam(differentiable=True) to differentiate through the optimizer"
            )
        super().add_param_group(param_group)

    def _keys(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            **_scalars(group),
            "decoupled_weight_decay": group["decoupled_weight_decay"],
            "amsgrad": group["amsgrad"],
            "maximize": group["maximize"],
        }

    def _workspace(self) -> Workspace:
        return op.workspace()

    def _dispatch(self, lists: Sequence[list[Tensor]], **arguments: Any) -> None:
        op.adam_(*lists, **arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills in options that an older or a torch checkpoint lacks."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _scalars(group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


class AdamW(Adam):
    """`torch.optim.AdamW` by one fused kernel launch, or one parallel region, per step: Adam with decoupled decay.

    Arguments, differences from torch and errors are those of `Adam`, with `weight_decay` 0.01 and always decoupled.

    Source: Loshchilov and Hutter (2019), Algorithm 2.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.AdamW([p], lr=0.1, weight_decay=0.5)
        >>> p.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> p.data
        tensor([0.9500, 0.9500])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            backend=backend,
            state_dtype=state_dtype,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keeps weight decay decoupled whatever the checkpoint says, as torch does."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
