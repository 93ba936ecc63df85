"""The state of an optimizer beside its parameters, and checkpoints of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcurv import _alloc, _check
from fastcurv.ops._multi_tensor import MultiTensorOp
from fastcurv.optim._anchors import Anchors


def _tensor(value: Any) -> Tensor:
    """A state entry of a checkpoint, which may be a number, as a tensor; it stays where it is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _key(name: str) -> str:
    """The state key of one of the op's lists."""
    return name.removeprefix("row_").removesuffix("s")


class StatefulOptimizer(Optimizer):
    """An optimizer whose state is tensors beside its parameters, as the lists of an op say."""

    _op: MultiTensorOp[Any]
    # State that may be missing from a checkpoint: it then starts anew.
    _optional_keys: tuple[str, ...] = ()
    # The state, if any, that starts as a function of the parameter's values.
    _anchored = ""
    # If true, GradScaler hands its scale and overflow flag to the kernel, and clients of torch refuse to clip.
    _step_supports_amp_scaling = False

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, backend: str | None, state_dtype: torch.dtype | None
    ) -> None:
        """Args as `torch.optim.Optimizer`, and where the op runs and in what dtype float32 parameters keep state."""
        _check.backend(backend)
        if state_dtype not in (None, *_check.STATE_DTYPES[torch.float32]):
            raise ValueError(f"state_dtype: expected torch.float32, torch.bfloat16 or None, got {state_dtype!r}")
        self.backend = backend
        self.state_dtype = state_dtype
        self._anchors = Anchors()
        if defaults.get("fused"):  # the constructor's, not a group's, as in torch
            self._step_supports_amp_scaling = True
        self._forget()
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises unless the options of a group, which may come from a checkpoint, can be honoured."""
        raise NotImplementedError

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State that a group does without."""
        return ()

    def _forget(self) -> None:
        """Forgets what was derived from the state."""
        # The state before a step that added to it, for the case that the step fails.
        self._before: dict[Tensor, dict[str, Any]] | None = None

    def _initial(self, key: str, param: Tensor) -> Tensor:
        """A state entry before the first step."""
        shape, dtype = _check.template(self._kind(key), param, self._dtype(param))
        if shape == tuple(param.shape):
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return torch.zeros(shape, dtype=dtype, device=param.device)

    def _keys(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The state keys in the order of the op's lists, None for a list the group leaves empty."""
        unused = self._unused(group)
        return tuple(None if key in unused else key for key in map(_key, self._op.lists[2:]))

    def _keys_of(self, group: dict[str, Any], param: Tensor) -> tuple[str | None, ...]:
        """The state keys of a parameter."""
        return self._keys(group)

    def _kind(self, key: str) -> str:
        return next(_check.kind(name) for name in self._op.lists if _key(name) == key)

    def _anchor(self) -> None:
        """Makes the state that is `_anchored` of the parameters as they are."""
        for param, state in self.state.items():
            if self._anchored in state:
                state[self._anchored].copy_(self._initial(self._anchored, param))
                self._anchors.watch(param)

    def _has_moved(self, param: Tensor) -> Tensor:
        """Whether a parameter is not what it was when the state that is `_anchored` was made of it."""
        kept: Tensor = self.state[param][self._anchored]
        return (kept != self._initial(self._anchored, param)).any()

    def _follow(self, params: list[Tensor]) -> None:
        for param in params:
            self._anchors.follow(param, self.state[param][self._anchored], self._initial(self._anchored, param))

    def _settle(self, params: list[Tensor]) -> None:
        for param in params:
            self._anchors.settle(param, self._has_moved(param))

    def _keep_state(self) -> None:
        """Must come before whatever changes the state of a step that may still fail."""
        if self._before is None:
            self._before = {param: dict(state) for param, state in self.state.items()}

    def _restore(self) -> None:
        """Undoes what preparing a step has made of the state."""
        if self._before is not None:
            for param in list(self.state):
                if param in self._before:
                    self.state[param].clear()
                    self.state[param].update(self._before[param])
                else:
                    del self.state[param]
        self._forget()

    def _started(self, param: Tensor, keys: Sequence[str | None]) -> bool:
        state = self.state.get(param, {})
        return all(state.get(key) is not None for key in keys if key)

    def _dtype(self, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's state."""
        allowed = _check.STATE_DTYPES[param.dtype]
        return self.state_dtype if self.state_dtype in allowed else allowed[0]

    def _initialise(self, param: Tensor, keys: Sequence[str | None]) -> None:
        state = self.state[param]
        for key in filter(None, keys):
            if state.get(key) is None:
                state[key] = self._initial(key, param)

    def _normalise(self, param: Tensor, keys: Sequence[str | None], index: int) -> None:
        """Creates or adapts the state of a parameter: the dtype, device and layout that the op takes."""
        state = self.state[param]
        if state:
            self._verify(state, param, keys, f"params[{index}]")
        if self._anchored and state.get(self._anchored) is None:
            self._anchors.watch(param)
        self._initialise(param, keys)
        for key in filter(None, keys):
            if not self._fits(key, state[key], param):
                state[key] = self._copy(key, state[key], param)

    def _fits(self, key: str, value: Any, param: Tensor) -> bool:
        if not isinstance(value, Tensor) or value.device != param.device:
            return False
        shape, dtype = _check.template(self._kind(key), param, self._dtype(param))
        if value.dtype != dtype or value.shape != shape:
            return False
        like_param = self._kind(key) in ("state", "exact")
        return _check.layout(value) == _check.layout(param) if like_param else value.is_contiguous()

    def _copy(self, key: str, value: Any, param: Tensor) -> Tensor:
        """A state entry as the op takes it, in memory of its own."""
        shape, dtype = _check.template(self._kind(key), param, self._dtype(param))
        if self._kind(key) in ("state", "exact"):
            return _alloc.empty_like(param, dtype=dtype).copy_(value)
        copied = _tensor(value).detach().to(param.device, dtype, copy=True)
        return copied.reshape(shape).contiguous()

    def _verify(self, state: dict[str, Any], param: Tensor, keys: Sequence[str | None], where: str) -> None:
        """Raises unless a state, as a checkpoint holds it, is that of a parameter, or can be completed."""
        for key in filter(None, keys):
            if state.get(key) is None:
                if key not in self._optional_keys:
                    raise ValueError(
                        f"state of {where}: expected a key {key!r}, found {sorted(map(str, state))}. "
                        f"{type(self).__name__} cannot make up {key!r}: load a checkpoint of an optimizer that keeps "
                        "it, or start without optimizer state"
                    )
                continue
            shape, _ = _check.template(self._kind(key), param, self._dtype(param))
            value = _tensor(state[key])
            if value.layout is not torch.strided:
                raise ValueError(f"state of {where}: expected a dense {key!r}, got layout {value.layout}")
            found = tuple(value.shape)
            if math.prod(found) != math.prod(shape) or (self._kind(key) in ("state", "exact") and found != shape):
                raise ValueError(
                    f"state of {where}: expected {key!r} of shape {shape}, got {found}; this is the state of another "
                    "model"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and deepcopy keep no plans, which hold addresses."""
        own = ("backend", "state_dtype", "_anchors", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores an optimizer; also the end of torch's `load_state_dict`. Older checkpoints may lack options."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if given := self.__dict__.get("_given"):
            self._take(given)
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, of its torch counterpart, or of one that keeps the same state.

        State keeps its precision: torch's own loader would round the float32 state of a bfloat16 parameter. Step counts
        may come as numbers or tensors of any dtype and device.

        Args:
            state_dict: As returned by `state_dict()`.

        Raises:
            ValueError: If the checkpoint is of another model, or lacks state that cannot be made up; nothing is loaded.
        """

        def remember(_: Optimizer, final: dict[str, Any]) -> None:
            self._verify_all(final)
            self._given = final

        # Registered last, so that it sees what the user's own hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_given", None)

    def _take(self, given: dict[str, Any]) -> None:
        """Replaces what torch's loader made of a checkpoint's state, which may be rounded, before hooks see it."""
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            for index, (param, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
                # torch's SGD notes None where there is no momentum yet: the next step is then still the first.
                state = {key: value for key, value in given["state"].get(number, {}).items() if value is not None}
                keys = self._keys_of(group, param)
                for key in filter(None, keys):
                    if key in state:
                        self.state[param][key] = self._copy(key, state[key], param)
                if state:
                    self._normalise(param, keys, index)
                if self._anchored in state:
                    self._anchors.forget(param)

    def _verify_all(self, state_dict: dict[str, Any]) -> None:
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            merged = {**group, **saved}
            try:
                self._check_group(merged)
            except (TypeError, ValueError) as error:
                raise type(error)(f"param_groups[{number}] of the checkpoint: {error}; nothing was loaded") from error
            for index, (param, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                if state := state_dict["state"].get(key, {}):
                    where = f"param_groups[{number}]['params'][{index}]"
                    self._verify(state, param, self._keys_of(merged, param), where)
