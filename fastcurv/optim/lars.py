"""LARS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv.ops import lars_
from fastcurv.optim._base import MultiTensorOptimizer


class LARS(MultiTensorOptimizer):
    """LARS: SGD with momentum whose learning rate follows the norm of each tensor, fused.

    Biases and the parameters of normalisation layers are usually excluded from it: put them into a group with
    `adaptive=False` and `weight_decay=0`.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        momentum: Decay of the momentum.
        weight_decay: L2 penalty, which enters the trust ratio.
        trust_coefficient: Trust ratio of a tensor whose norm is that of its gradient.
        eps: Added to the denominator of the trust ratio.
        nesterov: Whether to look one step ahead along the momentum.
        adaptive: Whether to scale the step of each tensor by its trust ratio; without, this is SGD.
        maximize: Whether to ascend.
        fused: Whether the kernel does GradScaler's part, as in `fastcurv.Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the momentum of float32 parameters in bfloat16, for `momentum` of at most
            1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range.

    Source: You, Gitman and Ginsburg (2017), Algorithm 1, with the learning rate outside the momentum. The formulas are
    in `fastcurv.reference.lars`, the cost in `fastcurv.ops.lars_`.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = fastcurv.LARS([p], lr=0.1, trust_coefficient=1.0)
        >>> p.grad = torch.tensor([0.0, 10.0])
        >>> optimizer.step()
        >>> p.data
        tensor([3.0000, 3.5000])
    """

    _op = lars_
    _optional_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        *,
        adaptive: bool = True,
        maximize: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "adaptive": adaptive,
            "maximize": maximize,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "nesterov", "adaptive", "maximize")
        return {name: group[name] for name in names}
