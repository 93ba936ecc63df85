"""What every optimizer of fastcurv shares: gathering tensors into lists, their state, checkpoints, and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcurv import _alloc, _check, _library
from fastcurv._chunks import NO_ROWS, Workspace
from fastcurv.ops._multi_tensor import MultiTensorOp
from fastcurv.optim._anchors import Anchors


@dataclass(slots=True)
class _Bucket:
    """Parameters of one group that go to the op in one call: of one device and dtype, with a gradient."""

    indices: list[int]
    params: list[Tensor]
    states: list[dict[str, Any]]
    space: Workspace
    is_first_step: bool

    def lists(self, grads: Sequence[Tensor], keys: Sequence[str | None]) -> list[list[Tensor]]:
        own = [grads[i] for i in self.indices]
        return [self.params, own, *([state[key] for state in self.states] if key else [] for key in keys)]


@dataclass(slots=True)
class _Plan:
    """How the parameters of a group were split, and what that was decided from."""

    params: list[Tensor]
    without_grad: list[Tensor]
    keys: tuple[str | None, ...]
    buckets: list[_Bucket]

    def holds(self, params: list[Tensor], keys: tuple[str | None, ...]) -> bool:
        same = keys == self.keys and _identical(params, self.params)
        return same and not any(bucket.is_first_step for bucket in self.buckets)

    def gather(self) -> list[tuple[_Bucket, Sequence[list[Tensor]]]] | None:
        """The lists of the step; None where a gradient has come or gone, or a tensor has become another."""
        if any(param.grad is not None for param in self.without_grad):
            return None
        gathered: list[tuple[_Bucket, Sequence[list[Tensor]]]] = []
        for bucket in self.buckets:
            lists = bucket.space.gather(bucket.params, bucket.states, self.keys)
            if lists is None:
                return None
            gathered.append((bucket, lists))
        return gathered


def _identical(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _tensor(value: Any) -> Tensor:
    """A state entry of a checkpoint, which may be a number, as a tensor; it stays where it is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _key(name: str) -> str:
    """The state key of one of the op's lists."""
    return name.removeprefix("row_").removesuffix("s")


class MultiTensorOptimizer(Optimizer):
    """An optimizer whose step is one call of an op per group (per device and dtype, where a group mixes them).

    A subclass names its op and the op's arguments. State keys are the singulars of the names of the op's lists, which
    for ops of torch.optim gives torch's keys.
    """

    _op: MultiTensorOp[Any]
    # State that may be missing from a checkpoint: it then starts anew.
    _optional_keys: tuple[str, ...] = ()
    # State that starts as a function of the parameter's values.
    _anchored: str | None = None
    # Where true, GradScaler hands its scale and overflow flag to the kernel. Clients of torch refuse clipping then.
    _step_supports_amp_scaling = False

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, backend: str | None, state_dtype: torch.dtype | None
    ) -> None:
        """Args as `torch.optim.Optimizer`, and where the op runs and in what dtype float32 parameters keep state."""
        if state_dtype not in (None, *_check.STATE_DTYPES[torch.float32]):
            raise ValueError(f"state_dtype: expected torch.float32, torch.bfloat16 or None, got {state_dtype!r}")
        self.backend = backend
        self.state_dtype = state_dtype
        self._anchors = Anchors()
        if defaults.get("fused"):  # the constructor's, not a group's, as in torch
            self._step_supports_amp_scaling = True
        self._forget()
        super().__init__(params, defaults)

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The op's keyword arguments for a group, but for `grad_scale` and `found_inf`."""
        raise NotImplementedError

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        """State that a group does without."""
        return ()

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        """Whether the op must be told of parameters that have no state yet, by `is_first_step`."""
        return False

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

    def _kind(self, key: str) -> str:
        return next(_check.kind(name) for name in self._op.lists if _key(name) == key)

    def _is_for_op(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether the op updates a parameter of a group; if not, the subclass does."""
        return True

    def _keys_of(self, group: dict[str, Any], param: Tensor) -> tuple[str | None, ...]:
        """The state keys of a parameter."""
        return self._keys(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; its hyper-parameters are checked first."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises unless the options of a group, which may come from a checkpoint, can be honoured."""
        arguments = self._arguments(group)
        self._op.check(arguments)
        self._check_averages(arguments)
        if group.get("differentiable"):
            name = type(self).__name__
            instead = f"torch.optim.{name}(differentiable=True)" if hasattr(torch.optim, name) else "one of torch.optim"
            raise ValueError(
                "differentiable=True: the fused step writes its results by address, which autograd cannot follow. "
                f"Use {instead} to differentiate through the optimizer"
            )

    def _check_averages(self, arguments: dict[str, Any]) -> None:
        if self.state_dtype == torch.bfloat16:
            _check.moves_in_bfloat16(arguments)

    def _forget(self) -> None:
        self._plans: dict[int, _Plan] = {}
        # What the state was before a step that changed more of it than numbers.
        self._before: dict[Tensor, dict[str, Any]] | None = None
        self._known_states: list[dict[str, Any]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

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
            self._step()
        return loss

    def _step(self) -> None:
        if _library.must_dispatch([param for group in self.param_groups[:1] for param in group["params"][:1]]):
            self._traced_step()
        else:
            self._eager_step()

    def _eager_step(self) -> None:
        if not _identical(self.state.values(), self._known_states):
            self._plans.clear()
        self._before = None
        calls: list[partial[None]] = []
        try:
            for number, group in enumerate(self.param_groups):
                try:
                    calls += self._prepare(group)
                except (TypeError, ValueError) as error:
                    if len(self.param_groups) == 1:
                        raise
                    raise type(error)(f"parameter group {number}: {error}") from error
        except Exception:
            self._restore()
            raise
        self._before = None
        for call in calls:
            call()

    def _prepare(self, group: dict[str, Any]) -> list[partial[None]]:
        """The calls of the op for a group: everything is checked here, and nothing written but state."""
        params = group["params"]
        keys = self._keys(group)
        plan = self._plans.get(id(group))
        gathered = plan.gather() if plan and plan.holds(params, keys) else None
        if gathered is None:
            gathered = self._gather_anew(group, params, keys, plan)
        calls: list[partial[None]] = []
        for bucket, lists in gathered:
            device = lists[0][0].device
            arguments = self._all_arguments(group, device, bucket.is_first_step)
            # Intervals are for the constructor: a scheduler may leave them by a rounding error.
            self._op.check(arguments, device, intervals=False)
            self._check_averages(arguments)
            calls.append(partial(self._launch, bucket, lists, arguments))
        return calls

    def _launch(self, bucket: _Bucket, lists: Sequence[list[Tensor]], arguments: dict[str, Any]) -> None:
        self._follow(bucket.params)
        self._op.launch(bucket.space, lists, self.backend, arguments)
        for param in bucket.params if self._anchors else ():
            self._anchors.settle(param, self._has_moved(param))

    def _follow(self, params: list[Tensor]) -> None:
        for param in params if self._anchors and self._anchored else ():
            self._anchors.follow(param, self.state[param][self._anchored], self._initial(self._anchored, param))

    def _has_moved(self, param: Tensor) -> Tensor:
        """Whether a parameter is not what it was when the state that is `_anchored` was made of it."""
        assert self._anchored
        return (self.state[param][self._anchored] != self._initial(self._anchored, param)).any()

    def _anchor(self) -> None:
        """Makes the state that is `_anchored` of the parameters as they are."""
        for param, state in self.state.items():
            if self._anchored in state:
                state[self._anchored].copy_(self._initial(self._anchored, param))
                self._anchors.watch(param)

    def _gather_anew(
        self, group: dict[str, Any], params: list[Tensor], keys: tuple[str | None, ...], plan: _Plan | None
    ) -> list[tuple[_Bucket, Sequence[list[Tensor]]]]:
        self._keep_state()
        own = [self._is_for_op(group, p) for p in params]
        grads: list[Any] = [p.grad if is_own else None for p, is_own in zip(params, own, strict=True)]
        known = {(bucket.is_first_step, *bucket.indices): bucket.space for bucket in plan.buckets} if plan else {}
        needs_whole = self._op.rows(self._arguments(group)) != NO_ROWS
        buckets = self._buckets(params, grads, keys, self._first_step_differs(group), known, needs_whole)
        without_grad = [p for p, g, is_own in zip(params, grads, own, strict=True) if is_own and g is None]
        self._plans[id(group)] = _Plan(list(params), without_grad, keys, buckets)
        self._known_states = list(self.state.values())
        return [(bucket, bucket.space.prepare(bucket.lists(grads, keys), bucket.indices)) for bucket in buckets]

    def _buckets(
        self,
        params: list[Tensor],
        grads: list[Any],
        keys: Sequence[str | None],
        first_step_differs: bool,
        known: dict[tuple[int, ...], Workspace],
        needs_whole: bool,
    ) -> list[_Bucket]:
        members: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        for i, param in enumerate(params):
            if grads[i] is not None:
                first = first_step_differs and not self._started(param, keys)
                members.setdefault((param.device, param.dtype, first), []).append(i)
        for indices in members.values():
            _check.parameters([params[i] for i in indices], [grads[i] for i in indices], indices)
            for i in indices if needs_whole else ():
                _check.whole(params[i], f"params[{i}]")
        for indices in members.values():
            for i in indices:
                self._normalise(params[i], keys, i)
        return [
            _Bucket(
                indices=indices,
                params=[params[i] for i in indices],
                states=[self.state[params[i]] for i in indices],
                space=known.get((first, *indices)) or self._op.workspace(),
                is_first_step=first,
            )
            for (_, _, first), indices in members.items()
        ]

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

    def _traced_step(self) -> None:
        for group in self.param_groups:
            self._trace(group)

    def _trace(self, group: dict[str, Any]) -> None:
        """The step of a group in ops that torch.compile can see, unchecked."""
        keys = self._keys(group)
        members: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None and self._is_for_op(group, param):
                first = self._first_step_differs(group) and not self._started(param, keys)
                members.setdefault((param.device, param.dtype, first), []).append(param)
        for (device, _, first), params in members.items():
            for param in params:
                if not self._started(param, keys):
                    self._initialise(param, keys)
            if self._anchors:
                torch.compiler.disable(self._follow)(params)
            states = [self.state[param] for param in params]
            lists: list[Any] = [params, [param.grad for param in params]]
            lists += [[state[key] for state in states] if key else [] for key in keys]
            self._op.dispatch(lists, self.backend, self._all_arguments(group, device, first))

    def _all_arguments(self, group: dict[str, Any], device: torch.device, is_first_step: bool) -> dict[str, Any]:
        """`_arguments`, and GradScaler's scale and overflow flag, which it sets as attributes, where the kernel is."""
        arguments = self._arguments(group)
        for name in ("grad_scale", "found_inf"):
            value = getattr(self, name, None)
            arguments[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else None
        return {**arguments, "is_first_step": True} if is_first_step else arguments

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
        """What pickle and deepcopy keep: no plans, which hold addresses."""
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
