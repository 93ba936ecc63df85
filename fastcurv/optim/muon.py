"""Muon: orthogonalised momentum, with AdamW for what it is not for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastcurv import _check
from fastcurv.ops.newton_schulz import Coefficients
from fastcurv.ops.orthogonalize import orthogonalize
from fastcurv.optim._gradients import SWITCH, Reports, check_switch, keep_switches, label
from fastcurv.optim.adam import AdamW, Betas

# How the learning rate grows with the shape (rows, columns) of a matrix.
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    # Jordan et al. (2024).
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # Liu et al. (2025), Moonlight: updates as large as AdamW's.
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Muon(Optimizer):
    """Muon: momentum, then its orthogonalisation by Newton-Schulz steps, then decoupled weight decay and the update.

    Groups whose `orthogonal` is True are Muon's; the others, and tensors of fewer than two dimensions, are AdamW's, in
    the same optimizer and step. `fastcurv.param_groups(model, skip_last_linear=True)` makes such groups; plain
    parameters are split by their dimensions. Keywords, group options and the state key of Muon's own part are those of
    `torch.optim.Muon`, which it differs from in: tensors of more than two dimensions are taken, flattened from dim 1
    on; the momentum of 16-bit parameters is float32; Newton-Schulz steps are computed in float32 or better unless
    `dtype` allows bfloat16; without Nesterov momentum the momentum is not overwritten (torch's is, in bfloat16).

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
            columns)).
        method: What orthogonalises: `newton_schulz`, `polar` or `gram_schmidt`.
        dtype: The least precise dtype the steps may be computed in, torch.float32 or torch.bfloat16.
        adamw_lr: Learning rate of AdamW's part; None: `lr`.
        adamw_betas: Its betas.
        adamw_eps: Its eps, which its groups call `eps`.
        maximize: Whether to ascend.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Jordan et al. (2024), Muon; Liu et al. (2025), equation 4, for `match_rms_adamw`.

    Example:
        >>> import fastcurv, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastcurv.Muon(model.parameters(), lr=0.02)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight]), sorted(optimizer.state[model.bias])
        (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
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
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        self._orthogonalize: dict[str, Any] = {"method": method, "dtype": dtype, "backend": backend}
        # What AdamW's groups say where they say nothing else.
        self._adamw_defaults: dict[str, Any] = {"eps": adamw_eps}
        if adamw_lr is not None:
            self._adamw_defaults["lr"] = adamw_lr
        self.backend = backend
        self._adamw = self._new_adamw()
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
            # Of AdamW's part.
            "betas": adamw_betas,
            "amsgrad": False,
            "decoupled_weight_decay": True,
        }
        for switch in (True, False):  # also where there are no groups of the kind
            self._check(defaults | {SWITCH: switch} | ({} if switch else self._adamw_defaults))
        super().__init__(params, defaults)

    def _new_adamw(self) -> AdamW:
        """What steps the groups that are not orthogonalised, once they are handed to it."""
        return AdamW([torch.nn.Parameter(torch.empty(0))], backend=self.backend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or, where it does not say whether it is orthogonalised, the two that its parameters make."""
        groups = [param_group]
        if param_group.get(SWITCH) is None:
            params = param_group["params"]
            # torch refuses sets.
            params = [params] if isinstance(params, (Tensor, set)) else list(params)
            split = {switch: [p for p in params if _is_matrix(p) is switch] for switch in (True, False)}
            groups = [{**param_group, "params": some, SWITCH: switch} for switch, some in split.items() if some]
            groups = groups or [{**param_group, "params": [], SWITCH: True}]
        before = len(self.param_groups)
        try:
            for group in groups:
                self._add(group)
        except Exception:
            del self.param_groups[before:]
            raise
        self._hand_over()

    def _add(self, param_group: dict[str, Any]) -> None:
        check_switch(param_group)
        if not param_group[SWITCH]:
            for name, value in self._adamw_defaults.items():
                param_group.setdefault(name, value)
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        flat = [i for i, p in enumerate(params) if not is_lazy(p) and p.dim() < 2] if param_group[SWITCH] else []
        if flat:
            raise ValueError(
                f"params[{flat[0]}]: expected two dimensions or more in a group with orthogonal=True, got shape "
                f"{tuple(params[flat[0]].shape)}; give it to a group with orthogonal=False, which AdamW updates"
            )

    def _check(self, group: dict[str, Any], intervals: bool = True) -> None:
        """Raises unless the options of a group are what its part of the step can honour."""
        if not group[SWITCH]:
            self._adamw._op.check(self._adamw._arguments(group), intervals=intervals)
            return
        for name in ("lr", "weight_decay", "momentum", "eps"):
            _check.number(name, group[name], intervals)
        if intervals and not isinstance(group["momentum"], Tensor) and not group["momentum"] < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {group['momentum']}")
        for name in ("nesterov", "maximize"):
            _check.option(name, group[name], "bool")
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
        if isinstance(coefficients, tuple):  # as torch has it: those of every step
            coefficients = [coefficients]
        ours = {"coefficients": coefficients, "steps": group["ns_steps"], "eps": group["eps"]}
        return self._orthogonalize | ours

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of both parts.

        Args:
            closure: Evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: On a bad parameter or gradient, before anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._reports.warn()
            updates = []
            for number, group in enumerate(self.param_groups):
                if group[SWITCH]:
                    try:
                        updates += self._updates(number, group)
                    except (TypeError, ValueError) as error:
                        raise type(error)(f"parameter group {number}: {error}") from error
            self._step_adamw()
            for update in updates:
                self._apply(*update)
        return loss

    def _updates(self, number: int, group: dict[str, Any]) -> list[_Update]:
        """What a step is going to do to the parameters of a group; nothing is written yet."""
        self._check(group, intervals=False)
        adjust = ADJUSTMENTS[group["adjust_lr_fn"] or "original"]
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, param in enumerate(group["params"]):
            if param.grad is not None:
                members.setdefault((param.device, param.dtype), []).append(index)
        updates: list[_Update] = []
        for (device, _), indices in members.items():
            params = [group["params"][i] for i in indices]
            _check.parameters(params, [p.grad for p in params], indices)
            before = [self._momentum(param) for param in params]
            grads = [param.grad.to(buffer.dtype) for param, buffer in zip(params, before, strict=True)]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            after = list(torch._foreach_lerp(before, grads, 1 - group["momentum"]))
            ahead = list(torch._foreach_lerp(grads, after, group["momentum"])) if group["nesterov"] else after
            info = torch.zeros(len(params), dtype=torch.int32, device=device)
            directions = orthogonalize(ahead, info=info, **self._options(group))
            self._reports.add(info, [label(number, index, group) for index in indices])
            for i, param in enumerate(params):
                # A layer that is not finite keeps its momentum as it was.
                momentum = torch.where(info[i] < 0, before[i], after[i])
                rate = group["lr"] * adjust(len(param), max(1, param[:1].numel()))
                # In the dtype of the arithmetic, rounded once.
                decayed = param.to(directions[i].dtype) * (1 - group["lr"] * group["weight_decay"])
                updates.append((param, momentum, decayed - rate * directions[i]))
        return updates

    def _momentum(self, param: Tensor) -> Tensor:
        found = self.state.get(param, {}).get("momentum_buffer")
        _, dtype = _check.template("exact", param, param.dtype)
        if found is None:
            return torch.zeros_like(param, dtype=dtype)
        return found.to(param.device, dtype)  # type: ignore[no-any-return]

    def _apply(self, param: Tensor, momentum: Tensor, value: Tensor) -> None:
        kept = self.state[param].setdefault("momentum_buffer", momentum)
        if kept is not momentum:
            if (kept.dtype, kept.device) == (momentum.dtype, momentum.device):
                kept.copy_(momentum)
            else:
                self.state[param]["momentum_buffer"] = momentum
        param.copy_(value)

    def _step_adamw(self) -> None:
        """Lets AdamW do its groups."""
        if not torch.compiler.is_compiling():  # which cannot follow it, and finds what there was before
            self._hand_over()
        if self._adamw.param_groups:
            self._adamw._step()

    def _hand_over(self) -> None:
        """Gives AdamW its groups, which are ours: the same dicts, and the same state."""
        self._adamw.param_groups = [group for group in self.param_groups if not group[SWITCH]]
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer; one of `torch.optim.Muon` loads where the groups are the same.

        Args:
            state_dict: As returned by `state_dict()`.

        Raises:
            ValueError: If the checkpoint is of another model or optimizer; nothing is loaded.
        """

        def remember(_: Optimizer, final: dict[str, Any]) -> None:
            self._verify(final)
            self._given = final

        # Registered last, so that it sees what the user's own hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_given", None)

    def _verify(self, state_dict: dict[str, Any]) -> None:
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            switch = saved.get(SWITCH, group[SWITCH])
            for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                where = f"param_groups[{number}]['params'][{index}]"
                state = {name: value for name, value in state_dict["state"].get(key, {}).items() if value is not None}
                if not state:
                    continue
                if not switch:
                    self._adamw._verify(state, param, self._adamw._keys({**group, **saved}), where)
                elif "momentum_buffer" not in state:
                    raise ValueError(
                        f"state of {where}: expected a key 'momentum_buffer', found {sorted(map(str, state))}; this is "
                        "the state of another optimizer"
                    )
                elif state["momentum_buffer"].shape != param.shape:
                    raise ValueError(
                        f"state of {where}: expected 'momentum_buffer' of shape {tuple(param.shape)}, got "
                        f"{tuple(state['momentum_buffer'].shape)}; this is the state of another model"
                    )
                elif state["momentum_buffer"].layout is not torch.strided:
                    found = state["momentum_buffer"].layout
                    raise ValueError(f"state of {where}: expected a dense 'momentum_buffer', got layout {found}")

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        own = ("backend", "_orthogonalize", "_adamw_defaults", "_reports")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores an optimizer; also the end of torch's `load_state_dict`. Older checkpoints may lack options."""
        keep_switches(self.__dict__.get("param_groups", []), state.get("param_groups", []))
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != SWITCH:
                    group.setdefault(name, value)
        if given := self.__dict__.get("_given"):
            # torch's loader has rounded state to the dtype of its parameter.
            for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
                for param, number in zip(group["params"], saved["params"], strict=True):
                    for key, value in given["state"].get(number, {}).items():
                        if isinstance(value, Tensor):
                            self.state[param][key] = value.to(param.device, copy=True)
        self._adamw = self._new_adamw()
        self._hand_over()


_Update = tuple[Tensor, Tensor, Tensor]


def _is_matrix(param: Any) -> bool:
    """Whether a parameter, or named parameter, has two dimensions; what is none is left to torch to refuse."""
    tensor = param[1] if isinstance(param, tuple) and len(param) == 2 else param
    if isinstance(tensor, Tensor) and is_lazy(tensor):
        raise ValueError(
            "params: expected initialized parameters, got a lazy one, which has no dimensions yet; run the model once "
            "before, or give groups that say what is orthogonal, as fastcurv.param_groups does"
        )
    return not isinstance(tensor, Tensor) or tensor.dim() > 1
