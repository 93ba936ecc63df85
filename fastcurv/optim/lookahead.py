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


class Lookahead(Optimizer):
    """Lookahead around any optimizer: every k of its steps, slow weights move towards the fast, which restart there.

    The slow update is one fused kernel launch, or one parallel region, over all parameters of a device and dtype. Slow
    weights are copied from the parameters before the first step after construction (so that weights may be loaded in
    between), and are float32 for half-precision parameters. `param_groups` and `state` are those of the wrapped
    optimizer: schedulers and GradScaler take either. A checkpoint is that of the wrapped optimizer, with `slow_buffer`
    in the state of each parameter and `lookahead_step` in each group; one of the bare optimizer loads too.

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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
        _check.number("alpha", alpha)
        self.optimizer, self.k, self.alpha, self.backend = optimizer, k, alpha, backend
        self._slow: dict[Tensor, Tensor] = {}
        self._fast_steps = 0
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of the wrapped optimizer."""
        return self.optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    # What is done here depends on a count that changes each time: torch.compile compiles only what is wrapped.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the wrapped optimizer, and on every k-th a slow one.

        Args:
            closure: Handed to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returned.

        Raises:
            TypeError, ValueError: On a parameter that has no slow weights here, before anything is written.
        """
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.is_floating_point() or param.is_complex()  # nobody optimizes whole numbers
        ]
        for index, param in enumerate(params):
            if param not in self._slow:
                _check.dense_tensor(param, f"params[{index}]")
                self._slow[param] = _slow_copy(param, param)
        loss = self.optimizer.step(closure)
        self._fast_steps += 1
        if self._fast_steps % self.k == 0:
            with torch.no_grad():
                self._slow_step(params)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _slow_step(self, params: list[Tensor]) -> None:
        members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            members.setdefault((param.device, param.dtype), []).append(param)
        for key, fast in members.items():
            for param in fast:
                slow = self._slow[param]
                if slow.device != param.device or _check.layout(slow) != _check.layout(param):  # moved in between
                    self._slow[param] = _slow_copy(slow, param)
            lists = [fast, [self._slow[param] for param in fast]]
            space = self._spaces.setdefault(key, lookahead_.workspace())
            lookahead_.launch(space, space.prepare(lists), self.backend, {"alpha": self.alpha, "found_inf": None})

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the slow weights in it."""
        state_dict = self.optimizer.state_dict()
        state = {number: dict(entries) for number, entries in state_dict["state"].items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved["lookahead"] = {"k": self.k, "alpha": self.alpha, "step": self._fast_steps}
            for param, number in zip(group["params"], saved["params"], strict=True):
                if param in self._slow:
                    state.setdefault(number, {})["slow_buffer"] = self._slow[param]
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the wrapped one: slow weights then start from the parameters.

        Args:
            state_dict: As returned by `state_dict()` of either.

        Raises:
            ValueError: If the checkpoint is of another model; nothing is loaded.
        """
        slow: dict[Tensor, Tensor] = {}
        bare_groups, lookahead = [], None
        for number, saved in enumerate(state_dict["param_groups"]):
            lookahead = saved.get("lookahead", lookahead)
            bare_groups.append({name: value for name, value in saved.items() if name != "lookahead"})
            params = self.param_groups[number]["params"] if number < len(self.param_groups) else []
            for index, (param, key) in enumerate(zip(params, saved["params"], strict=False)):
                buffer = state_dict["state"].get(key, {}).get("slow_buffer")
                if buffer is None:
                    continue
                if buffer.shape != param.shape:
                    raise ValueError(
                        f"state of param_groups[{number}]['params'][{index}]: expected 'slow_buffer' of shape "
                        f"{tuple(param.shape)}, got {tuple(buffer.shape)}; this is the state of another model"
                    )
                slow[param] = _slow_copy(buffer, param)
        bare = {
            key: {name: value for name, value in entries.items() if name != "slow_buffer"}
            for key, entries in state_dict["state"].items()
        }
        # An optimizer may take an empty state for one that has been filled.
        bare = {key: entries for key, entries in bare.items() if entries}
        self.optimizer.load_state_dict({**state_dict, "state": bare, "param_groups": bare_groups})
        self._slow, self._fast_steps = slow, 0
        if lookahead is not None:
            self.k, self.alpha, self._fast_steps = lookahead["k"], lookahead["alpha"], lookahead["step"]
        self._spaces.clear()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no workspaces, which hold addresses."""
        names = ("optimizer", "k", "alpha", "backend", "_slow", "_fast_steps")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was kept, and makes what torch's constructor would make, but for parameter groups."""
        self.__dict__.update(state)
        self._spaces: dict[tuple[torch.device, torch.dtype], Workspace] = {}
        super().__setstate__({"defaults": self.optimizer.defaults})

    def __repr__(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha}, {self.optimizer!r})"


def _slow_copy(values: Tensor, param: Tensor) -> Tensor:
    """Values as slow weights of a parameter: in the dtype of the arithmetic, in its layout and on its device."""
    _, dtype = _check.template("exact", param, param.dtype)
    return _alloc.empty_like(param, dtype=dtype).copy_(values.detach())
