"""The slow update of Lookahead in Triton: the formula of csrc/lookahead_rule.h, over a chunk table, in one launch.

Moves 16 bytes per float32 element, 3 flops. One program per chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, read_scalar, store
from ._update import Rule, launch


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    return (read_scalar(scalars[0]).to(COMPUTE),)


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    p = load(lists[0], offsets, mask, COMPUTE)
    slow = load(lists[1], offsets, mask, COMPUTE)
    slow = slow + c[0] * (p - slow)
    store(lists[1], offsets, slow, mask)
    store(lists[0], offsets, slow, mask)


_RULE = Rule("pt", _coefficients, _update)


def lookahead_(
    params: list[Tensor],
    slow_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    alpha: float | Tensor,
    found_inf: Tensor | None,
) -> None:
    """One launch over the whole list; see `fastcurv.ops.lookahead_` for the arguments. The table has the addresses."""
    assert table is not None
    launch(_RULE, [params, slow_buffers], table, (alpha,), found_inf=found_inf)
