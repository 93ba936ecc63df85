"""Sums over rows in Triton, in the order that csrc/table.h fixes.

Taken by tiles of ROWS rows, or segments of rows, times STEPS times 32 elements, so that a thread can load 16 bytes;
then lane by lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import grad_factor
from ._table import GROUP, LANES, ROW_WORDS, SEGMENT, misalignment, partial_at, pointers, rows_of, scratch_of


@triton.jit
def _zeros(ROWS: tl.constexpr, COUNT: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.zeros([ROWS, LANES], tl.float64),)
    return blocks


@triton.jit
def _add_steps(lanes, terms, mask, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Adds the [ROWS, STEPS * 32] elements of each term to the [ROWS, 32] lanes, one step after the other."""
    sums = ()
    for i in tl.static_range(len(lanes)):
        term = tl.where(mask, terms[i], 0.0)
        if STEPS == 1:
            lane = lanes[i] + term
        else:
            tl.static_assert(STEPS == 4)
            even, odd = tl.split(tl.permute(tl.reshape(term, [ROWS, 2, 2, 32]), [0, 3, 1, 2]))
            step0, step2 = tl.split(even)
            step1, step3 = tl.split(odd)
            lane = lanes[i] + step0 + step1 + step2 + step3
        sums = sums + (lane,)
    return sums


@triton.jit
def _add_halves(lanes, ROWS: tl.constexpr):
    """[ROWS, 32] lanes to [ROWS] sums: lane j and lane j + 16, then j and j + 8, and so on.

    Each tl.sum adds two numbers, whose order cannot matter.
    """
    sums = ()
    for i in tl.static_range(len(lanes)):
        x = tl.sum(tl.reshape(lanes[i], [ROWS, 2, 16]), axis=1)
        x = tl.sum(tl.reshape(x, [ROWS, 2, 8]), axis=1)
        x = tl.sum(tl.reshape(x, [ROWS, 2, 4]), axis=1)
        x = tl.sum(tl.reshape(x, [ROWS, 2, 2]), axis=1)
        sums = sums + (tl.sum(x, axis=1),)
    return sums


@triton.jit
def sum_segments(
    lists,
    row,
    begin,
    length,
    layout,
    c,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The sums over [ROWS] segments: from element `begin` of row `row` on, which may lie behind the row's end.

    Args:
        lists: Pointers to the beginning of row 0.
        row: Numbers of the rows.
        begin: Where the segments begin in them.
        length: Elements of a row: known to be a multiple of 8 where accesses shall be by 16 bytes.
        layout: (rows, inner), or () where rows are contiguous.
        c: Coefficients.
        FIRST: What an element adds to each sum.
        SUMS: Number of sums.
        OPTIONS: Those of the rule.
        COMPUTE: Type of the arithmetic.
        ROWS: Rows of a tile.
        STEPS: Columns of a tile, over 32.
    """
    lanes = _zeros(ROWS, SUMS)
    # Counted in tiles: that a number is a multiple of 8 is forgotten where it is carried around a loop.
    i = length * 0
    while (i * (LANES * STEPS) < SEGMENT) & (i * (LANES * STEPS) < length):
        element = begin[:, None] + (i * (LANES * STEPS) + tl.arange(0, LANES * STEPS))[None, :]
        mask = element < length
        if len(layout) == 0:
            offsets = row[:, None] * length + element
        else:
            offsets = (element // layout[1] * layout[0] + row[:, None]) * layout[1] + element % layout[1]
        terms = FIRST(lists, offsets, mask, c, OPTIONS, COMPUTE)
        lanes = _add_steps(lanes, terms, mask, ROWS, STEPS)
        i += 1
    return _add_halves(lanes, ROWS)


@triton.jit
def sum_row(
    lists,
    row,
    length,
    c,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The sums over one contiguous row of at most 32 segments, as scalars; arguments as above."""
    lanes = _zeros(1, SUMS)
    tile = length * 0
    while tile * (ROWS * SEGMENT) < length:
        begin = tile * (ROWS * SEGMENT) + tl.arange(0, ROWS) * SEGMENT
        sums = sum_segments(lists, row + begin * 0, begin, length, (), c, FIRST, SUMS, OPTIONS, COMPUTE, ROWS, STEPS)
        # Segment s to lane s: nothing but zeros is added to what a lane holds.
        own = (begin // SEGMENT)[:, None] == tl.arange(0, LANES)[None, :]
        added = ()
        for i in tl.static_range(SUMS):
            added = added + (lanes[i] + tl.sum(tl.where(own, sums[i][:, None], 0.0), axis=0)[None, :],)
        lanes = added
        tile += 1
    scalars = ()
    for total in tl.static_range(SUMS):
        scalars = scalars + (tl.sum(_add_halves(lanes, 1)[total], axis=0),)
    return scalars


@triton.jit(do_not_specialize=["scalars"])
def partials_kernel(
    table_ptr,
    scalars,
    grad_scale_ptr,
    found_inf_ptr,
    COEFFICIENTS: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums over the eight segments of a partial, into scratch: one program each."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    record_ptr, group = partial_at(table_ptr, tl.program_id(0), len(TYPES))
    count, inner, length = rows_of(record_ptr)
    c = COEFFICIENTS(record_ptr, scalars, grad_factor(grad_scale_ptr, MAXIMIZE), OPTIONS, COMPUTE)
    per_row = (length + SEGMENT - 1) // SEGMENT
    segment = group * GROUP + tl.arange(0, GROUP)
    row = segment // per_row
    begin = segment % per_row * SEGMENT
    aligned = (inner == length) & (length % 8 == 0) & (misalignment(record_ptr, inner * 0, TYPES) == 0)
    if aligned:
        lists = pointers(record_ptr, inner * 0, TYPES, True)
        whole = length // 8 * 8
        # Triton 3.9 forgets it through `where`, and would load single elements.
        begin = tl.multiple_of(tl.where(row < count, begin, whole), 8)
        sums = sum_segments(lists, row, begin, whole, (), c, FIRST, SUMS, OPTIONS, COMPUTE, GROUP, 4)
    else:
        lists = pointers(record_ptr, inner * 0, TYPES, False)
        begin = tl.where(row < count, begin, length)
        sums = sum_segments(lists, row, begin, length, (count, inner), c, FIRST, SUMS, OPTIONS, COMPUTE, GROUP, 4)
    scratch_ptr = scratch_of(table_ptr, record_ptr) + segment * ROW_WORDS
    for i in tl.static_range(SUMS):
        tl.store(scratch_ptr + i, sums[i], mask=row < count)


@triton.jit(do_not_specialize=["scalars"])
def finish_kernel(
    table_ptr,
    scalars,
    grad_scale_ptr,
    found_inf_ptr,
    COEFFICIENTS: tl.constexpr,
    ROW: tl.constexpr,
    SUMS: tl.constexpr,
    TYPES: tl.constexpr,
    OPTIONS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What is to be known of the rows whose first segment is in a partial, into scratch: one program each."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    record_ptr, group = partial_at(table_ptr, tl.program_id(0), len(TYPES))
    count, _, length = rows_of(record_ptr)
    per_row = (length + SEGMENT - 1) // SEGMENT
    first = (group * GROUP + per_row - 1) // per_row
    end = tl.minimum(((group + 1) * GROUP + per_row - 1) // per_row, count)
    if first < end:
        c = COEFFICIENTS(record_ptr, scalars, grad_factor(grad_scale_ptr, MAXIMIZE), OPTIONS, COMPUTE)
        row = first + tl.arange(0, GROUP)
        scratch_ptr = scratch_of(table_ptr, record_ptr)
        lanes = _zeros(GROUP, SUMS)
        start = per_row * 0
        while start < per_row:
            segment = start + tl.arange(0, LANES)
            words_ptr = scratch_ptr + (row[:, None] * per_row + segment[None, :]) * ROW_WORDS
            mask = (row < end)[:, None] & (segment < per_row)[None, :]
            added = ()
            for i in tl.static_range(SUMS):
                added = added + (lanes[i] + tl.load(words_ptr + i, mask=mask, other=0.0),)
            lanes = added
            start += LANES
        sums = _add_halves(lanes, GROUP)
        values = ROW(c, sums, length, record_ptr, row, row < end, OPTIONS, COMPUTE)
        row_ptr = scratch_ptr + (count * per_row + row) * ROW_WORDS
        for value in tl.static_range(len(values)):
            tl.store(row_ptr + value, values[value].to(tl.float64), mask=row < end)


@triton.jit
def kept_row(table_ptr, record_ptr, row, mask, NO_ROW: tl.constexpr, ROW_TYPE: tl.constexpr):
    """What `finish_kernel` kept of rows, or NO_ROW outside the mask."""
    count, _, length = rows_of(record_ptr)
    per_row = (length + SEGMENT - 1) // SEGMENT
    row_ptr = scratch_of(table_ptr, record_ptr) + (count * per_row + row) * ROW_WORDS
    values = ()
    for i in tl.static_range(len(NO_ROW)):
        values = values + (tl.load(row_ptr + i, mask=mask, other=NO_ROW[i]).to(ROW_TYPE),)
    return values
