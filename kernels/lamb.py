"""LAMB in Triton: the formula of csrc/lamb_rule.h, over a chunk table.

Moves 28 bytes per float32 element, or 40 where a tensor does not stay in the cache; 24 flops. The moments are written
when the norms are taken, and read back for the update. Hyper-parameters are run-time arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import divide, factored, load, one_minus_power, read_scalar, square_root, store, stored
from ._table import advance_step, step_of
from ._update import Rule, launch

_LISTS = tl.constexpr(5)


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    step = step_of(record_ptr, _LISTS)
    beta1 = read_scalar(scalars[1])
    beta2 = read_scalar(scalars[2])
    root2 = tl.sqrt(one_minus_power(beta2, step, step))
    return (
        grad_factor.to(COMPUTE),
        read_scalar(scalars[4]).to(COMPUTE),
        beta1.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        (root2 / one_minus_power(beta1, step, step)).to(COMPUTE),
        (read_scalar(scalars[3]) * root2).to(COMPUTE),
        read_scalar(scalars[0]),
    )


@triton.jit
def _direction(p, m, v, c):
    u = c[6] * divide(m, square_root(v) + c[7])
    return tl.where(c[1] != 0, u + c[1] * p, u)


@triton.jit
def _moments(lists, offsets, mask, c, COMPUTE: tl.constexpr):
    """Updates the moments, and returns them as they are stored."""
    g = load(lists[1], offsets, mask, COMPUTE) * c[0]
    m = c[2] * load(lists[2], offsets, mask, COMPUTE) + c[3] * g
    v = c[4] * load(lists[3], offsets, mask, COMPUTE) + c[5] * (g * g)
    store(lists[2], offsets, m, mask)
    store(lists[3], offsets, v, mask)
    return stored(lists[2], m, COMPUTE), stored(lists[3], v, COMPUTE)


@triton.jit
def _first(lists, offsets, mask, c, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    m, v = _moments(lists, offsets, mask, c, COMPUTE)
    p = load(lists[0], offsets, mask, COMPUTE)
    u = _direction(p, m, v, c).to(tl.float64)
    p = p.to(tl.float64)
    return p * p, u * u


@triton.jit
def _row(c, sums, length, record_ptr, row, mask, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    norm = tl.sqrt(sums[0])
    update_norm = tl.sqrt(sums[1])
    none = (norm == 0.0) | (update_norm == 0.0)
    return factored(tl.where(none, c[8], c[8] * (norm / tl.where(none, 1.0, update_norm))), COMPUTE)


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    p = load(lists[0], offsets, mask, COMPUTE)
    m = load(lists[2], offsets, mask, COMPUTE)
    v = load(lists[3], offsets, mask, COMPUTE)
    store(lists[0], offsets, p - row[1] * (row[0] * _direction(p, m, v, c)), mask)


@triton.jit
def _update_alone(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    m, v = _moments(lists, offsets, mask, c, COMPUTE)
    p = load(lists[0], offsets, mask, COMPUTE)
    store(lists[0], offsets, p - c[8].to(COMPUTE) * _direction(p, m, v, c), mask)


_PLAIN = Rule("ppss-", _coefficients, _update_alone, advance_step)
# Every tensor is a row: whatever stands in no_row goes nowhere.
_ADAPTIVE = Rule("ppss-", _coefficients, _update, advance_step, _first, 2, _row, (0.0, 1.0))


def lamb_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    adaptive: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of the whole list; see `fastcurv.ops.lamb_` for the arguments. The table holds addresses and rows."""
    assert table is not None
    launch(
        _ADAPTIVE if adaptive else _PLAIN,
        [params, grads, exp_avgs, exp_avg_sqs, steps],
        table,
        (lr, beta1, beta2, eps, weight_decay),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
