"""The chunk table (csrc/table.h) in Triton: records, typed pointers, and the advance of steps."""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(8)
RECORD = tl.constexpr(4)
ROW_WORDS = tl.constexpr(5)
LANES = tl.constexpr(32)
SEGMENT = tl.constexpr(2048)
GROUP = tl.constexpr(8)
_TICKET = tl.constexpr(4)
_TILE = tl.constexpr(8192)
_TILE_ROWS = tl.constexpr(512)


@triton.jit
def record_at(table_ptr, tensor, LISTS: tl.constexpr):
    """Where the record of a tensor begins; behind the last one begin the chunks."""
    return table_ptr + HEADER + tensor * (RECORD + LISTS)


@triton.jit
def rows_per_chunk(inner):
    """Whole rows of a chunk of a tensor with local rows, which fit into 32 bits."""
    most = tl.minimum(tl.full([], _TILE, tl.int32) // inner.to(tl.int32), _TILE_ROWS)
    return tl.where(most < 1, 1, tl.where(most < 8, most, most // 8 * 8))


@triton.jit
def misalignment(record_ptr, first, TYPES: tl.constexpr):
    """Zero where element `first` lies at a multiple of 16 bytes in every list that holds elements."""
    addresses = first * 0
    for i in tl.static_range(len(TYPES)):
        if TYPES[i] is not None:
            addresses |= tl.load(record_ptr + RECORD + i) + first * (TYPES[i].primitive_bitwidth // 8)
    return addresses % 16


@triton.jit
def pointers(record_ptr, first, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Typed pointers to element `first` of every list; to the table itself for lists without elements.

    The hint of alignment stands on the pointers because one on a loop-carried offset would be lost.
    """
    lists = ()
    for i in tl.static_range(len(TYPES)):
        if TYPES[i] is None:
            lists = lists + (record_ptr,)
        else:
            address = tl.load(record_ptr + RECORD + i) + first * (TYPES[i].primitive_bitwidth // 8)
            pointer = address.to(tl.pointer_type(TYPES[i]))
            if ALIGNED:
                pointer = tl.multiple_of(pointer, 16)
            lists = lists + (pointer,)
    return lists


@triton.jit
def step_of(record_ptr, LISTS: tl.constexpr):
    """The number of the step that is being taken, where the last list counts them."""
    step_ptr = tl.load(record_ptr + RECORD + LISTS - 1).to(tl.pointer_type(tl.float32))
    return tl.load(step_ptr).to(tl.int64) + 1


@triton.jit
def advance_step(record_ptr, mask, scalars, LISTS: tl.constexpr):
    """Adds one to the steps of a block of tensors."""
    step_ptr = tl.load(record_ptr + RECORD + LISTS - 1, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    tl.store(step_ptr, tl.load(step_ptr, mask=mask, other=0.0) + 1.0, mask=mask)


@triton.jit
def advance_all(table_ptr, scalars, ADVANCE: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr):
    """Advances every tensor, once all programs have read what is changed: the last one to arrive does it."""
    # Every warp of this program must have read its step before the ticket is drawn.
    tl.debug_barrier()
    ticket = tl.atomic_add(table_ptr + _TICKET, 1)
    if ticket == tl.num_programs(0) - 1:
        tensors = tl.load(table_ptr)
        start = tensors * 0
        while start < tensors:
            index = start + tl.arange(0, BLOCK)
            ADVANCE(record_at(table_ptr, index, LISTS), index < tensors, scalars, LISTS)
            start += BLOCK
        tl.store(table_ptr + _TICKET, tensors * 0)


@triton.jit
def rows_of(record_ptr):
    """Rows, elements that follow each other in one, and elements of one; (0, 0, 0) where there are none."""
    count = tl.load(record_ptr + 1)
    return count, tl.load(record_ptr + 2), tl.load(record_ptr) // tl.maximum(count, 1) * tl.minimum(count, 1)


@triton.jit
def scratch_of(table_ptr, record_ptr):
    """Where the scratch of a tensor begins: the words of its segments, then of its rows."""
    return (table_ptr + tl.load(record_ptr + 3)).to(tl.pointer_type(tl.float64))


@triton.jit
def chunk_at(table_ptr, index, LISTS: tl.constexpr):
    """Record of a chunk's tensor, and the chunk's number in it; partials follow the chunks."""
    word = tl.load(record_at(table_ptr, tl.load(table_ptr), LISTS) + index)
    return record_at(table_ptr, word >> 32, LISTS), word & 0xFFFFFFFF


@triton.jit
def partial_at(table_ptr, index, LISTS: tl.constexpr):
    """Record of a partial's tensor, and the number of the group of segments in it."""
    return chunk_at(table_ptr, tl.load(table_ptr + 1) + index, LISTS)
