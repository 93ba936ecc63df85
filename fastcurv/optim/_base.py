"""The step that all optimizers share: tensors are gathered into lists, and an op is called on these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastcurv import _check, _library
from fastcurv._chunks import NO_ROWS, Workspace
from fastcurv.optim._state import StatefulOptimizer


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


class MultiTensorOptimizer(StatefulOptimizer):
    """An optimizer whose step is one call of an op per group (per device and dtype, where a group mixes them).

    A subclass names its op and the op's arguments. State keys are the singulars of the names of the op's lists, which
    for ops of torch.optim gives torch's keys.
    """

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The op's keyword arguments for a group, but for `grad_scale` and `found_inf`."""
        raise NotImplementedError

    def _first_step_differs(self, group: dict[str, Any]) -> bool:
        """Whether the op must be told of parameters that have no state yet, by `is_first_step`."""
        return False

    def _is_for_op(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether the op updates a parameter of a group; if not, the subclass does."""
        return True

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
        super()._forget()
        self._plans: dict[int, _Plan] = {}
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
            launch = partial(self._op.launch, bucket.space, lists, self.backend, arguments)
            around = [partial(run, bucket.params) for run in (self._follow, self._settle)] if self._anchors else []
            calls += [*around[:1], launch, *around[1:]]
        return calls

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
