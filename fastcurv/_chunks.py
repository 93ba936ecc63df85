"""The chunk table of a multi-tensor call: kept from call to call, rebuilt only when one of its tensors changed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcurv import _alloc, _backend, _check

# Tables that a CUDA graph has recorded. A replay reads them for as long as the graph lives, which nothing here can
# know, so they are never freed (a few kilobytes per capture).
_recorded: list[Tensor] = []


# How parameters are divided into rows, of which some ops need sums: not at all; each as a whole; or, from a number of
# dimensions on (0, 1, 2, ...), into their slices along dim 0, as if they were flattened from dim 1 on.
NO_ROWS, TENSOR_ROWS = -2, -1


class Table(NamedTuple):
    """A chunk table, as the implementations take it: csrc/table.h says what the words are."""

    words: Tensor
    chunks: int
    partials: int


class Workspace:
    """What an elementwise op remembers between two calls with the same lists.

    The native half compares type, dtype, device, shape, strides and address of every tensor with those of the last call
    at little cost; only a difference in anything but the addresses leads back to the checks in Python.

    Args:
        names: Argument names of the lists, in the order of the op's signature.
        mutated: Which of them are written.
        optional: Names of those that may be empty.
        occasional: Names of those that are written on some steps only.
    """

    def __init__(
        self,
        names: Sequence[str],
        mutated: Sequence[bool],
        optional: Sequence[str] = (),
        occasional: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self._optional = tuple(optional)
        native = _backend.native()
        self._native = native.ChunkTable(list(mutated)) if native else None
        self._occasional = tuple(name in occasional for name in names)
        self._always = tuple(written and not some for written, some in zip(mutated, self._occasional, strict=True))
        self._division = (0, NO_ROWS)
        self._table: Table | None = None
        self._spare: Tensor | None = None

    def current(self, lists: Sequence[list[Tensor]]) -> bool:
        """Whether the lists are those last prepared, but perhaps at other addresses."""
        if self._native is None:
            return False
        change = self._native.update(lists, self.names, False)
        if change:  # the table holds old addresses
            self._table = None
        return bool(change != 2)

    def gather(
        self, params: list[Tensor], states: list[dict[str, Tensor]], keys: tuple[str | None, ...]
    ) -> list[list[Tensor]] | None:
        """Gathers the lists of an optimizer, unless they are other than those last prepared.

        Args:
            params: The parameters.
            states: The state of each.
            keys: Where the lists after the gradients are found in a state; None for a list that is empty.

        Returns:
            The lists; None where a tensor is missing, or is another than before in more than its address.
        """
        if self._native is None:
            return None
        lists = self._native.gather(params, states, keys)
        return lists if lists and self.current(lists) else None

    def prepare(self, lists: Sequence[list[Tensor]], indices: Sequence[int] | None = None) -> Sequence[list[Tensor]]:
        """Checks the lists, unless they are current, and records them.

        Args:
            lists: One list for each name.
            indices: The numbers by which messages name the tensors, if not 0, 1, ...

        Returns:
            The lists, with gradients in their parameters' memory layout (copies where they were not).

        Raises:
            TypeError, ValueError: See `fastcurv._check.elementwise`; also when two written tensors overlap.
        """
        if self.current(lists):
            return lists
        named = dict(zip(self.names, lists, strict=True))
        checked = list(_check.elementwise(named, self._optional, indices).values())
        self._table = None
        if self._native is not None:
            self._native.update(checked, self.names, True)
        return checked

    def launch(
        self, op: str, lists: Sequence[list[Tensor]], backend: str | None, rows: int, arguments: dict[str, Any]
    ) -> None:
        """Runs an op on the lists last prepared.

        Args:
            op: Name of the op.
            lists: What `prepare` returned.
            backend: A back end by name, or None for the best.
            rows: How parameters are divided into rows: `NO_ROWS`, `TENSOR_ROWS`, or a number of dimensions.
            arguments: Keyword arguments of the op.
        """
        device = lists[0][0].device
        name, implementation = _backend.choose(op, device, backend)
        if name == "reference":
            implementation(*lists, None, **arguments)
        else:
            # Before the kernel, which fills the caches with weights: afterwards it takes four times as long.
            for written in itertools.compress(lists, self._always):
                torch.autograd.graph.increment_version(written)
            wrote = implementation(*lists, self.table(_backend.CHUNK_ELEMENTS[name], device, rows), **arguments)
            if wrote is not False:  # on a GPU nobody knows yet
                for written in itertools.compress(lists, self._occasional):
                    torch.autograd.graph.increment_version(written)

    def table(self, chunk_elements: int, device: torch.device, rows: int = NO_ROWS) -> Table | None:
        """The chunk table of the recorded lists in the memory of a device; None without the native extension.

        Args:
            chunk_elements: Elements of a chunk.
            device: Where the lists are.
            rows: See `launch`.
        """
        if self._native is None or (self._table is not None and self._division == (chunk_elements, rows)):
            return self._table
        words, written, chunks, partials = self._native.size(chunk_elements, rows)
        self._division = (chunk_elements, rows)
        if device.type != "cuda":
            memory = _alloc.empty(words, dtype=torch.int64, device="cpu")
            self._native.write(memory.data_ptr(), chunk_elements, rows)
            self._table = Table(memory if device.type == "cpu" else memory.to(device), chunks, partials)
            return self._table
        # Each table is written once and never reused: the copy of an earlier one may still be on its way. Pinned memory
        # must not be allocated while a graph is being captured, so a spare is kept from the warm-up step before it.
        capturing = torch.cuda.is_current_stream_capturing()
        staging, self._spare = self._spare, None
        if not capturing or staging is None or staging.numel() < written:
            staging = _alloc.empty(written, dtype=torch.int64, device="cpu", pin_memory=True)
        self._native.write(staging.data_ptr(), chunk_elements, rows)
        memory = _alloc.empty(words, dtype=torch.int64, device=device)
        memory[:written].copy_(staging[:written], non_blocking=True)
        self._table = Table(memory, chunks, partials)
        if capturing:
            _recorded.extend((staging, memory))
        else:
            self._spare = _alloc.empty(written, dtype=torch.int64, device="cpu", pin_memory=True)
        return self._table
