"""Who takes part in a case: the back ends of fastcurv, torch, other libraries, and our own Adam to compare with."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastcurv
from fastcurv import _backend

from .harness import Options, Role
from .stepping import Implementation, Make

YARDSTICK = "fastcurv Adam"


@dataclasses.dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        name: As printed.
        module: Where it is imported from.
        optimizer: Its name there.
        options: Its keywords, but for the learning rate.
        on_gpu: Other keywords on a GPU; None: it is not measured there.
        attributes: What is set on the optimizer once it is made.
        computes, truth: See `Implementation`.
    """

    name: str
    module: str
    optimizer: str
    options: dict[str, Any]
    on_gpu: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    computes: str = ""
    truth: Make | None = None

    def make(self, params: list[Parameter], lr: float) -> Optimizer:
        """The optimizer for parameters."""
        options = {**self.options, **(self.on_gpu or {} if params[0].is_cuda else {})}
        made: Optimizer = getattr(importlib.import_module(self.module), self.optimizer)(params, lr=lr, **options)
        for name, value in self.attributes.items():
            setattr(made, name, value)
        return made


def optimi(optimizer: str, options: dict[str, Any], **others: Any) -> list[Peer]:
    """An optimizer of torch-optimi: its batched one and its loop; on a GPU its Triton kernel."""
    cpu = {**options, "triton": False}
    batched = {**cpu, "foreach": True}
    return [
        Peer("torch-optimi", "optimi", optimizer, batched, on_gpu={"foreach": False, "triton": True}, **others),
        Peer("torch-optimi loop", "optimi", optimizer, {**cpu, "foreach": False}, on_gpu=None, **others),
    ]


def kozistr(optimizer: str, options: dict[str, Any], **others: Any) -> list[Peer]:
    """An optimizer of pytorch_optimizer: its batched one and its loop."""
    library = "pytorch_optimizer"
    return [
        Peer(name, library, optimizer, {**options, "foreach": foreach}, **others)
        for name, foreach in ((library, True), (f"{library} loop", False))
    ]


def implementations(
    options: Options,
    dtype: torch.dtype,
    *,
    op: str,
    ours: Any,
    states: int,
    theirs: Any = None,
    fused: bool = True,
    yardstick: bool = False,
    peers: Sequence[Peer] = (),
) -> list[Implementation]:
    """Who computes what a case asks for, fastcurv first, best back end first.

    Args:
        options: Device; whether to include torch.compile and other libraries.
        dtype: Of the parameters.
        op: The op of `ours`.
        ours: Our optimizer, called with parameters, lr and backend.
        states: Tensors of state beside each parameter.
        theirs: The optimizer of torch, called with parameters, lr and its options; None: torch has none.
        fused: Whether that has a fused kernel.
        yardstick: Whether our own Adam takes part, on the back end it chooses by itself.
        peers: Optimizers of other libraries.
    """
    on_gpu = options.device == "cuda"
    half = dtype.itemsize == 2
    bytes_of_ours, bytes_of_theirs = states * (4 if half else dtype.itemsize), states * dtype.itemsize
    # In 16 bits they keep 16-bit state: less to move, and less precise.
    note = f"its state is {dtype}, ours float32".replace("torch.", "") if half else ""
    found = []
    for backend in _backend.BACKENDS:
        interpreted = backend == "triton" and _backend.interpreting()
        if not interpreted and not _backend.unusable(op, backend, torch.device(options.device)):
            role: Role = "reference" if backend == "reference" else "ours"
            make = functools.partial(_made, ours, backend=backend)
            found.append(Implementation(f"fastcurv {backend}", role, make, bytes_of_ours))
    if yardstick:
        adam = Implementation(YARDSTICK, "yardstick", functools.partial(_made, fastcurv.Adam), 2 * dtype.itemsize)
        found.append(dataclasses.replace(adam, computes="Adam", truth=loop(torch.optim.Adam)))
    if theirs is not None:
        variants: dict[str, dict[str, Any]] = {"torch foreach": {"foreach": True}, "torch loop": {"foreach": False}}
        if fused:
            # On a GPU step counts are on the device in any case; capturable only allows it into a CUDA graph.
            capturable = {"capturable": on_gpu} if _takes(theirs, "capturable") else {}
            variants = {"torch fused": {"fused": True, **capturable}, **variants}
        for name, chosen in variants.items():
            make = functools.partial(_made, theirs, **chosen)
            found.append(Implementation(name, "torch", make, bytes_of_theirs, note=note))
        if options.compile and not fused:  # each case takes minutes
            make = functools.partial(_compiled, theirs)
            found.append(Implementation("torch compile", "torch", make, bytes_of_theirs, compiled=True, note=note))
    for peer in peers if options.peers else ():
        if importlib.util.find_spec(peer.module) is not None and not (on_gpu and peer.on_gpu is None):
            truth, computes = peer.truth, peer.computes
            found.append(
                Implementation(peer.name, "peer", peer.make, bytes_of_theirs, note=note, computes=computes, truth=truth)
            )
    return found


def loop(theirs: Any) -> Make:
    """The plainest form of an optimizer of torch, as a truth."""
    return functools.partial(_made, theirs, foreach=False)


def _made(optimizer: Any, params: list[Parameter], lr: float, **options: Any) -> Optimizer:
    return optimizer(params, lr=lr, **options)


def _compiled(theirs: Any, params: list[Parameter], lr: float) -> Optimizer:
    # A tensor, for a number would be a constant of the compiled code; on a GPU torch takes one only with capturable.
    rate = torch.tensor(lr, device=params[0].device)
    options = {"capturable": params[0].is_cuda} if _takes(theirs, "capturable") else {}
    return theirs(params, lr=rate, **options)


def _takes(optimizer: Any, keyword: str) -> bool:
    return keyword in inspect.signature(optimizer).parameters
