"""Cases that measure `opt.step()` of optimizers over a list of parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fastcurv import _backend, _check
from fastcurv._chunks import NO_ROWS
from fastcurv.optim._base import MultiTensorOptimizer

from .clocks import Call
from .harness import WARM_UPS, Case, Contender, Options, Prepared, Role
from .models import Shape, numel

LR = 1e-3
# Large, so that an error cannot hide behind a small step, and with a new gradient at each; more than two periods of a
# Lookahead, and steps of RAdam before and after it rectifies.
VERIFY_LR, VERIFY_STEPS = 0.1, 13
SMALL_TENSORS, SMALL_VECTOR, SMALL_DIMENSION = 300, 1027, 9
# Elements that the stream ceiling reads of one list before it turns to the next; the best counts.
STREAM_BLOCKS = (64, 256, 1024)
COPY_BYTES = 1 << 30
TILE = 1 << 20

Make = Callable[[list[Parameter], float], Optimizer]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An optimizer that takes part in a case.

    Attributes:
        name: As printed.
        role: See `Contender`.
        make: The optimizer for a list of parameters and a learning rate.
        state_bytes: Bytes of state per element.
        compiled: Whether its step goes through torch.compile.
        note: See `Contender`.
        computes: See `Contender`.
        truth: What it is verified against in the place of the case's truth, where it computes something else.
    """

    name: str
    role: Role
    make: Make
    state_bytes: int
    compiled: bool = False
    note: str = ""
    computes: str = ""
    truth: Make | None = None


@dataclasses.dataclass(frozen=True)
class Buffers:
    """What the step of an optimizer reads and writes, for the ceiling, and the call of its bare kernel.

    Attributes:
        read: Lists that are only read.
        written: Lists that are read and written.
        kernel: The bare kernel over them.
    """

    read: list[list[Tensor]]
    written: list[list[Tensor]]
    kernel: Call


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase(Case):
    """`opt.step()` with fixed gradients.

    Attributes:
        shapes: The parameter list.
        implementations: Who takes part, given the options and the dtype of the parameters.
        truth: An optimizer independent of fastcurv, exact in float64, that all must agree with.
        bytes_per_element: What a step has to move for each element, on average.
        dtype: Of parameters and gradients.
        has_ceiling: Whether a bandwidth says something about the case.
    """

    shapes: Callable[[], list[Shape]]
    implementations: Callable[[Options, torch.dtype], list[Implementation]]
    truth: Make
    bytes_per_element: float
    dtype: torch.dtype = torch.float32
    has_ceiling: bool = True

    def size(self, options: Options) -> dict[str, int]:
        """See `Case.size`."""
        shapes = self._shapes(options)
        elements = numel(shapes)
        return {"tensors": len(shapes), "elements": elements, "bytes": round(elements * self.bytes_per_element)}

    def contenders(self, options: Options) -> list[Contender]:
        """See `Case.contenders`."""
        elements = self.size(options)["elements"]
        return [
            Contender(
                name=implementation.name,
                role=implementation.role,
                verify=functools.partial(self.verify, implementation, options.device),
                prepare=functools.partial(self.prepare, implementation, options),
                bytes=elements * (2 * self.dtype.itemsize + implementation.state_bytes),
                note=implementation.note,
                computes=implementation.computes,
            )
            for implementation in self.implementations(options, self.dtype)
        ]

    def _shapes(self, options: Options) -> list[Shape]:
        return small(self.shapes()) if options.quick else self.shapes()

    def verify(self, implementation: Implementation, device: str) -> str:
        """Compares an implementation with the truth in float64 on a small version of the list.

        Its error must be at most twice that of the truth in the same precision, plus four roundings; in 16 bits the
        measure is the truth in float32 with parameters that are rounded after every step.

        Args:
            implementation: What is verified.
            device: Where.

        Returns:
            What is wrong, or an empty string.
        """
        start, gradients, exact, allowed = _oracle(self, implementation.truth or self.truth, device)
        found = _trajectory(implementation.make, start, gradients, self.dtype, self.dtype, implementation.compiled)
        error = _distance(found, exact)
        return "" if error <= allowed else f"off by {error:.2g} after {VERIFY_STEPS} steps, {allowed:.2g} allowed"

    def prepare(self, implementation: Implementation, options: Options) -> Prepared:
        """Gives an implementation parameters and gradients of its own and takes the first steps, which create state.

        Args:
            implementation: What is prepared.
            options: Device, and whether the work is shrunk.
        """
        shapes = self._shapes(options)
        params = [Parameter(x) for x in _tiled(shapes, self.dtype, options.device, seed=0)]
        for param, grad in zip(params, _tiled(shapes, self.dtype, options.device, seed=1), strict=True):
            param.grad = grad
        optimizer = implementation.make(params, LR)
        step = _step(optimizer, implementation.compiled)
        for _ in range(WARM_UPS):
            step()
        if implementation.role != "ours" or not isinstance(optimizer, MultiTensorOptimizer):
            return Prepared(step)
        used = buffers(optimizer)
        return Prepared(step, used.kernel, _ceilings(used, options.device) if self.has_ceiling else ())


def small(shapes: Sequence[Shape]) -> list[Shape]:
    """A list of the same kinds of shapes with few elements."""
    return [
        tuple(min(n, SMALL_VECTOR if len(shape) == 1 else SMALL_DIMENSION) for n in shape)
        for shape in shapes[:SMALL_TENSORS]
    ]


@functools.lru_cache(maxsize=4)
def _oracle(case: StepCase, truth: Make, device: str) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], float]:
    """Start, gradients, the exact end in float64, and how far from it an implementation may be."""
    shapes = small(case.shapes())
    start = _random(shapes, case.dtype, device, seed=0)
    gradients = [_random(shapes, case.dtype, device, seed=1 + k) for k in range(VERIFY_STEPS)]
    exact = _trajectory(truth, start, gradients, torch.float64, torch.float64)
    wide = torch.float32 if case.dtype.itemsize == 2 else case.dtype
    own = _trajectory(truth, start, gradients, wide, case.dtype)
    scale = max((float(x.abs().max()) for x in exact if x.numel()), default=0.0)
    return start, gradients, exact, 2 * _distance(own, exact) + 4 * torch.finfo(case.dtype).eps * scale


def _random(shapes: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def _tiled(shapes: Sequence[Shape], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Tensors filled with copies of one block of random numbers, which takes seconds less than as many new ones."""
    (block,) = _random([(TILE,)], dtype, device, seed)
    tensors = []
    for shape in shapes:
        flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        whole = flat.numel() // TILE
        flat[: whole * TILE].view(whole, TILE).copy_(block)
        flat[whole * TILE :].copy_(block[: flat.numel() - whole * TILE])
        tensors.append(flat.view(shape))
    return tensors


def _step(optimizer: Optimizer, compiled: bool) -> Call:
    if not compiled:
        return optimizer.step
    torch.compiler.reset()  # or what it compiled for other lists would count against its limit of recompilations
    return torch.compile(optimizer.step)


def _trajectory(
    make: Make,
    start: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    dtype: torch.dtype,
    storage: torch.dtype,
    compiled: bool = False,
) -> list[Tensor]:
    """Parameters after steps with given gradients, computed in one dtype and rounded to another after each."""
    params = [Parameter(x.to(dtype, copy=True)) for x in start]
    step = _step(make(params, VERIFY_LR), compiled)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(dtype, copy=True)
        step()
        if storage != dtype:
            for param in params:
                param.data.copy_(param.data.to(storage))
    return [param.detach() for param in params]


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference; NaN, and so never small enough, if one is."""
    worst = torch.zeros((), dtype=torch.float64)
    for a, b in zip(found, exact, strict=True):
        if a.numel():
            worst = torch.maximum(worst, (a.double() - b).abs().max().cpu())
    return float(worst)


def _ceilings(buffers: Buffers, device: str) -> list[tuple[str, Call, int]]:
    if device == "cuda":
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return [("device-to-device copy", lambda: target.copy_(source), 2 * COPY_BYTES)]
    native = _backend.native()
    if native is None:
        return []
    lists = [*buffers.read, *buffers.written]
    written = [False] * len(buffers.read) + [True] * len(buffers.written)
    chunks = native.ChunkTable(written)
    chunks.update(lists, [f"lists[{k}]" for k in range(len(lists))], True)
    # One chunk to a tensor: this table is split among threads by elements.
    whole = max(x.numel() for x in lists[0]) + 1
    words = torch.empty(chunks.size(whole, NO_ROWS)[0], dtype=torch.int64)
    chunks.write(words.data_ptr(), whole, NO_ROWS)
    sizes = [tensors[0].element_size() for tensors in lists]
    moved = sum(
        math.prod(x.shape) * x.element_size() * (2 if is_written else 1)
        for tensors, is_written in zip(lists, written, strict=True)
        for x in tensors
    )
    return [
        (f"stream by {block} elements", functools.partial(native.stream_, words, sizes, written, block), moved)
        for block in STREAM_BLOCKS
    ]


def buffers(optimizer: MultiTensorOptimizer) -> Buffers:
    """What the step of an optimizer reads and writes for each element, and the bare call of its implementation.

    Args:
        optimizer: With one group of parameters of one dtype, after a step.
    """
    (group,) = optimizer.param_groups
    op = optimizer._op
    with torch.no_grad():
        (call,) = (call for call in optimizer._prepare(group) if call.func == op.launch)
    space, lists, _, arguments = call.args
    device = lists[0][0].device
    name, implementation = _backend.choose(op.name, device, optimizer.backend)
    chunk = _backend.CHUNK_ELEMENTS.get(name)
    table = space.table(chunk, device, op.rows(arguments)) if chunk else None
    # The stream ceiling has the mix of the lists that every step touches.
    streamed = [
        (tensors, is_written)
        for list_name, tensors, is_written in zip(op.lists, lists, op.mutated, strict=True)
        if tensors and list_name not in op.occasional and _check.kind(list_name) in ("param", "grad", "state", "exact")
    ]
    return Buffers(
        read=[tensors for tensors, is_written in streamed if not is_written],
        written=[tensors for tensors, is_written in streamed if is_written],
        kernel=functools.partial(implementation, *lists, table, **arguments),
    )
