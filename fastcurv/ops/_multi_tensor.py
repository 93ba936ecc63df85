"""What the public ops over lists of tensors share: they are told apart by nothing but their signatures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor

from fastcurv import _check, _library
from fastcurv._chunks import NO_ROWS, Workspace

P = ParamSpec("P")

_OPTION_TYPES = ("bool", "int", "str")


class MultiTensorOp(Generic[P]):
    """An in-place op over lists of tensors, in one launch or one parallel region.

    Made from a function whose signature says everything: `list[Tensor]` arguments are lists, all of them written but
    `grads`; `float | Tensor` ones are hyper-parameters; `bool`, `int` and `str` ones choose what is computed. The body
    of the function is what has to be checked beyond that.

    Args:
        function: `<name>_`, with the documentation.
        optional: Lists that may be empty.
        read_only: Lists that are not written.
        occasional: Lists that are read and written on some steps only.
        rows: How the arguments divide parameters into rows: see `fastcurv._chunks`. None: they do not.
    """

    def __init__(
        self,
        function: Callable[P, None],
        optional: Sequence[str] = (),
        read_only: Sequence[str] = ("grads",),
        occasional: Sequence[str] = (),
        rows: Callable[[dict[str, Any]], int] | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__.removesuffix("_")
        self._check_arguments, self._rows = function, rows
        self._signature = inspect.signature(function)
        types = {name: p.annotation for name, p in self._signature.parameters.items()}
        self.lists = tuple(name for name, kind in types.items() if kind == "list[Tensor]")
        self.scalars = tuple(name for name, kind in types.items() if kind == "float | Tensor")
        self.options = {name: kind for name, kind in types.items() if kind in _OPTION_TYPES}
        self.optional = tuple(optional)
        self.occasional = tuple(occasional)
        self.mutated = tuple(name not in read_only for name in self.lists)
        self._workspace_at = functools.lru_cache(maxsize=64)(lambda address, count: self.workspace())
        self._dispatch = _library.register(self._schema(types), self._registered)

    def workspace(self) -> Workspace:
        """What a caller keeps between steps on the same lists, so that they are not checked and tabled anew."""
        return Workspace(self.lists, self.mutated, self.optional, self.occasional)

    def rows(self, arguments: dict[str, Any]) -> int:
        """How parameters are divided into rows, given the op's keyword arguments."""
        return self._rows(arguments) if self._rows else NO_ROWS

    def check(self, arguments: dict[str, Any], device: torch.device | None = None, *, intervals: bool = True) -> None:
        """Raises on a hyper-parameter or option that the implementations cannot take; tensors are not read.

        Args:
            arguments: Keyword arguments of the implementations.
            device: Where the parameters are, if hyper-parameters that are tensors have to be where a kernel reads them.
            intervals: Whether hyper-parameters have to be in their intervals.
        """
        for name in self.scalars:
            _check.number(name, arguments[name], intervals)
        for name, kind in self.options.items():
            _check.option(name, arguments[name], kind)
        for name, value in arguments.items():
            if device and isinstance(value, Tensor):
                _check.scalar_device(name, value, device)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        self.check(arguments)
        self._check_arguments(*bound.args, **bound.kwargs)
        params = arguments["params"]
        if len(params) == 0:
            return
        lists = [list(arguments.pop(name)) for name in self.lists]
        backend = arguments.pop("backend")
        _check.backend(backend)
        if _library.must_dispatch(params):
            self.dispatch(lists, backend, arguments)
        else:
            plain = _check.is_addressable(params[0])
            # Any workspace is right for any lists; this one is likely to match.
            space = self._workspace_at(params[0].data_ptr(), len(params)) if plain else self.workspace()
            self.check(arguments, params[0].device)
            self.launch(space, space.prepare(lists), backend, arguments)

    def dispatch(self, lists: Sequence[list[Tensor]], backend: str | None, arguments: dict[str, Any]) -> None:
        """Runs the op through the dispatcher, as torch.compile has to see it; checks come when it runs.

        Args:
            lists: The lists.
            backend: A back end by name, or None for the best.
            arguments: All keyword arguments of the implementations.
        """
        numbers, tensors = _library.split_scalars({name: arguments[name] for name in self.scalars})
        others = {name: value for name, value in arguments.items() if name not in numbers}
        self._dispatch(*lists, **numbers, **others, tensors=tensors, backend=backend)

    def launch(
        self, space: Workspace, lists: Sequence[list[Tensor]], backend: str | None, arguments: dict[str, Any]
    ) -> None:
        """Runs the op on lists that a workspace has prepared.

        Args:
            space: The workspace.
            lists: What its `prepare` returned.
            backend: A back end by name, or None for the best.
            arguments: All keyword arguments of the implementations.
        """
        space.launch(self.name, lists, backend, self.rows(arguments), arguments)

    def _registered(self, *lists: list[Tensor], tensors: Sequence[Tensor | None], **keywords: Any) -> None:
        numbers = {name: keywords.pop(name) for name in self.scalars}
        self(*lists, **_library.join_scalars(numbers, tensors), **keywords)  # type: ignore[arg-type]

    def _schema(self, types: dict[str, str]) -> str:
        letters = iter("abcdefgh")
        lists = [
            f"Tensor({next(letters)}!)[] {name}" if written else f"Tensor[] {name}"
            for name, written in zip(self.lists, self.mutated, strict=True)
        ]
        keywords = [f"float {name}" for name in self.scalars]
        keywords += [f"{types[name]} {name}" for name in self.options]
        keywords += [f"Tensor? {name}" for name, kind in types.items() if kind == "Tensor | None"]
        return f"{self.name}_({', '.join([*lists, '*', *keywords])}, Tensor?[] tensors, str? backend=None) -> ()"


def multi_tensor_op(**options: Any) -> Callable[[Callable[P, None]], MultiTensorOp[P]]:
    """Decorator that makes a `MultiTensorOp`; the options are those of its constructor."""
    return lambda function: MultiTensorOp(function, **options)
