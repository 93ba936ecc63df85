"""The Adam family: Adam, AdamW, RAdam, NAdam and Yogi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv import _check
from fastcurv.ops import adam_
from fastcurv.optim._base import MultiTensorOptimizer

Betas = tuple[float | Tensor, float | Tensor]


class _AdamFamily(MultiTensorOptimizer):
    """An optimizer that is a rule of the op `adam`."""

    _op = adam_
    _rule: str

    def _rule_of(self, group: dict[str, Any]) -> str:
        return self._rule

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        used = {"amsgrad": "max_exp_avg_sq", "nadam": "mu_product"}.get(self._rule_of(group))
        return tuple(key for key in ("max_exp_avg_sq", "mu_product") if key != used)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "mu_decay": 0.0,
            "rule": self._rule_of(group),
            "decoupled_weight_decay": group["decoupled_weight_decay"],
            "maximize": group["maximize"],
        }


class Adam(_AdamFamily):
    """`torch.optim.Adam` by one fused kernel launch, or one parallel region, per step.

    Takes the place of torch's class: the same keywords, state keys and checkpoints. Differs from it in:

    * the state of bfloat16 and float16 parameters is float32 (22 bytes a parameter and step instead of 14, and no
      rounding of small updates to the moments);
    * a step never writes `p.grad`, not even with `fused=True`, and takes any memory layout of it;
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
        fused: Whether the kernel does GradScaler's part, unscaling and skipping overflows without a synchronization; if
            not, GradScaler unscales `p.grad` first. `backend` chooses the kernel.
        decoupled_weight_decay: Whether weight decay acts on the parameters, as in AdamW.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the moments of float32 parameters in bfloat16 (20 bytes a parameter and step
            instead of 28), for betas of at most 1 - 2^-8, above which averages would stand still; None: float32.

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

    _optional_keys = ("max_exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
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

    def _rule_of(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adam"


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
        betas: Betas = (0.9, 0.999),
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


class RAdam(_AdamFamily):
    """`torch.optim.RAdam` by one fused kernel launch, or one parallel region, per step.

    Takes the place of torch's class: the same keywords, state keys and checkpoints. Differences are those of `Adam`.
    The rectification is computed in float64, also where torch's capturable one is float32 and wrong for a large beta2.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the raw second moment.
        weight_decay: L2 penalty; decoupled from the gradient with `decoupled_weight_decay`.
        decoupled_weight_decay: Whether weight decay acts on the parameters.
        foreach: Accepted and ignored: `backend` decides.
        maximize: Whether to ascend.
        capturable: Accepted; every step can be captured in a CUDA graph.
        differentiable: Must be False.
        fused: Whether the kernel does GradScaler's part, as in `Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: As of `Adam`.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Liu et al. (2020), Algorithm 2; spec first_order 3.1 item 2 (the step is one of momentum alone until the
    length of the approximated average exceeds 5).

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.RAdam([p], lr=0.1)
        >>> p.grad = torch.full((2,), 0.5)
        >>> optimizer.step()
        >>> p.data
        tensor([0.9500, 0.9500])
    """

    _rule = "radam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)


class NAdam(_AdamFamily):
    """`torch.optim.NAdam` by one fused kernel launch, or one parallel region, per step.

    Takes the place of torch's class: the same keywords, state keys and checkpoints. Differences are those of `Adam`.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 penalty; decoupled from the gradient with `decoupled_weight_decay`.
        momentum_decay: How fast the momentum rises from half of beta1 to beta1.
        decoupled_weight_decay: Whether weight decay acts on the parameters.
        foreach: Accepted and ignored: `backend` decides.
        maximize: Whether to ascend.
        capturable: Accepted; every step can be captured in a CUDA graph.
        differentiable: Must be False.
        fused: Whether the kernel does GradScaler's part, as in `Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: As of `Adam`.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Dozat (2016), Algorithm 8, with the momentum schedule of torch.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.NAdam([p], lr=0.1)
        >>> p.grad = torch.full((2,), 0.5)
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    _rule = "nadam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        _check.number("momentum_decay", group["momentum_decay"])
        return {**super()._arguments(group), "mu_decay": 0.96 ** group["momentum_decay"]}

    def _initial(self, key: str, param: Tensor) -> Tensor:
        initial = super()._initial(key, param)
        return initial.fill_(1.0) if key == "mu_product" else initial


class Yogi(_AdamFamily):
    """Yogi by one fused kernel launch, or one parallel region, per step: Adam whose second moment moves by g^2 at most.

    Differences from other implementations are those of `Adam` from torch's.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate: a number, or a one-element tensor, which the kernel reads at each step.
        betas: Decay of the first and second moments, numbers or one-element tensors.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 penalty; decoupled from the gradient with `decoupled_weight_decay`.
        initial_accumulator: Where `exp_avg_sq` starts; `exp_avg` starts at zero.
        decoupled_weight_decay: Whether weight decay acts on the parameters.
        foreach: Accepted and ignored: `backend` decides.
        maximize: Whether to ascend.
        capturable: Accepted; every step can be captured in a CUDA graph.
        differentiable: Must be False.
        fused: Whether the kernel does GradScaler's part, as in `Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: As of `Adam`.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Zaheer et al. (2018), Algorithm 2, with the bias correction of Adam and the defaults of the published
    implementations; spec first_order 3.1 item 4.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.Yogi([p], lr=0.1)
        >>> p.grad = torch.full((2,), 0.5)
        >>> optimizer.step()
        >>> bool((p < 1).all())
        True
    """

    _rule = "yogi"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-3,
        weight_decay: float = 0,
        initial_accumulator: float = 1e-6,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator": initial_accumulator,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check.number("initial_accumulator", group["initial_accumulator"])

    def _initial(self, key: str, param: Tensor) -> Tensor:
        initial = super()._initial(key, param)
        if key != "exp_avg_sq":
            return initial
        group = next(group for group in self.param_groups if any(p is param for p in group["params"]))
        return initial.fill_(group["initial_accumulator"])
