"""Orthogonalised gradients: what an optimizer is shown in place of `p.grad` while it steps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcurv import _check, _library
from fastcurv.ops._matrices import norm as norm_of
from fastcurv.ops._matrices import scaled
from fastcurv.ops.orthogonalize import orthogonalize

NORMALIZATIONS = (None, "layer", "component")

# What the groups of an optimizer say of themselves.
SWITCH = "orthogonal"


class Names(NamedTuple):
    """What messages call a parameter, and its gradient."""

    layer: str
    grad: str


class Orthogonalisation:
    """Replaces the gradients of the matrices among an optimizer's parameters by orthogonalised ones.

    Args:
        normalize: In place of orthogonalisation, the controls of the thesis, table 5.5: `layer` divides each gradient
            by its norm, `component` each of its rows by the row's.
        max_norm: Norm of all gradients together to which they are clipped, after orthogonalisation; None: they are
            not.
        **options: Those of `fastcurv.ops.orthogonalize`.
    """

    def __init__(self, normalize: str | None, max_norm: float | None, **options: Any) -> None:
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected 'layer', 'component' or None, got {normalize!r}")
        if max_norm is not None:
            _check.number("max_norm", max_norm)
        self.normalize, self.max_norm, self.options = normalize, max_norm, options
        orthogonalize([], **options)  # raises on what it cannot take
        self._reports = Reports()

    @contextmanager
    def shown(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """While it lasts, `p.grad` is what an optimizer is to see; afterwards it is the same object as before.

        Args:
            groups: Parameter groups; a group whose `orthogonal` is False keeps its gradients.
        """
        self._reports.warn()
        labelled = {
            param: names_of(number, index, group)
            for number, group in enumerate(groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None
        }
        matrices = [
            (param, labelled[param])
            for group in groups
            if group.get(SWITCH, True)
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

    def _replaced(self, matrices: list[tuple[Tensor, Names]]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.normalize:
            for param, names in matrices:
                _check.dense_tensor(_grad(param), names.grad)
                self._reports.add(torch.where(_grad(param).isfinite().all(), 0, -2)[None], [names.layer])
                yield param, _normalised(_grad(param), self.normalize)
            return
        members: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Names]]] = {}
        for param, names in matrices:
            members.setdefault((param.device, param.dtype), []).append((param, names))
        for (device, _), found in members.items():
            info = torch.zeros(len(found), dtype=torch.int32, device=device)
            try:
                results = orthogonalize([_grad(param) for param, _ in found], info=info, **self.options)
            except (TypeError, ValueError) as error:
                raise type(error)(_named(str(error), [names.grad for _, names in found])) from None
            self._reports.add(info, [names.layer for _, names in found])
            yield from zip([param for param, _ in found], results, strict=True)

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

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: nothing, for it may be on its way from a GPU."""
        return {"_kept": []}

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
            copy = torch.empty(info.shape, dtype=info.dtype, pin_memory=True).copy_(info, non_blocking=True)
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
    if not isinstance(group.get(SWITCH, True), bool):
        raise ValueError(f"{SWITCH}: expected True or False, got {group[SWITCH]!r}")


def keep_switches(before: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """Lets loaded groups that do not say whether they are orthogonalised be so if those before them were."""
    for old, new in zip(before, loaded, strict=False):
        if SWITCH in old:
            new.setdefault(SWITCH, old[SWITCH])


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
