"""The Adam family in Triton: the formulas of csrc/adam_rule.h, over a chunk table, in one launch.

p <- d p - c m / (sqrt(u) + e). Moves 28 bytes per float32 element (36 with AMSGrad), 13 flops. One program per chunk;
hyper-parameters are run-time arguments, never constexpr.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    divide,
    load,
    maximum,
    one_minus_power,
    read_scalar,
    rectification,
    square_root,
    store,
)
from ._table import RECORD, advance_step, step_of
from ._update import Rule, launch

_LISTS = tl.constexpr(7)
_MU_PRODUCT = tl.constexpr(5)


@triton.jit
def _momentum(scalars, step, largest):
    """NAdam's momentum at steps."""
    return read_scalar(scalars[1]) * (0.5 + 0.5 * one_minus_power(read_scalar(scalars[5]), step, largest))


@triton.jit
def _coefficients(record_ptr, scalars, grad_factor, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    """OPTIONS: rule, decoupled weight decay."""
    RULE: tl.constexpr = OPTIONS[0]
    step = step_of(record_ptr, _LISTS)
    lr = read_scalar(scalars[0])
    beta1 = read_scalar(scalars[1])
    beta2 = read_scalar(scalars[2])
    weight_decay = read_scalar(scalars[4])
    correction1 = one_minus_power(beta1, step, step)
    root2 = tl.sqrt(one_minus_power(beta2, step, step))
    l2 = weight_decay
    decay = lr * 0.0 + 1.0
    if OPTIONS[1]:
        l2 = weight_decay * 0.0
        decay = 1.0 - lr * weight_decay
    step_size = lr * root2 / correction1
    grad_step_size = lr * 0.0
    epsilon = read_scalar(scalars[3]) * root2
    is_rectified = step > 0
    if RULE == "radam":
        length, factor = rectification(beta2, step)
        is_rectified = length > 5.0
        step_size = tl.where(is_rectified, lr * root2 * factor / correction1, lr / correction1)
        epsilon = read_scalar(scalars[3])
    if RULE == "nadam":
        momentum = _momentum(scalars, step, step)
        following = _momentum(scalars, step + 1, step + 1)
        mu_product_ptr = tl.load(record_ptr + RECORD + _MU_PRODUCT).to(tl.pointer_type(tl.float32))
        product = (tl.load(mu_product_ptr) * momentum.to(tl.float32)).to(tl.float64)
        step_size = lr * root2 * following / (1.0 - product * following)
        grad_step_size = lr * root2 * (1.0 - momentum) / (1.0 - product)
    return (
        grad_factor.to(COMPUTE),
        l2.to(COMPUTE),
        decay.to(COMPUTE),
        beta1.to(COMPUTE),
        (1.0 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1.0 - beta2).to(COMPUTE),
        step_size.to(COMPUTE),
        epsilon.to(COMPUTE),
        grad_step_size.to(COMPUTE),
        is_rectified,
    )


@triton.jit
def _update(lists, offsets, mask, c, row, OPTIONS: tl.constexpr, COMPUTE: tl.constexpr):
    RULE: tl.constexpr = OPTIONS[0]
    (
        grad_factor,
        l2,
        decay,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        eps,
        grad_step_size,
        rectified,
    ) = c
    p = load(lists[0], offsets, mask, COMPUTE)
    g = load(lists[1], offsets, mask, COMPUTE)
    m = load(lists[2], offsets, mask, COMPUTE)
    v = load(lists[3], offsets, mask, COMPUTE)
    g = g * grad_factor
    g = tl.where(l2 != 0, g + l2 * p, g)
    m = beta1 * m + one_minus_beta1 * g
    square = g * g
    if RULE == "yogi":
        v = v - one_minus_beta2 * tl.where(v > square, square, tl.where(v < square, -square, square * 0.0))
    else:
        v = beta2 * v + one_minus_beta2 * square
    u = v
    if RULE == "amsgrad":
        u = maximum(load(lists[4], offsets, mask, COMPUTE), v)
        store(lists[4], offsets, u, mask)
    denominator = square_root(u) + eps
    if RULE == "radam":
        denominator = tl.where(rectified, denominator, 1.0)
    if RULE == "nadam":
        p = decay * p - divide(step_size * m + grad_step_size * g, denominator)
    else:
        p = decay * p - step_size * divide(m, denominator)
    store(lists[0], offsets, p, mask)
    store(lists[2], offsets, m, mask)
    store(lists[3], offsets, v, mask)


@triton.jit
def _advance_nadam(record_ptr, mask, scalars, LISTS: tl.constexpr):
    step_ptr = tl.load(record_ptr + RECORD + LISTS - 1, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0).to(tl.int64) + 1
    momentum = _momentum(scalars, step, tl.max(step, axis=0)).to(tl.float32)
    product_ptr = tl.load(record_ptr + RECORD + _MU_PRODUCT, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    tl.store(product_ptr, tl.load(product_ptr, mask=mask, other=0.0) * momentum, mask=mask)
    advance_step(record_ptr, mask, scalars, LISTS)


_RULES = {
    "adam": Rule("ppss---", _coefficients, _update, advance_step),
    "amsgrad": Rule("ppsss--", _coefficients, _update, advance_step),
    "radam": Rule("ppss---", _coefficients, _update, advance_step),
    "nadam": Rule("ppss---", _coefficients, _update, _advance_nadam),
    "yogi": Rule("ppss---", _coefficients, _update, advance_step),
}


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    mu_products: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    mu_decay: float | Tensor,
    rule: str,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch over the whole list; see `fastcurv.ops.adam_` for the arguments. The table holds the addresses."""
    assert table is not None
    launch(
        _RULES[rule],
        [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, mu_products, steps],
        table,
        (lr, beta1, beta2, eps, weight_decay, mu_decay),
        (rule, decoupled_weight_decay),
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
