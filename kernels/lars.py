"""LARS in Triton: the formula of csrc/lars_rule.h, over a chunk table.

Moves 20 bytes per float32 element, or 28 where a tensor does not stay in the cache; 11 flops. Hyper-parameters are
run-time arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import factored, load, read_scalar, store
from ._update import Rule, launch


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    weight_decay = read_scalar(scalars[2])
    return (
        grad_factor.to(COMPUTE),
        weight_decay.to(COMPUTE),
        read_scalar(scalars[1]).to(COMPUTE),
        read_scalar(scalars[0]).to(COMPUTE),
        weight_decay,
        read_scalar(scalars[3]),
        read_scalar(scalars[4]),
    )


@triton.jit
def _first(lists, offsets, mask, c, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    p = load(lists[0], offsets, mask, COMPUTE).to(tl.float64)
    g = (load(lists[1], offsets, mask, COMPUTE) * c[0]).to(tl.float64)
    return p * p, g * g


@triton.jit
def _row(c, sums, length, record_ptr, row, mask, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    norm = tl.sqrt(sums[0])
    grad_norm = tl.sqrt(sums[1])
    none = (norm == 0.0) | (grad_norm == 0.0)
    denominator = tl.where(none, 1.0, grad_norm + c[4] * norm + c[6])
    return factored(tl.where(none, 1.0, c[5] * norm / denominator), COMPUTE)


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """OPTIONS: Nesterov."""
    grad_factor, l2, momentum, lr, _, _, _ = c
    p = load(lists[0], offsets, mask, COMPUTE)
    g = load(lists[1], offsets, mask, COMPUTE) * grad_factor
    g = row[1] * (row[0] * tl.where(l2 != 0, g + l2 * p, g))
    b = momentum * load(lists[2], offsets, mask, COMPUTE) + g
    store(lists[2], offsets, b, mask)
    store(lists[0], offsets, p - lr * (g + momentum * b if OPTIONS[0] else b), mask)


_PLAIN = Rule("pps", _coefficients, _update, no_row=(1.0, 1.0))
_ADAPTIVE = _PLAIN._replace(first=_first, sums=2, row=_row)


def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    eps: float | Tensor,
    nesterov: bool,
    adaptive: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of the whole list; see `fastcurv.ops.lars_` for the arguments. The table holds addresses and rows."""
    assert table is not None
    launch(
        _ADAPTIVE if adaptive else _PLAIN,
        [params, grads, momentum_buffers],
        table,
        (lr, momentum, weight_decay, trust_coefficient, eps),
        (nesterov,),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
