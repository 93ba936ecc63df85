"""Hyper-parameters, storage formats and IEEE arithmetic of the Triton kernels: csrc/numeric.h, schedule.h and rule.h.

Operations and their order are those of the C++ sources, so that the bits are the same.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def read_scalar(argument):
    """The double behind an argument made by `scalar`."""
    if argument.dtype.is_ptr():
        value = tl.load(argument).to(tl.float64)
    else:
        value = (argument.to(tl.int64) ^ _PATTERN).to(tl.float64, bitcast=True)
    return value


@triton.jit
def one_minus_power(beta, exponent, largest):
    """1 - beta^exponent in float64 by the operations of csrc/numeric.h; `largest` is that of the exponents."""
    result = exponent.to(tl.float64) * 0.0
    power = 1.0 - beta
    while largest > 0:
        result = tl.where((exponent & 1) == 1, result + power * (1.0 - result), result)
        power = power * (2.0 - power)
        exponent = exponent >> 1
        largest = largest >> 1
    return result


@triton.jit
def rectification(beta2, step):
    """RAdam's length of the average and factor of the step, by the operations of csrc/schedule.h."""
    longest = 2.0 / (1.0 - beta2) - 1.0
    correction = one_minus_power(beta2, step, step)
    length = longest - 2.0 * step.to(tl.float64) * (1.0 - correction) / correction
    # Where there is no factor, any values do that have a square root.
    defined = length > 4.0
    near = tl.where(defined, length, 5.0)
    far = tl.where(defined, longest, 6.0)
    ratio = (near - 4.0) * (near - 2.0) * far / ((far - 4.0) * (far - 2.0) * near)
    return length, tl.where(defined, tl.sqrt(ratio), 1.0)


@triton.jit
def grad_factor(grad_scale_ptr, MAXIMIZE: tl.constexpr):
    """What a gradient is multiplied by before all else."""
    factor = tl.full([], -1.0 if MAXIMIZE else 1.0, tl.float64)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr).to(tl.float64)
    return factor


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
def factored(factor, COMPUTE: tl.constexpr):
    """A factor, as one in the range of the arithmetic dtype and a power of two, by the operations of csrc/rule.h."""
    power = tl.where(factor == factor, 1.0, 1.0).to(tl.float64)
    if COMPUTE == tl.float32:
        power = tl.where(factor >= 2.0**128, 2.0**126, tl.where(factor < 2.0**-126, 2.0**-126, power))
    return (factor / power).to(COMPUTE), power.to(COMPUTE)


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
def load(pointer, offsets, mask, COMPUTE: tl.constexpr):
    """Values in the arithmetic dtype."""
    return widened(tl.load(pointer + offsets, mask=mask), COMPUTE)


@triton.jit
def store(pointer, offsets, value, mask):
    """Stores values, rounded to nearest even."""
    tl.store(pointer + offsets, rounded(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def stored(pointer, value, COMPUTE: tl.constexpr):
    """A value as it comes back from storage."""
    return widened(rounded(value, pointer.dtype.element_ty), COMPUTE)
