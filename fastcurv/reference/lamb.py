"""LAMB (You et al., 2020): Adam with a learning rate for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype, gradient, norm, one_minus_power, times


@torch.no_grad()
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
    r"""One step of LAMB on every parameter; see `fastcurv.ops.lamb_` for the arguments.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda \theta,
        \quad \hat m_t = m_t / (1 - \beta_1^t), \quad \hat v_t = v_t / (1 - \beta_2^t) \\
        \theta_t &= \theta_{t-1} - \alpha \frac{\|\theta\|}{\|u_t\|} u_t

    with the ratio 1 where either norm is zero. Half-precision parameters are updated in float32 and rounded once; the
    update is computed from the moments as they are stored. `table` is for the compiled back ends. Reads `found_inf`,
    the steps and the norms on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, beta1, beta2, eps, weight_decay = (float(x) for x in (lr, beta1, beta2, eps, weight_decay))
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        t = step.item()
        theta, g = param.to(compute_dtype(param)), gradient(grad, param, maximize, grad_scale)
        exp_avg.copy_(beta1 * exp_avg.to(g.dtype) + (1 - beta1) * g)
        exp_avg_sq.copy_(beta2 * exp_avg_sq.to(g.dtype) + (1 - beta2) * g * g)
        m_hat, v_hat = (
            exp_avg.to(g.dtype) / one_minus_power(beta1, t),
            exp_avg_sq.to(g.dtype) / one_minus_power(beta2, t),
        )
        update = m_hat / (v_hat.sqrt() + eps) + weight_decay * theta
        size, update_size = norm(theta).item(), norm(update).item()
        ratio = size / update_size if adaptive and size != 0 and update_size != 0 else 1.0
        param.copy_(theta - times(lr * ratio, update))
