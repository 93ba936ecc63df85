"""Adam, AdamW and AMSGrad in Triton: the formula of csrc/adam_rule.h, over a chunk table, in one launch.

p <- d p - c m / (sqrt(u) + e). Moves 28 bytes per float32 element (36 with AMSGrad), 13 flops. One program per chunk;
hyper-parameters are run-time arguments, never constexpr.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    BLOCK,
    advance_steps,
    chunks,
    divide,
    maximum,
    one_minus_power,
    read_scalar,
    rounded,
    scalar,
    square_root,
    widened,
)

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    offsets,
    mask,
    grad_factor,
    l2,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    AMSGRAD: tl.constexpr,
):
    p = widened(tl.load(param_ptr + offsets, mask=mask), COMPUTE)
    g = widened(tl.load(grad_ptr + offsets, mask=mask), COMPUTE)
    m = widened(tl.load(exp_avg_ptr + offsets, mask=mask), COMPUTE)
    v = widened(tl.load(exp_avg_sq_ptr + offsets, mask=mask), COMPUTE)
    g = g * grad_factor
    g = tl.where(l2 != 0, g + l2 * p, g)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    u = v
    if AMSGRAD:
        u = maximum(widened(tl.load(max_exp_avg_sq_ptr + offsets, mask=mask), COMPUTE), v)
        tl.store(max_exp_avg_sq_ptr + offsets, rounded(u, STATE), mask=mask)
    p = decay * p - step_size * divide(m, square_root(u) + eps)
    tl.store(param_ptr + offsets, rounded(p, PARAM), mask=mask)
    tl.store(exp_avg_ptr + offsets, rounded(m, STATE), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, rounded(v, STATE), mask=mask)


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def _adam_kernel(
    table_ptr,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    grad_scale_ptr,
    found_inf_ptr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LISTS: tl.constexpr = 6
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    program = tl.program_id(0)
    if program < tl.load(table_ptr + 1):
        tensors = tl.load(table_ptr)
        chunk_elements = tl.load(table_ptr + 3)
        word = tl.load(table_ptr + 8 + tensors * (1 + LISTS) + program)
        record_ptr = table_ptr + 8 + (word >> 32) * (1 + LISTS)
        first = (word & 0xFFFFFFFF) * chunk_elements
        end = tl.minimum(first + chunk_elements, tl.load(record_ptr))
        param_address = tl.load(record_ptr + 1)
        grad_address = tl.load(record_ptr + 2)
        exp_avg_address = tl.load(record_ptr + 3)
        exp_avg_sq_address = tl.load(record_ptr + 4)
        max_exp_avg_sq_address = tl.load(record_ptr + 5)
        step_ptr = tl.load(record_ptr + 6).to(tl.pointer_type(tl.float32))

        t = (tl.load(step_ptr) + 1.0).to(tl.int64)
        lr_value = read_scalar(lr)
        beta1_value = read_scalar(beta1)
        beta2_value = read_scalar(beta2)
        decay_value = read_scalar(weight_decay)
        correction1 = one_minus_power(beta1_value, t)
        root2 = tl.sqrt(one_minus_power(beta2_value, t))
        grad_value = beta1_value * 0.0 + 1.0
        if MAXIMIZE:
            grad_value = -grad_value
        if grad_scale_ptr is not None:
            grad_value = grad_value / tl.load(grad_scale_ptr).to(tl.float64)
        l2 = decay_value
        decay = lr_value * 0.0 + 1.0
        if DECOUPLED:
            l2 = decay_value * 0.0
            decay = 1.0 - lr_value * decay_value

        grad_factor = grad_value.to(COMPUTE)
        l2 = l2.to(COMPUTE)
        decay = decay.to(COMPUTE)
        one_minus_beta1 = (1.0 - beta1_value).to(COMPUTE)
        one_minus_beta2 = (1.0 - beta2_value).to(COMPUTE)
        step_size = (lr_value * root2 / correction1).to(COMPUTE)
        epsilon = (read_scalar(eps) * root2).to(COMPUTE)
        b1 = beta1_value.to(COMPUTE)
        b2 = beta2_value.to(COMPUTE)

        param_address += first * (PARAM.primitive_bitwidth // 8)
        grad_address += first * (PARAM.primitive_bitwidth // 8)
        exp_avg_address += first * (STATE.primitive_bitwidth // 8)
        exp_avg_sq_address += first * (STATE.primitive_bitwidth // 8)
        max_exp_avg_sq_address += first * (STATE.primitive_bitwidth // 8)
        # Whole blocks of aligned tensors go without a mask, in 16-byte accesses; the rest is masked. The hints stand on
        # the addresses because one on a loop-carried offset would be lost. (Triton 3.6 interprets no range here.)
        addresses = param_address | grad_address | exp_avg_address | exp_avg_sq_address
        count = end - first
        blocks = count // BLOCK
        if (addresses | max_exp_avg_sq_address) % 16 != 0:
            blocks = count * 0
        i = count * 0
        while i < blocks:
            _update(
                tl.multiple_of(param_address.to(tl.pointer_type(PARAM)), 16),
                tl.multiple_of(grad_address.to(tl.pointer_type(PARAM)), 16),
                tl.multiple_of(exp_avg_address.to(tl.pointer_type(STATE)), 16),
                tl.multiple_of(exp_avg_sq_address.to(tl.pointer_type(STATE)), 16),
                tl.multiple_of(max_exp_avg_sq_address.to(tl.pointer_type(STATE)), 16),
                i * BLOCK + tl.arange(0, BLOCK),
                None,
                grad_factor,
                l2,
                decay,
                b1,
                one_minus_beta1,
                b2,
                one_minus_beta2,
                step_size,
                epsilon,
                PARAM,
                STATE,
                COMPUTE,
                AMSGRAD,
            )
            i += 1
        while i * BLOCK < count:
            offsets = i * BLOCK + tl.arange(0, BLOCK)
            _update(
                param_address.to(tl.pointer_type(PARAM)),
                grad_address.to(tl.pointer_type(PARAM)),
                exp_avg_address.to(tl.pointer_type(STATE)),
                exp_avg_sq_address.to(tl.pointer_type(STATE)),
                max_exp_avg_sq_address.to(tl.pointer_type(STATE)),
                offsets,
                offsets < count,
                grad_factor,
                l2,
                decay,
                b1,
                one_minus_beta1,
                b2,
                one_minus_beta2,
                step_size,
                epsilon,
                PARAM,
                STATE,
                COMPUTE,
                AMSGRAD,
            )
            i += 1
    advance_steps(table_ptr, LISTS, 5, BLOCK)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    table: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch over the whole list; see `fastcurv.ops.adam_` for the arguments. The table holds the addresses."""
    assert table is not None
    device = params[0].device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        _adam_kernel[(max(1, chunks(table, len(params), 6)),)](
            table,
            scalar(lr),
            scalar(beta1),
            scalar(beta2),
            scalar(eps),
            scalar(weight_decay),
            grad_scale,
            found_inf,
            PARAM=_TYPES[params[0].dtype],
            STATE=_TYPES[exp_avgs[0].dtype],
            COMPUTE=tl.float64 if params[0].dtype == torch.float64 else tl.float32,
            DECOUPLED=decoupled_weight_decay,
            AMSGRAD=amsgrad,
            MAXIMIZE=maximize,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
