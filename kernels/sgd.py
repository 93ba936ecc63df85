"""Stochastic gradient descent in Triton: the formula of csrc/sgd_rule.h, over a chunk table, in one launch.

Moves 20 bytes per float32 element, 12 without momentum; 4 flops. One program per chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, read_scalar, store
from ._update import Rule, launch


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    return (
        grad_factor.to(COMPUTE),
        read_scalar(scalars[3]).to(COMPUTE),
        read_scalar(scalars[1]).to(COMPUTE),
        (1.0 - read_scalar(scalars[2])).to(COMPUTE),
        read_scalar(scalars[0]).to(COMPUTE),
    )


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """OPTIONS: with momentum, Nesterov, first step."""
    grad_factor, l2, momentum, one_minus_dampening, lr = c
    p = load(lists[0], offsets, mask, COMPUTE)
    g = load(lists[1], offsets, mask, COMPUTE) * grad_factor
    g = tl.where(l2 != 0, g + l2 * p, g)
    if OPTIONS[0]:
        if OPTIONS[2]:
            b = g
        else:
            b = momentum * load(lists[2], offsets, mask, COMPUTE) + one_minus_dampening * g
        store(lists[2], offsets, b, mask)
        g = g + momentum * b if OPTIONS[1] else b
    store(lists[0], offsets, p - lr * g, mask)


_PLAIN = Rule("pp-", _coefficients, _update)
_WITH_MOMENTUM = Rule("pps", _coefficients, _update)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    weight_decay: float | Tensor,
    nesterov: bool,
    is_first_step: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch over the whole list; see `fastcurv.ops.sgd_` for the arguments. The table holds the addresses."""
    assert table is not None
    launch(
        _WITH_MOMENTUM if momentum_buffers else _PLAIN,
        [params, grads, momentum_buffers],
        table,
        (lr, momentum, dampening, weight_decay),
        (bool(momentum_buffers), nesterov, is_first_step),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
