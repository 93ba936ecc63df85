"""Ranger in Triton: the formula of csrc/ranger_rule.h, over a chunk table.

Moves 28 bytes per float32 element, and 8 more on every k-th step, 15 flops. A gradient is read twice where its rows are
centralised, the second time from the cache where rows are short enough. Hyper-parameters, `k` among them, are run-time
arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import divide, load, one_minus_power, read_scalar, rectification, square_root, store
from ._table import advance_step, step_of
from ._update import Rule, launch

_LISTS = tl.constexpr(6)


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """OPTIONS: scaled weight decay."""
    step = step_of(record_ptr, _LISTS)
    lr = read_scalar(scalars[0])
    beta1 = read_scalar(scalars[1])
    beta2 = read_scalar(scalars[2])
    length, factor = rectification(beta2, step)
    is_rectified = length > read_scalar(scalars[6])
    rectified = tl.where(is_rectified, factor * tl.sqrt(one_minus_power(beta2, step, step)), 1.0)
    step_size = lr * rectified / one_minus_power(beta1, step, step)
    rate = step_size if OPTIONS[0] else lr
    return (
        grad_factor.to(COMPUTE),
        (1.0 - rate * read_scalar(scalars[4])).to(COMPUTE),
        beta1.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        step_size.to(COMPUTE),
        read_scalar(scalars[3]).to(COMPUTE),
        read_scalar(scalars[5]).to(COMPUTE),
        is_rectified,
        step % read_scalar(scalars[7]).to(tl.int64) == 0,
    )


@triton.jit
def _first(lists, offsets, mask, c, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    return ((load(lists[1], offsets, mask, COMPUTE) * c[0]).to(tl.float64),)


@triton.jit
def _row(c, sums, length, record_ptr, row, mask, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    return ((sums[0] / length.to(tl.float64)).to(COMPUTE),)


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    (
        grad_factor,
        decay,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        eps,
        alpha,
        rectified,
        synchronises,
    ) = c
    p = load(lists[0], offsets, mask, COMPUTE)
    g = load(lists[1], offsets, mask, COMPUTE) * grad_factor - row[0]
    m = beta1 * load(lists[2], offsets, mask, COMPUTE) + one_minus_beta1 * g
    v = beta2 * load(lists[3], offsets, mask, COMPUTE) + one_minus_beta2 * (g * g)
    store(lists[3], offsets, v, mask)
    store(lists[2], offsets, m, mask)
    denominator = tl.where(rectified, square_root(v) + eps, 1.0)
    p = decay * p - step_size * divide(m, denominator)
    if synchronises:
        slow = load(lists[4], offsets, mask, COMPUTE)
        p = slow + alpha * (p - slow)
        store(lists[4], offsets, p, mask)
    store(lists[0], offsets, p, mask)


# Left to itself, ptxas of Triton 3.6 takes 198: too few warps would fit to keep the memory busy.
_PLAIN = Rule("ppsst-", _coefficients, _update, advance_step, no_row=(0.0,), registers=168)
_CENTRALISED = _PLAIN._replace(first=_first, sums=1, row=_row)


def ranger_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    slow_buffers: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    alpha: float | Tensor,
    n_sma_threshold: float | Tensor,
    k: int,
    use_gc: bool,
    gc_conv_only: bool,
    scaled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of the whole list; see `fastcurv.ops.ranger_` for the arguments. The table holds addresses and rows."""
    assert table is not None
    launch(
        _CENTRALISED if use_gc else _PLAIN,
        [params, grads, exp_avgs, exp_avg_sqs, slow_buffers, steps],
        table,
        (lr, beta1, beta2, eps, weight_decay, alpha, n_sma_threshold, k),
        (scaled_weight_decay,),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
