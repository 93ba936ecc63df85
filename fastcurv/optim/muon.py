"""Muon: orthogonalised momentum, with AdamW for what it is not for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastcurv import _check
from fastcurv.ops.newton_schulz import Coefficients
from fastcurv.ops.orthogonalize import orthogonalize
from fastcurv.optim._gradients import (
    MATRIX,
    SWITCH,
    Reports,
    by_matrices,
    check_switch,
    keep,
    names_of,
    orthogonalized,
    sides,
)
from fastcurv.optim.adam import Betas, _AdamFamily

# How the learning rate grows with the shape (rows, columns) of a matrix.
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    # Jordan et al. (2024).
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # Liu et al. (2025), Moonlight: updates as large as AdamW's.
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    # Bernstein (2025): updates that change the output by as much as the input, in the norm of their entries.
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


class Muon(_AdamFamily):
    """Muon: momentum, then its orthogonalisation by Newton-Schulz steps, then decoupled weight decay and the update.

    Groups whose `orthogonal` is True are Muon's, and those where it is False are AdamW's, in the same optimizer and
    step; in a group that does not say it, and so in plain parameters, tensors of two or more dimensions are Muon's.
    `fastcurv.param_groups(model, skip_last_linear=True)` makes groups by layers. Groups stay as they are given, so that
    schedulers see each once; those that cycle momentum cycle Muon's. Keywords, group options and the state key of
    Muon's own part are those of `torch.optim.Muon`, which it differs from in: tensors of more than two dimensions are
    taken, as `matrix` says; the momentum of 16-bit parameters is float32; Newton-Schulz steps are computed in float32
    or better unless `dtype` allows bfloat16; without Nesterov momentum the momentum is not overwritten (torch's is, in
    bfloat16).

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate of Muon's part.
        weight_decay: Decoupled decay, of both parts.
        momentum: Decay of the momentum.
        nesterov: Whether to look one step ahead along the momentum.
        ns_coefficients: Of the Newton-Schulz steps: (a, b, c) of every step, or `coefficients` of
            `fastcurv.ops.orthogonalize`.
        eps: Momenta of a smaller norm are not scaled up to one: what gets no gradient any more comes to rest. Of
            newton_schulz.
        ns_steps: Number of the steps.
        adjust_lr_fn: `original` (also None): lr sqrt(max(1, rows / columns)); `match_rms_adamw`: 0.2 lr sqrt(max(rows,
            columns)); `spectral_unclamped`: lr sqrt(rows / columns).
        method: What orthogonalises: `newton_schulz`, `polar` or `gram_schmidt`.
        dtype: The least precise dtype the steps may be computed in, torch.float32 or torch.bfloat16.
        adamw_lr: Learning rate of AdamW's part; None: `lr`. In groups that are not AdamW's alone it follows `lr` in
            proportion, so that schedulers change both.
        adamw_betas: Its betas, which groups call `betas`.
        adamw_eps: Its eps, which groups of AdamW's alone call `eps`.
        matrix: As of `OSGD`: `rows`, `columns` or `batch`, for groups that have no `matrix` of their own.
        maximize: Whether to ascend.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps momentum and moments of float32 parameters in bfloat16, for momentum and betas
            of at most 1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Jordan et al. (2024), Muon; Liu et al. (2025), equation 4, for `match_rms_adamw`; Bernstein (2025),
    Deriving Muon, for `spectral_unclamped`.

    Example:
        >>> import fastcurv, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastcurv.Muon(model.parameters(), lr=0.02)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight]), sorted(optimizer.state[model.bias])
        (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    _rule = "adam"
    # An orthogonalised momentum has lost the scale: GradScaler has to take it off before.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Coefficients | tuple[float, float, float] = "muon",
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        method: str = "newton_schulz",
        dtype: torch.dtype = torch.float32,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: Betas = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        matrix: str | None = None,
        maximize: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._orthogonalize: dict[str, Any] = {"method": method, "dtype": dtype, "backend": backend}
        # No defaults: schedulers that find betas among those cycle them, and not the momentum.
        self._adamw: dict[str, Any] = {"betas": adamw_betas, "adamw_eps": adamw_eps, "adamw_lr_ratio": 1.0}
        if adamw_lr is not None:
            _check.number("adamw_lr", adamw_lr)
            _check.number("lr", lr)
            if not lr > 0:
                raise ValueError(f"lr: expected a value above zero beside adamw_lr, which follows it, got {lr}")
            self._adamw["adamw_lr_ratio"] = float(adamw_lr) / float(lr)
        # Defaults of groups that are AdamW's alone.
        self._adamw_alone: dict[str, Any] = {"eps": adamw_eps} | ({} if adamw_lr is None else {"lr": adamw_lr})
        self._reports = Reports()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            SWITCH: None,
            MATRIX: matrix,
            # Of AdamW's part.
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, backend=backend, state_dtype=state_dtype)
        self._check_group(defaults | self._adamw)  # of both parts, whatever groups there are

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; where it does not say whether it is `orthogonal`, the dimensions of each parameter decide."""
        options = self._adamw
        if param_group.get(SWITCH) is False:
            options = {**self._adamw_alone, **options, "adamw_lr_ratio": 1.0}
        for name, value in options.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        flat = [i for i, p in enumerate(params) if not is_lazy(p) and p.dim() < 2] if param_group[SWITCH] else []
        if flat:
            del self.param_groups[-1]
            raise ValueError(
                f"params[{flat[0]}]: expected two dimensions or more in a group with orthogonal=True, got shape "
                f"{tuple(params[flat[0]].shape)}; give it to a group with orthogonal=False, which AdamW updates"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_switch(group)
        if group[SWITCH] is not False:
            self._check_matrices(group)
        if group[SWITCH] is not True:
            super()._check_group(group)

    def _is_for_op(self, group: dict[str, Any], param: Tensor) -> bool:
        return not group[SWITCH] if group[SWITCH] is not None else param.dim() < 2

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        alone, ratio = group[SWITCH] is False, group["adamw_lr_ratio"]
        own = {"eps": group["eps" if alone else "adamw_eps"], "lr": group["lr"] if ratio == 1 else group["lr"] * ratio}
        return super()._arguments({**group, **own})

    def _check_matrices(self, group: dict[str, Any], device: torch.device | None = None) -> None:
        """Raises unless the options of a group of Muon's can be honoured; on a device, in a step."""
        check_switch(group)
        for name in ("lr", "weight_decay", "momentum", "eps"):
            _check.number(name, group[name], device is None)
            if device and isinstance(group[name], Tensor):
                _check.scalar_device(name, group[name], device)
        if device is None and not isinstance(group["momentum"], Tensor) and not group["momentum"] < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {group['momentum']}")
        for name in ("nesterov", "maximize"):
            _check.option(name, group[name], "bool")
        self._check_averages({"momentum": group["momentum"]})
        if group["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
            known = ", ".join(ADJUSTMENTS)
            raise ValueError(f"adjust_lr_fn: expected one of {known}, or None, got {group['adjust_lr_fn']!r}")
        try:
            orthogonalize([], **self._options(group))
        except ValueError as error:
            is_ours = str(error).startswith(("steps:", "coefficients:"))
            raise ValueError(f"ns_{error}" if is_ours else str(error)) from None

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Those of `orthogonalize` for a group."""
        coefficients = group["ns_coefficients"]
        is_three = isinstance(coefficients, (tuple, list)) and len(coefficients) == 3
        if is_three and not isinstance(coefficients[0], Iterable):  # as torch has it: those of every step
            coefficients = [tuple(coefficients)]
        ours = {"coefficients": coefficients, "steps": group["ns_steps"], "eps": group["eps"]}
        return self._orthogonalize | ours

    def _keys_of(self, group: dict[str, Any], param: Tensor) -> tuple[str | None, ...]:
        return self._keys(group) if self._is_for_op(group, param) else ("momentum_buffer",)

    def _kind(self, key: str) -> str:
        return "state" if key == "momentum_buffer" else super()._kind(key)

    def _step(self) -> None:
        self._reports.warn()
        self._reports.warn_of_stacks(self.param_groups)
        super()._step()

    def _prepare(self, group: dict[str, Any]) -> list[partial[None]]:
        calls = super()._prepare(group) if group[SWITCH] is not True else []
        if group[SWITCH] is False:
            return calls
        self._keep_state()
        return calls + self._updates(group)

    def _trace(self, group: dict[str, Any]) -> None:
        super()._trace(group)
        for update in self._updates(group):
            update()

    def _updates(self, group: dict[str, Any]) -> list[partial[None]]:
        """What a step does to the parameters of a group of Muon's; nothing is written yet but state that is new."""
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, param in enumerate(group["params"] if group[SWITCH] is not False else ()):
            if param.grad is None:
                continue
            _check.whole(param, f"params[{index}]")
            if not self._is_for_op(group, param):
                members.setdefault((param.device, param.dtype), []).append(index)
        updates: list[partial[None]] = []
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        for (device, _), indices in members.items():
            self._check_matrices(group, device)
            params = [group["params"][i] for i in indices]
            _check.parameters(params, [p.grad for p in params], indices)
            for index, param in zip(indices, params, strict=True):
                self._normalise(param, ("momentum_buffer",), index)
            names = [names_of(number, index, group) for index in indices]
            momenta, ahead = self._momenta(params, group)
            run = partial(orthogonalized, self._options(group))
            directions = by_matrices(ahead, [group[MATRIX]] * len(ahead), names, run, self._reports)
            rows = zip(params, momenta, directions, strict=True)
            updates += [partial(self._update, group, param, momentum, *found) for param, momentum, found in rows]
        return updates

    def _momenta(self, params: list[Tensor], group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The next momenta of some parameters, and what of them is orthogonalised."""
        _, dtype = _check.template("exact", params[0], params[0].dtype)
        momentum: Any = _exact(group["momentum"])
        before = [self.state[param]["momentum_buffer"].to(dtype) for param in params]
        grads = [param.grad.to(dtype) for param in params if param.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        after = list(torch._foreach_lerp(before, grads, 1 - momentum))
        return after, list(torch._foreach_lerp(grads, after, momentum)) if group["nesterov"] else after

    def _update(self, group: dict[str, Any], param: Tensor, momentum: Tensor, direction: Tensor, info: Tensor) -> None:
        buffer = self.state[param]["momentum_buffer"]
        # A matrix that is not finite keeps its momentum as it was.
        buffer.copy_(torch.where(info < 0, buffer, momentum))
        lr = _exact(group["lr"])
        rate = lr * ADJUSTMENTS[group["adjust_lr_fn"] or "original"](*sides(param, group[MATRIX]))
        # In the dtype of the arithmetic, rounded once.
        param.copy_(param.to(direction.dtype) * (1 - lr * _exact(group["weight_decay"])) - rate * direction)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        own = ("_orthogonalize", "_adamw", "_adamw_alone", "_reports")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores an optimizer; also the end of torch's `load_state_dict`. Older checkpoints may lack options."""
        groups = state.get("param_groups", [])
        keep(self.__dict__.get("param_groups", []), groups, (SWITCH, MATRIX, *{**self.__dict__, **state}["_adamw"]))
        super().__setstate__(state)


def _exact(number: float | Tensor) -> float | Tensor:
    """A hyper-parameter as a number of float64, so that products with it are not rounded before."""
    return number.double().reshape(()) if isinstance(number, Tensor) else number
