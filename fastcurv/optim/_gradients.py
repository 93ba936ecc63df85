"""Orthogonalised gradients: what an optimizer is shown in place of `p.grad` while it steps."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcurv import _alloc, _check, _library
from fastcurv.ops._matrices import norm as norm_of
from fastcurv.ops._matrices import scaled
from fastcurv.ops.orthogonalize import orthogonalize

NORMALIZATIONS = (None, "layer", "component")

# Group options: whether a group is orthogonalized, and which matrices its tensors are.
SWITCH = "orthogonal"
MATRIX = "matrix"
# The slices of a tensor along dim 0 are rows; those along dim 1 are columns; the last two dimensions are a matrix each.
SHAPES = ("rows", "columns", "batch")


class Names(NamedTuple):
    """What messages call a parameter, and its gradient."""

    layer: str
    grad: str

    def each(self, matrices: list[Tensor]) -> list[Names]:
        """Names of the matrices that a tensor is made of."""
        if len(matrices) == 1:
            return [self]
        return [Names(*(f"{name}, matrix {i}" for name in self)) for i in range(len(matrices))]


class Orthogonalisation:
    """Replaces the gradients of the matrices among an optimizer's parameters by orthogonalised ones.

    Args:
        normalize: In place of orthogonalisation, the controls of the thesis, table 5.5: `layer` divides each gradient
            by its norm, `component` each of its rows by the row's.
        max_norm: Norm of all gradients together to which they are clipped, after orthogonalisation; None: they are
            not.
        matrix: One of `SHAPES`, or None, for groups that do not say it.
        **options: Those of `fastcurv.ops.orthogonalize`.
    """

    def __init__(
        self, normalize: str | None, max_norm: float | None, matrix: str | None = None, **options: Any
    ) -> None:
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected 'layer', 'component' or None, got {normalize!r}")
        if max_norm is not None:
            _check.number("max_norm", max_norm)
        check_matrix(matrix)
        self.normalize, self.max_norm, self.matrix, self.options = normalize, max_norm, matrix, options
        orthogonalize([], **options)  # raises on what it cannot take
        self._reports = Reports()

    @contextmanager
    def shown(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """While it lasts, `p.grad` is what an optimizer is to see; afterwards it is the same object as before.

        Args:
            groups: Parameter groups; a group whose `orthogonal` is False keeps its gradients.
        """
        self._reports.warn()
        self._reports.warn_of_stacks(groups, self.matrix)
        labelled = {
            param: names_of(number, index, group)
            for number, group in enumerate(groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None
        }
        for group in groups:
            check_switch(group)
            for param in group["params"] if group.get(SWITCH) is not False else ():
                if param in labelled:  # also of one dimension, as flattened shards are
                    _check.whole(param, labelled[param].layer)
        matrices = [
            (param, labelled[param], group.get(MATRIX) or self.matrix)
            for group in groups
            if group.get(SWITCH) is not False
            for param in group["params"]
            if param in labelled and param.dim() > 1
        ]
        before = [param.grad for param in labelled]
        try:
            with torch.no_grad():
                for param, grad in self._replaced(matrices):
                    param.grad = grad
                if self.max_norm is not None:
                    self._clip(labelled, self.max_norm)
            yield
        finally:
            for param, grad in zip(labelled, before, strict=True):
                param.grad = grad

    def _replaced(self, matrices: list[tuple[Tensor, Names, str | None]]) -> list[tuple[Tensor, Tensor]]:
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Names, str | None]]] = {}
        for param, name, how in matrices:
            _check.dense_tensor(_grad(param), name.grad)
            members.setdefault((param.device, param.dtype), []).append((param, name, how))
        run = partial(normalized, self.normalize) if self.normalize else partial(orthogonalized, self.options)
        replaced: list[tuple[Tensor, Tensor]] = []
        for found in members.values():
            grads, names, hows = [_grad(p) for p, _, _ in found], [n for _, n, _ in found], [h for _, _, h in found]
            results = by_matrices(grads, hows, names, run, self._reports)
            replaced += [(param, result) for (param, _, _), (result, _) in zip(found, results, strict=True)]
        return replaced

    def _clip(self, labelled: dict[Tensor, Names], max_norm: float) -> None:
        grads = [_grad(param) for param in labelled]
        for grad, names in zip(grads, labelled.values(), strict=True):
            _check.dense_tensor(grad, names.grad)
        if not grads:
            return
        norms = torch.stack([norm_of(g).reshape(()).to(grads[0].device) for g in grads])
        # What is not finite is no reason to stop all others.
        norm = norm_of(torch.where(norms.isfinite(), norms, 0.0)).reshape(())
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for param, grad in zip(labelled, grads, strict=True):
            param.grad = (grad * factor.to(grad.device)).to(grad.dtype)


class Reports:
    """What `info` said of the layers of a step, read at a later one: nothing waits for a GPU."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, list[str], torch.cuda.Event | None]] = []
        self._has_warned_of_stacks = False

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: nothing, for it may be on its way from a GPU."""
        return {**self.__dict__, "_kept": []}

    def add(self, info: Tensor, layers: list[str]) -> None:
        """Keeps what an op said of some layers.

        Args:
            info: One int32 element for each.
            layers: What messages call them.
        """
        if _library.must_dispatch([info]):  # a warning is no part of a graph, and fake tensors say nothing
            return
        if info.device.type != "cuda":
            self._kept.append((info, layers, None))
        elif not torch.cuda.is_current_stream_capturing():
            copy = _alloc.empty(*info.shape, dtype=info.dtype, device="cpu", pin_memory=True)
            copy.copy_(info, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._kept.append((copy, layers, event))

    def warn(self) -> None:
        """Warns of the layers that an earlier step left out."""
        if torch.compiler.is_compiling():
            return
        reports, self._kept = self._kept, []
        for report in reports:
            info, layers, event = report
            if event is not None and not event.query():
                self._kept.append(report)
                continue
            failed = [layer for layer, code in zip(layers, info.tolist(), strict=True) if code < 0]
            if failed:
                warnings.warn(
                    f"the gradient of {', '.join(failed)} held NaN or infinity in an earlier step; it counted as zero "
                    "there. Look for a loss that overflows (GradScaler skips such steps), or a learning rate that is "
                    "too large",
                    stacklevel=2,
                )

    def warn_of_stacks(self, groups: list[dict[str, Any]], default: str | None = None) -> None:
        """Warns, once, of tensors that may be stacks of matrices and are taken as one.

        Args:
            groups: Parameter groups.
            default: Of groups that do not say which matrices their tensors are.
        """
        if self._has_warned_of_stacks or torch.compiler.is_compiling():
            return
        self._has_warned_of_stacks = True
        found = [
            names_of(number, index, group).layer
            for number, group in enumerate(groups)
            if group.get(SWITCH) is not False and not (group.get(MATRIX) or default)
            for index, param in enumerate(group["params"])
            if param.dim() == 3
        ]
        if found:
            warnings.warn(
                f"{', '.join(found)}: of three dimensions, and the group has no {MATRIX!r}: each is taken as one "
                "matrix, whose rows are its slices along dim 0 ('rows'). Say matrix='batch' for stacks of matrices, "
                "such as experts, or matrix='rows' for filters; fastcurv.param_groups tells them apart",
                stacklevel=2,
            )


# From matrices of one dtype and device, and their names, to what takes their place, and an int32 `info` of each.
Run = Callable[[list[Tensor], list[Names]], tuple[list[Tensor], Tensor]]


def orthogonalized(options: dict[str, Any], matrices: list[Tensor], names: list[Names]) -> tuple[list[Tensor], Tensor]:
    """Orthogonalised matrices; see `Run`."""
    info = torch.zeros(len(matrices), dtype=torch.int32, device=matrices[0].device)
    try:
        return orthogonalize(matrices, info=info, **options), info
    except (TypeError, ValueError) as error:
        raise type(error)(_named(str(error), [name.grad for name in names])) from None


def normalized(how: str, matrices: list[Tensor], names: list[Names]) -> tuple[list[Tensor], Tensor]:
    """Matrices divided by their norms, or rows by theirs; see `Run`."""
    info = torch.stack([torch.where(matrix.isfinite().all(), 0, -2) for matrix in matrices])
    return [_normalised(matrix, how) for matrix in matrices], info


def by_matrices(
    tensors: list[Tensor], hows: Sequence[str | None], names: list[Names], run: Run, reports: Reports
) -> list[tuple[Tensor, Tensor]]:
    """Applies a function to the matrices that tensors are made of.

    Args:
        tensors: Tensors of two or more dimensions, of one dtype and device.
        hows: Of each, one of `SHAPES`, or None, which is "rows".
        names: Of each.
        run: What is applied.
        reports: Told of the matrices that failed.

    Returns:
        For each tensor the result, of its shape, and `info` in a shape that broadcasts to it.
    """
    pieces = [_matrices_of(tensor, how) for tensor, how in zip(tensors, hows, strict=True)]
    matrices = [matrix for some in pieces for matrix in some]
    named = [name for whole, some in zip(names, pieces, strict=True) for name in whole.each(some)]
    results: list[Tensor] = []
    info = torch.zeros(0, dtype=torch.int32, device=tensors[0].device)
    if matrices:
        results, info = run(matrices, named)
        reports.add(info, [name.layer for name in named])
    found, begin = [], 0
    for tensor, how, some in zip(tensors, hows, pieces, strict=True):
        end = begin + len(some)
        if _is_stack(tensor, how):
            result = torch.stack(results[begin:end]).view(tensor.shape) if some else torch.zeros_like(tensor)
            found.append((result, info[begin:end].view(*tensor.shape[:-2], 1, 1)))
        else:
            result = results[begin]
            found.append((result.transpose(0, 1) if how == "columns" else result, info[begin]))
        begin = end
    return found


def _is_stack(tensor: Tensor, how: str | None) -> bool:
    return how == "batch" and tensor.dim() > 2


def _matrices_of(tensor: Tensor, how: str | None) -> list[Tensor]:
    if _is_stack(tensor, how):
        return list(tensor.flatten(0, -3).unbind())
    return [tensor.transpose(0, 1) if how == "columns" else tensor]


def sides(tensor: Tensor, how: str | None) -> tuple[int, int]:
    """Rows and columns of the matrices that a tensor is made of; at least one column."""
    rows = tensor.shape[{"batch": -2 if _is_stack(tensor, how) else 0, "columns": 1}.get(how or "", 0)]
    whole = math.prod(tensor.shape[-2:] if _is_stack(tensor, how) else tensor.shape)
    return rows, max(1, whole // max(1, rows))


def check_matrix(value: object) -> None:
    """Raises unless a group says in a way that can be understood which matrices its tensors are."""
    if value is not None and value not in SHAPES:
        raise ValueError(f"{MATRIX}: expected one of {', '.join(SHAPES)}, or None, got {value!r}")


def check_options(group: dict[str, Any], shared: Orthogonalisation) -> None:
    """Raises if a group has options of its own where all groups share them."""
    for name in ("normalize", "max_norm", *shared.options):
        if name in group:
            raise ValueError(
                f"{name}: expected as an argument of the optimizer, for all its groups, got it in one group; make "
                "another optimizer for the parameters of this group"
            )


def check_switch(group: dict[str, Any]) -> None:
    """Raises unless a group says in a way that can be understood whether it is orthogonalised."""
    if group.get(SWITCH) is not None and not isinstance(group[SWITCH], bool):
        raise ValueError(f"{SWITCH}: expected True or False, got {group[SWITCH]!r}")
    check_matrix(group.get(MATRIX))


def keep(before: list[dict[str, Any]], loaded: list[dict[str, Any]], names: Sequence[str] = (SWITCH, MATRIX)) -> None:
    """Lets loaded groups that do not say something of themselves say what those before them said."""
    for old, new in zip(before, loaded, strict=False):
        for name in names:
            if name in old:
                new.setdefault(name, old[name])


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _named(message: str, grads: list[str]) -> str:
    """A message of `orthogonalize` that calls matrices what they are here."""
    return re.sub(r"matrices\[(\d+)\]", lambda found: grads[int(found[1])], message)


def names_of(number: int, index: int, group: dict[str, Any]) -> Names:
    """Of a parameter of a group: by its name, where the optimizer was given names."""
    if "param_names" in group:
        layer = repr(group["param_names"][index])
        return Names(layer, f"the gradient of {layer}")
    shape = tuple(group["params"][index].shape)
    return Names(f"group {number}, params[{index}] {shape}", f"parameter group {number}: grads[{index}]")


def _normalised(grad: Tensor, how: str) -> Tensor:
    dims = None if how == "layer" else tuple(range(1, grad.dim()))
    grad, _ = scaled(grad, dims)
    norm = norm_of(grad, dims)
    return torch.where(norm.isfinite() & (norm > 0), grad / norm, 0.0).to(grad.dtype)
