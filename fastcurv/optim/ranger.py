"""Ranger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv.ops import ranger_
from fastcurv.optim._base import MultiTensorOptimizer

VERSIONS = ("20.4.11", "2020.9.4")


class Ranger(MultiTensorOptimizer):
    """Ranger, that is RAdam with gradient centralisation and Lookahead, by one fused kernel launch per step.

    Follows the published implementation (lessw2020), version 20.4.11, and loads its checkpoints and those of RAdam. It
    differs from it in: `p.grad` is not modified; the closure is called and its loss returned; `use_gc` is honoured;
    groups with different betas do not disturb each other; slow weights of half-precision parameters are float32; each
    parameter has its own count of steps and so its own turn to synchronise.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the raw second moment.
        weight_decay: Decoupled decay.
        alpha: How far the slow weights go towards the fast ones, in [0, 1].
        k: A parameter's slow weights move on every k-th of its steps.
        n_sma_threshold: The step is rectified where the length of the approximated average exceeds this.
        use_gc: Whether to subtract its mean from each slice of a gradient along dim 0, in tensors of two or more
            dimensions.
        gc_conv_only: Whether to do so in tensors of four or more dimensions only.
        compat: Version of the published implementation: in "2020.9.4" weight decay is scaled by the rectified step
            size. (That version also writes the decay into the momentum on unrectified steps; this one does not.)
        maximize: Whether to ascend.
        fused: Whether the kernel does GradScaler's part, as in `fastcurv.Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the moments of float32 parameters in bfloat16, for betas of at most
            1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range.

    Source: Wright (2019), Ranger-Deep-Learning-Optimizer; Liu et al. (2020), Algorithm 2; Yong et al. (2020), equation
    1; Zhang et al. (2019), Algorithm 1; spec first_order 3.1 items 2, 6, 7 and 3.3. The formulas are in
    `fastcurv.reference.ranger`, the cost in `fastcurv.ops.ranger_`.

    Example:
        >>> import fastcurv, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastcurv.Ranger(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'slow_buffer', 'step']
    """

    _op = ranger_
    _optional_keys = ("slow_buffer",)
    _anchored = "slow_buffer"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0,
        alpha: float = 0.5,
        k: int = 6,
        n_sma_threshold: float = 5,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        *,
        compat: str = "20.4.11",
        maximize: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "k": k,
            "n_sma_threshold": n_sma_threshold,
            "use_gc": use_gc,
            "gc_conv_only": gc_conv_only,
            "compat": compat,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["compat"] not in VERSIONS:
            raise ValueError(f"compat: expected one of {', '.join(VERSIONS)}, got {group['compat']!r}")
        super()._check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the threshold from where checkpoints of the published implementation have it, spelled so."""
        for group in state.get("param_groups", ()):
            if "N_sma_threshhold" in group:
                group.setdefault("n_sma_threshold", group.pop("N_sma_threshhold"))
        super().__setstate__(state)

    @torch.no_grad()
    def reset_slow_weights(self) -> None:
        """Lets the slow weights start anew where the parameters are, as after loading other weights in mid-training."""
        self._anchor()

    def _initial(self, key: str, param: Tensor) -> Tensor:
        initial = super()._initial(key, param)
        return initial.copy_(param) if key == "slow_buffer" else initial

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        names = (
            *("lr", "eps", "weight_decay", "alpha", "n_sma_threshold", "k"),
            *("use_gc", "gc_conv_only", "maximize"),
        )
        chosen = {name: group[name] for name in names}
        return {**chosen, "beta1": beta1, "beta2": beta2, "scaled_weight_decay": group["compat"] == "2020.9.4"}
