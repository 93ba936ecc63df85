"""Lookahead around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcurv import _alloc, _check
from fastcurv._chunks import Workspace
from fastcurv.ops import lookahead_
from fastcurv.optim._anchors import Anchors
from fastcurv.optim._wrapper import OptimizerWrapper


class Lookahead(OptimizerWrapper):
    """Lookahead around any optimizer: every k of its steps, slow weights move towards the fast, which restart there.

    The slow update is one fused kernel launch, or one parallel region, over all parameters of a device and dtype. Slow
    weights are copied from the parameters before the first step after construction (so that weights may be loaded in
    between) and follow them until a step moves these, as the first step of distributed checkpoints does not. After
    loading other weights in mid-training call `reset_slow_weights`. Slow weights are float32 for half-precision
    parameters; parameters that do not require gradients are left alone.

    `param_groups` and `state` are those of the wrapped optimizer: schedulers and GradScaler take either. What Lookahead
    keeps is there too: `lookahead_slow_buffer` in the state of each parameter, `lookahead_k`, `lookahead_alpha` and
    `lookahead_step` in each group (`lookahead2_...` around another Lookahead, and so on). So a checkpoint is that of
    the wrapped optimizer, and one of the bare optimizer loads too: slow weights then start from the parameters.

    Args:
        optimizer: The optimizer that takes the fast steps.
        k: Fast steps between two slow ones.
        alpha: How far the slow weights go towards the fast ones, in [0, 1].
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError: If `optimizer` is none.
        ValueError: If `k` or `alpha` is out of range.

    Source: Zhang et al. (2019), Algorithm 1; spec first_order 3.1 item 6. Cost of a slow update:
    `fastcurv.ops.lookahead_`.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fastcurv.Lookahead(torch.optim.SGD([p], lr=0.25), k=2)
        >>> p.grad = torch.ones(2)
        >>> for _ in range(2):
        ...     optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])
    """

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5, *, backend: str | None = None) -> None:
        _check.option("k", k, "int")
        _check.number("alpha", alpha)
        _check.backend(backend)
        self.backend = backend
        depth, inner = 1, optimizer
        while isinstance(inner, Lookahead):
            depth, inner = depth + 1, inner.optimizer
        self._name = f"lookahead{depth}" if depth > 1 else "lookahead"
        self._options = {f"{self._name}_k": k, f"{self._name}_alpha": alpha, f"{self._name}_step": 0}
        # Of parameters whose state is still empty, which many optimizers take for the sign of a first step.
        self._waiting: dict[Tensor, Tensor] = {}
        self._anchors = Anchors()
        super().__init__(optimizer)

    def _option(self, name: str) -> Any:
        """What all groups agree on; a group that was added, or loaded from elsewhere, takes it from the others."""
        key = f"{self._name}_{name}"
        return next((group[key] for group in self.param_groups if key in group), self._options[key])

    @property
    def k(self) -> int:
        """Fast steps between two slow ones."""
        return int(self._option("k"))

    @property
    def alpha(self) -> float:
        """How far the slow weights go towards the fast ones."""
        return float(self._option("alpha"))

    def _set_options(self, step: int) -> None:
        values = {"k": self.k, "alpha": self.alpha, "step": step}
        for group in self.param_groups:
            group.update({f"{self._name}_{name}": value for name, value in values.items()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        super().add_param_group(param_group)
        self._set_options(self._option("step"))

    # What is done here depends on a count that changes each time: torch.compile compiles only what is wrapped.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the wrapped optimizer, and on every k-th a slow one.

        Args:
            closure: Handed to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returned.

        Raises:
            TypeError, ValueError: On a parameter that cannot have slow weights, before anything is written.
        """
        step, k = self._option("step") + 1, self.k
        _check.option(f"{self._name}_k", k, "int")
        params = self._params()
        waiting = dict(self._waiting)
        try:
            slow = [self._slow(param, f"params[{index}]") for index, param in enumerate(params)]
            self._follow(params, slow)
            loss = self.optimizer.step(closure)
        except Exception:
            self._waiting = waiting
            raise
        self._set_options(step)
        with torch.no_grad():
            for param, weights in zip(params, slow, strict=True) if self._anchors else ():
                self._anchors.settle(param, (weights != param).any())
        if step % k == 0:
            with torch.no_grad():
                self._slow_step(params, slow)
        for param in [param for param in self._waiting if param.grad is not None]:
            self.state[param][self._key] = self._waiting.pop(param)
        return loss

    def _params(self) -> list[Tensor]:
        """The parameters that have slow weights."""
        return [
            param
            for group in self.param_groups
            for param in group["params"]
            # Nobody optimizes whole numbers; masks of infinities may be among what is frozen.
            if (param.requires_grad or param.grad is not None) and (param.is_floating_point() or param.is_complex())
        ]

    @torch.no_grad()
    def _follow(self, params: list[Tensor], slow: list[Tensor]) -> None:
        for param, weights in zip(params, slow, strict=True) if self._anchors else ():
            self._anchors.follow(param, weights, _slow_copy(param, param))

    @torch.no_grad()
    def reset_slow_weights(self) -> None:
        """Lets the slow weights start anew where the parameters are, as after loading other weights in mid-training.

        Slow weights of a wrapped optimizer (Ranger, another Lookahead) are its own to reset.
        """
        for index, param in enumerate(self._params()):
            self._slow(param, f"params[{index}]").copy_(param)
            self._anchors.watch(param)

    @property
    def _key(self) -> str:
        return f"{self._name}_slow_buffer"

    def _slow(self, param: Tensor, where: str) -> Tensor:
        """The slow weights of a parameter, in its layout and on its device; made where there are none."""
        state = self.state.get(param, {})
        slow: Tensor | None = state.get(self._key, self._waiting.get(param))
        if slow is not None and slow.shape != param.shape:
            raise ValueError(
                f"{where}: expected shape {tuple(slow.shape)} like its slow weights, got {tuple(param.shape)}; make "
                "a new optimizer for parameters that were replaced by others"
            )
        _, dtype = _check.template("exact", param, param.dtype)
        changed = slow is not None and (slow.dtype, slow.device) != (dtype, param.device)
        if slow is None or changed or _check.layout(slow) != _check.layout(param):
            _check.parameters([param], None)
            if slow is None:
                self._anchors.watch(param)
            slow = _slow_copy(param if slow is None else slow, param)
            if self._key in state:
                state[self._key] = slow
            else:
                self._waiting[param] = slow
        return slow

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _slow_step(self, params: list[Tensor], slow: list[Tensor]) -> None:
        members: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for param, weights in zip(params, slow, strict=True):
            lists = members.setdefault((param.device, param.dtype), ([], []))
            lists[0].append(param)
            lists[1].append(weights)
        for key, lists in members.items():
            space = self._spaces.setdefault(key, lookahead_.workspace())
            arguments = {"alpha": self.alpha, "found_inf": None}
            lookahead_.launch(space, space.prepare(lists), self.backend, arguments)

    def _load(self, state_dict: dict[str, Any]) -> None:
        slow = self._verified(state_dict)
        self._waiting.clear()
        bare = {
            number: {name: value for name, value in state.items() if name != self._key}
            for number, state in state_dict["state"].items()
        }
        # An optimizer may take an empty state for one that has been filled.
        bare = {number: state for number, state in bare.items() if state}
        self.optimizer.load_state_dict({**state_dict, "state": bare})
        for param, buffer in slow.items():
            self.state[param][self._key] = _slow_copy(buffer, param)
            self._anchors.forget(param)
        self._set_options(self._option("step"))
        self._spaces.clear()

    def _verified(self, state_dict: dict[str, Any]) -> dict[Tensor, Tensor]:
        """The slow weights of a checkpoint; raises unless they, and the options, are of this model and in range."""
        slow = {}
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if f"{self._name}_k" in saved:
                _check.option(f"{self._name}_k", saved[f"{self._name}_k"], "int")
            _check.number("alpha", saved.get(f"{self._name}_alpha", 0.0))
            step = saved.get(f"{self._name}_step", 0)
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"{self._name}_step: expected a whole number of at least 0, got {step!r}")
            for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                buffer = state_dict["state"].get(key, {}).get(self._key)
                if buffer is None:
                    continue
                if buffer.shape != param.shape:
                    raise ValueError(
                        f"state of param_groups[{number}]['params'][{index}]: expected {self._key!r} of shape "
                        f"{tuple(param.shape)}, got {tuple(buffer.shape)}; this is the state of another model"
                    )
                slow[param] = buffer
        return slow

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no workspaces, which hold addresses."""
        names = ("backend", "_name", "_options", "_waiting", "_anchors")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `OptimizerWrapper`."""
        super().__setstate__(state)
        self._spaces: dict[tuple[torch.device, torch.dtype], Workspace] = {}
        self._set_options(self._option("step"))

    def __repr__(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha}, {self.optimizer!r})"


def _slow_copy(values: Tensor, param: Tensor) -> Tensor:
    """Values as slow weights of a parameter: in the dtype of the arithmetic, in its layout and on its device."""
    _, dtype = _check.template("exact", param, param.dtype)
    return _alloc.empty_like(param, dtype=dtype).copy_(values.detach())
