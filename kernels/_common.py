"""What the Triton kernels over chunk tables share. The table's layout is described in csrc/table.h."""

from __future__ import annotations

import os
import struct

import triton
import triton.language as tl
from torch import Tensor

_HEADER = tl.constexpr(8)
_TICKET = tl.constexpr(4)

# The interpreter pays per program and per operation, a GPU per register.
BLOCK = 8192 if os.environ.get("TRITON_INTERPRET", "0") == "1" else 1024

# Triton makes a float argument fp32, and gives an integer below 2^31 another type and so another compiled kernel.
# Doubles therefore travel as their bits, exclusive-or a pattern that no finite double brings near zero.
_PATTERN = tl.constexpr(0x7FFF5555AAAA5555)


def scalar(value: float | Tensor) -> int | Tensor:
    """A hyper-parameter as an argument of a kernel, which decodes it with `read_scalar`."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return value
        value = value.item()
    return int(struct.unpack("<q", struct.pack("<d", float(value)))[0] ^ _PATTERN.value)


def chunks(table: Tensor, tensors: int, lists: int) -> int:
    """Number of chunks of a table, from its length (it may be in device memory)."""
    header: int = _HEADER.value
    return table.numel() - header - tensors * (1 + lists)


@triton.jit
def read_scalar(argument):
    """The double behind an argument made by `scalar`."""
    if argument.dtype.is_ptr():
        value = tl.load(argument).to(tl.float64)
    else:
        value = (argument.to(tl.int64) ^ _PATTERN).to(tl.float64, bitcast=True)
    return value


@triton.jit
def one_minus_power(beta, exponent):
    """1 - beta^exponent in float64 by the operations of csrc/numeric.h, so that the bits are the same."""
    result = beta * 0.0
    power = 1.0 - beta
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result + power * (1.0 - result), result)
        power = power * (2.0 - power)
        exponent = exponent >> 1
    return result


@triton.jit
def maximum(a, b):
    """The larger one, or NaN if either is."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def square_root(x):
    """IEEE square root."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def divide(a, b):
    """IEEE quotient."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def widened(x, COMPUTE: tl.constexpr):
    """Exact value of a loaded x in the arithmetic dtype.

    bfloat16 is widened by its bits: the interpreter's cast flushes subnormals.
    """
    if x.dtype == tl.bfloat16:
        value = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(COMPUTE)
    return value


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """X in a storage dtype, rounded to nearest even.

    bfloat16 is rounded by its bits: the interpreter's cast truncates, and one code for both is one that was tested.
    """
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        value = tl.where(x != x, quiet, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = x.to(DTYPE)
    return value


@triton.jit
def advance_steps(table_ptr, LISTS: tl.constexpr, STEP_LIST: tl.constexpr, BLOCK: tl.constexpr):
    """Adds one to every tensor's step, once all programs have read theirs: the last one to arrive does it."""
    # Every warp of this program must have read its step before the ticket is drawn.
    tl.debug_barrier()
    ticket = tl.atomic_add(table_ptr + _TICKET, 1)
    if ticket == tl.num_programs(0) - 1:
        tensors = tl.load(table_ptr)
        start = tensors * 0
        while start < tensors:
            index = start + tl.arange(0, BLOCK)
            mask = index < tensors
            address = tl.load(table_ptr + _HEADER + index * (1 + LISTS) + 1 + STEP_LIST, mask=mask, other=0)
            step_ptr = address.to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, tl.load(step_ptr, mask=mask, other=0.0) + 1.0, mask=mask)
            start += BLOCK
        tl.store(table_ptr + _TICKET, tensors * 0)
