"""LAMB."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv.ops import lamb_
from fastcurv.optim._base import MultiTensorOptimizer


class LAMB(MultiTensorOptimizer):
    """LAMB: Adam with decay whose learning rate follows the norm of each tensor, fused.

    Biases and the parameters of normalisation layers are usually excluded from it: put them into a group with
    `adaptive=False` and `weight_decay=0`. Loads checkpoints of Adam. Gradients are not clipped: call
    `torch.nn.utils.clip_grad_norm_` before the step where that is wanted.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay, added to the update before its norm is taken.
        adaptive: Whether to scale the step of each tensor by its trust ratio; without, this is AdamW.
        maximize: Whether to ascend.
        fused: Whether the kernel does GradScaler's part, as in `fastcurv.Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the moments of float32 parameters in bfloat16, for betas of at most
            1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range.

    Source: You et al. (2020), Algorithm 2. The formulas are in `fastcurv.reference.lamb`, the cost in
    `fastcurv.ops.lamb_`.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = fastcurv.LAMB([p], lr=0.1, weight_decay=0)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p.data
        tensor([2.6464, 3.6464])
    """

    _op = lamb_

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        adaptive: bool = True,
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
            "adaptive": adaptive,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        names = ("lr", "eps", "weight_decay", "adaptive", "maximize")
        return {**{name: group[name] for name in names}, "beta1": beta1, "beta2": beta2}
