"""The kernel and the launches of every multi-tensor op: its rule over a chunk table, as csrc/cpu/loops.h has it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import grad_factor, scalar
from ._rows import finish_kernel, kept_row, partials_kernel, sum_row, sum_segments
from ._table import SEGMENT, advance_all, chunk_at, misalignment, pointers, rows_of, rows_per_chunk

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# The interpreter pays per program and per operation, a GPU per register. ROWS: of a tile of rows of at most _SHORT
# elements, so that each of 128 threads has 16 bytes of every list.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
BLOCK = 8192 if _INTERPRETING else 1024
ROWS = 128 if _INTERPRETING else 32
_SHORT = tl.constexpr(256)


class Rule(NamedTuple):
    """What an op tells the kernels; all functions are Triton's.

    Args:
        lists: How each list is stored: p as the parameters, s as the state, t in the type of the arithmetic, - not
            element by element.
        coefficients: (record_ptr, scalars, grad_factor, OPTIONS, COMPUTE) to all that is the same for a tensor.
        update: (lists, offsets, mask, c, row, OPTIONS, COMPUTE) updates elements, given what is known of their row.
        advance: (record_ptr, mask, scalars, LISTS) advances what is kept of a block of tensors.
        first: (lists, offsets, mask, c, OPTIONS, COMPUTE) to what elements add to each sum over their row.
        sums: Number of sums.
        row: (c, sums, length, record_ptr, row, mask, OPTIONS, COMPUTE) to what is known of a row, or of some.
        no_row: The same for tensors without rows. A rule whose `first` writes must not be run on such.
        row_in_double: Whether what is known of a row is in float64 and not in the type of the arithmetic.
        registers: The most registers of a thread where parameters of 16 bits have no rows; None leaves it to ptxas.
    """

    lists: str
    coefficients: Any
    update: Any
    advance: Any = None
    first: Any = None
    sums: int = 0
    row: Any = None
    no_row: tuple[float, ...] = ()
    row_in_double: bool = False
    registers: int | None = None


@triton.jit
def _columns(values):
    columns = ()
    for i in tl.static_range(len(values)):
        columns = columns + (values[i][:, None],)
    return columns


@triton.jit
def _update_tiles(
    record_ptr,
    first,
    first_row,
    rows,
    length,
    c,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates contiguous rows of one segment each, ROWS at a time."""
    lists = pointers(record_ptr, first, TYPES, ALIGNED)
    if ALIGNED:
        length = length // 8 * 8
    start = rows * 0
    while start < rows:
        row = start + tl.arange(0, ROWS)
        begin = tl.where(row < rows, 0, length)
        if ALIGNED:  # Triton 3.9 forgets it through `where`, and would load single elements
            begin = tl.multiple_of(begin, 8)
        sums = sum_segments(lists, row, begin, length, (), c, FIRST, SUMS, OPTIONS, COMPUTE, ROWS, STEPS)
        values = _columns(ROW(c, sums, length, record_ptr, first_row + row, row < rows, OPTIONS, COMPUTE))
        tl.debug_barrier()  # what FIRST wrote may be read by other threads
        i = length * 0
        while i * (32 * STEPS) < length:
            element = begin[:, None] + (i * (32 * STEPS) + tl.arange(0, 32 * STEPS))[None, :]
            UPDATE(lists, row[:, None] * length + element, element < length, c, values, OPTIONS, COMPUTE)
            i += 1
        start += ROWS


@triton.jit
def _update_rows(
    aligned,
    record_ptr,
    first,
    first_row,
    rows,
    length,
    c,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    if aligned:
        _update_tiles(record_ptr, first, first_row, rows, length, c, UPDATE, FIRST, SUMS, ROW, TYPES, OPTIONS, COMPUTE,
                      ROWS, STEPS, True)  # fmt: skip
    else:
        _update_tiles(record_ptr, first, first_row, rows, length, c, UPDATE, FIRST, SUMS, ROW, TYPES, OPTIONS, COMPUTE,
                      ROWS, STEPS, False)  # fmt: skip


@triton.jit
def _update_run(
    record_ptr,
    first,
    count,
    c,
    row,
    UPDATE: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates elements of one row: whole aligned blocks without a mask, in 16-byte accesses; the rest masked."""
    blocks = count // BLOCK
    if misalignment(record_ptr, first, TYPES) != 0:
        blocks = count * 0
    aligned = pointers(record_ptr, first, TYPES, True)
    lists = pointers(record_ptr, first, TYPES, False)
    i = count * 0
    while i < blocks:
        UPDATE(aligned, i * BLOCK + tl.arange(0, BLOCK), None, c, row, OPTIONS, COMPUTE)
        i += 1
    while i * BLOCK < count:
        offsets = i * BLOCK + tl.arange(0, BLOCK)
        UPDATE(lists, offsets, offsets < count, c, row, OPTIONS, COMPUTE)
        i += 1


@triton.jit
def _update_chunk_of_rows(
    table_ptr,
    record_ptr,
    number,
    c,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    NO_ROW: tl.constexpr,
    ROW_TYPE: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    count, inner, length = rows_of(record_ptr)
    if (count > 0) & (tl.load(record_ptr + 3) == 0):
        # Whole rows, whose sums are taken here.
        per_chunk = rows_per_chunk(inner)
        first_row = number * per_chunk
        first = first_row * length
        rows = tl.minimum(count - first_row, per_chunk).to(tl.int32)
        short = length.to(tl.int32)
        aligned = (length % 8 == 0) & (misalignment(record_ptr, first, TYPES) == 0)
        if length > SEGMENT:
            row = rows * 0
            while row < rows:
                begin = first + row * length
                if aligned:
                    lists = pointers(record_ptr, begin, TYPES, True)
                    sums = sum_row(lists, 0, short // 8 * 8, c, FIRST, SUMS, OPTIONS, COMPUTE, ROWS // 4, 4)
                else:
                    lists = pointers(record_ptr, begin, TYPES, False)
                    sums = sum_row(lists, 0, short, c, FIRST, SUMS, OPTIONS, COMPUTE, ROWS // 4, 4)
                values = ROW(c, sums, length, record_ptr, first_row + row, True, OPTIONS, COMPUTE)
                tl.debug_barrier()
                _update_run(record_ptr, begin, short, c, values, UPDATE, TYPES, OPTIONS, COMPUTE, BLOCK)
                row += 1
        elif length > _SHORT:
            _update_rows(aligned, record_ptr, first, first_row, rows, short, c, UPDATE, FIRST, SUMS, ROW, TYPES,
                         OPTIONS, COMPUTE, ROWS // 4, 4)  # fmt: skip
        else:
            _update_rows(aligned, record_ptr, first, first_row, rows, short, c, UPDATE, FIRST, SUMS, ROW, TYPES,
                         OPTIONS, COMPUTE, ROWS, 1)  # fmt: skip
    else:
        # Any elements: their rows, if they have any, are known.
        chunk = tl.load(table_ptr + 3)
        first = number * chunk
        end = tl.minimum(first + chunk, tl.load(record_ptr))
        inner = tl.maximum(inner, 1)
        runs = first // inner
        if (count == 0) | (runs == (end - 1) // inner):
            values = kept_row(table_ptr, record_ptr, runs % tl.maximum(count, 1), count > 0, NO_ROW, ROW_TYPE)
            _update_run(record_ptr, first, end - first, c, values, UPDATE, TYPES, OPTIONS, COMPUTE, BLOCK)
        else:
            lists = pointers(record_ptr, first, TYPES, False)
            start = (end - first).to(tl.int32) * 0
            while start < end - first:
                offsets = start + tl.arange(0, BLOCK)
                mask = offsets < end - first
                values = kept_row(table_ptr, record_ptr, (first + offsets) // inner % count, mask, NO_ROW, ROW_TYPE)
                UPDATE(lists, offsets, mask, c, values, OPTIONS, COMPUTE)
                start += BLOCK


@triton.jit(do_not_specialize=["scalars"])
def update_kernel(
    table_ptr,
    scalars,
    grad_scale_ptr,
    found_inf_ptr,
    COEFFICIENTS: tl.constexpr,
    UPDATE: tl.constexpr,
    ADVANCE: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    NO_ROW: tl.constexpr,
    ROW_TYPE: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Updates the elements of a chunk: one program each."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    if tl.program_id(0) < tl.load(table_ptr + 1):
        record_ptr, number = chunk_at(table_ptr, tl.program_id(0), len(TYPES))
        c = COEFFICIENTS(record_ptr, scalars, grad_factor(grad_scale_ptr, MAXIMIZE), OPTIONS, COMPUTE)
        if FIRST is not None:
            _update_chunk_of_rows(
                table_ptr,
                record_ptr,
                number,
                c,
                UPDATE,
                FIRST,
                SUMS,
                ROW,
                NO_ROW,
                ROW_TYPE,
                TYPES,
                OPTIONS,
                COMPUTE,
                BLOCK,
                ROWS,
            )
        else:
            chunk = tl.load(table_ptr + 3)
            count = tl.minimum(chunk, tl.load(record_ptr) - number * chunk)
            _update_run(record_ptr, number * chunk, count, c, NO_ROW, UPDATE, TYPES, OPTIONS, COMPUTE, BLOCK)
    if ADVANCE is not None:
        advance_all(table_ptr, scalars, ADVANCE, len(TYPES), BLOCK)


def launches(
    rule: Rule,
    lists: Sequence[list[Tensor]],
    table: tuple[Tensor, int, int],
    scalars: Sequence[float | Tensor],
    options: tuple[bool, ...] = (),
    *,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, grid, positional and keyword arguments of every launch of an op.

    Args:
        rule: The rule of the op.
        lists: Its lists.
        table: The table of the lists, number of chunks, and of partials.
        scalars: The hyper-parameters as the rule numbers them.
        options: The options as the rule numbers them; they are compiled in.
        maximize: Whether to ascend.
        grad_scale: As in `fastcurv.ops`.
        found_inf: As in `fastcurv.ops`.
    """
    words, chunks, partials = table
    param = _TYPES[lists[0][0].dtype]
    compute = tl.float64 if param == tl.float64 else tl.float32
    states = [x[0].dtype for x, kind in zip(lists, rule.lists, strict=True) if kind == "s" and x]
    types = {"p": param, "t": compute, "s": _TYPES[states[0]] if states else None, "-": None}
    arguments = (words, tuple(scalar(x) for x in scalars), grad_scale, found_inf)
    common = {
        "COEFFICIENTS": rule.coefficients,
        "SUMS": rule.sums,
        "TYPES": tuple(types[kind] for kind in rule.lists),
        "OPTIONS": options,
        "MAXIMIZE": maximize,
        "COMPUTE": compute,
        "num_warps": 4,
        "enable_fp_fusion": False,
        # Left to itself ptxas spills a few bytes of the larger kernels to fit one more block into a multiprocessor.
        "maxnreg": 255 if rule.first else rule.registers if param.primitive_bitwidth == 16 else None,
    }
    before = [(partials_kernel, {"FIRST": rule.first}), (finish_kernel, {"ROW": rule.row})] if partials else []
    update = {
        "UPDATE": rule.update,
        "ADVANCE": rule.advance,
        "FIRST": rule.first,
        "ROW": rule.row,
        "NO_ROW": rule.no_row,
        "ROW_TYPE": tl.float64 if rule.row_in_double else compute,
        "BLOCK": BLOCK,
        "ROWS": ROWS if _INTERPRETING or any(t and t.primitive_bitwidth == 16 for t in types.values()) else ROWS // 2,
    }
    return [
        *((kernel, partials, arguments, {**common, **own}) for kernel, own in before),
        (update_kernel, max(1, chunks), arguments, {**common, **update}),
    ]


def launch(rule: Rule, lists: Sequence[list[Tensor]], *arguments: Any, **keywords: Any) -> None:
    """Runs an op; arguments as of `launches`."""
    device = lists[0][0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for kernel, grid, positional, keyword in launches(rule, lists, *arguments, **keywords):
            kernel[(grid,)](*positional, **keyword)
