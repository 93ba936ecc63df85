"""What optimizers around another optimizer share: its groups and state are theirs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """An optimizer around another one, to schedulers, GradScaler and checkpoints the one it wraps.

    Args:
        optimizer: What is wrapped.

    Raises:
        TypeError: If it is no optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """That of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the wrapped one.

        Args:
            state_dict: As returned by `state_dict()` of either.

        Raises:
            ValueError: If the checkpoint is of another model; nothing is loaded.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was kept, and makes what torch's constructor would make, but for parameter groups."""
        self.__dict__.update(state)
        super().__setstate__({"defaults": self.optimizer.defaults})
