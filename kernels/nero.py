"""Nero in Triton: the formula of csrc/nero_rule.h, over a chunk table.

Moves 12 bytes per float32 element, or 20 where a row does not stay in the cache; 22 flops. Hyper-parameters are
run-time arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, one_minus_power, read_scalar, store
from ._table import RECORD, advance_step, step_of
from ._update import Rule, launch

_LISTS = tl.constexpr(5)
_ROW_EXP_AVG_SQ = tl.constexpr(2)
_SCALE = tl.constexpr(3)
_ALIKE = tl.constexpr(2.0**-46)


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    step = step_of(record_ptr, _LISTS)
    beta = read_scalar(scalars[1])
    return grad_factor.to(COMPUTE), read_scalar(scalars[0]), beta, one_minus_power(beta, step, step)


@triton.jit
def _first(lists, offsets, mask, c, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    w = load(lists[0], offsets, mask, COMPUTE).to(tl.float64)
    g = (load(lists[1], offsets, mask, COMPUTE) * c[0]).to(tl.float64)
    return w, g, w * w, w * g, g * g


@triton.jit
def _row(c, sums, length, record_ptr, row, mask, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """OPTIONS: constraints."""
    _, lr, beta, correction = c
    average_ptr = tl.load(record_ptr + RECORD + _ROW_EXP_AVG_SQ).to(tl.pointer_type(COMPUTE)) + row
    average = tl.load(average_ptr, mask=mask).to(tl.float64)
    s = beta * average + (1.0 - beta) * sums[4]
    # Several threads may hold the same row: all of them must have read it.
    tl.debug_barrier()
    tl.store(average_ptr, s.to(COMPUTE), mask=mask)
    scale = tl.load(tl.load(record_ptr + RECORD + _SCALE).to(tl.pointer_type(COMPUTE))).to(tl.float64)
    norm = tl.sqrt(s / correction)
    rate = tl.where(norm == 0.0, 0.0, lr * scale / tl.where(norm == 0.0, 1.0, norm))
    mean = sums[0] * 0.0
    inverse_norm = mean + 1.0
    if OPTIONS[0]:
        n = length.to(tl.float64)
        mean_after = (sums[0] - rate * sums[1]) / n
        # The squares of the gradients of a row that stays may be beyond double.
        square = tl.where(rate == 0.0, sums[2], sums[2] - rate * (2.0 * sums[3] - rate * sums[4]))
        centred = square - n * mean_after * mean_after
        alike = centred <= square * _ALIKE
        inverse = tl.where(alike, 0.0, 1.0 / tl.sqrt(tl.where(alike, 1.0, centred)))
        mean = tl.where(length == 1, 0.0, mean_after)
        inverse_norm = tl.where(length == 1, 1.0, inverse)
    return rate, mean, inverse_norm


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    w = load(lists[0], offsets, mask, COMPUTE).to(tl.float64)
    g = (load(lists[1], offsets, mask, COMPUTE) * c[0]).to(tl.float64)
    store(lists[0], offsets, ((w - row[0] * g - row[1]) * row[2]).to(COMPUTE), mask)


# Every tensor has rows: whatever stands in no_row goes nowhere.
_RULE = Rule("pp---", _coefficients, _update, advance_step, _first, 5, _row, (0.0, 0.0, 1.0), row_in_double=True)


def nero_(
    params: list[Tensor],
    grads: list[Tensor],
    row_exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta: float | Tensor,
    constraints: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of the whole list; see `fastcurv.ops.nero_` for the arguments. The table holds addresses and rows."""
    assert table is not None
    launch(
        _RULE,
        [params, grads, row_exp_avg_sqs, scales, steps],
        table,
        (lr, beta),
        (constraints,),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
