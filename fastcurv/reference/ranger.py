"""Ranger (Wright, 2019): RAdam, gradient centralisation (Yong et al., 2020), Lookahead (Zhang et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import gradient, mean, one_minus_power, rectification


@torch.no_grad()
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
    r"""One step of Ranger on every parameter; see `fastcurv.ops.ranger_` for the arguments.

    .. math::
        g_t &\leftarrow g_t - \mathrm{mean}_{1 \ldots n}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        d_t &= m_t / (\sqrt{v_t} + \epsilon), \quad s_t = r_t \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)
        \quad \text{where } \rho_t > \text{n\_sma\_threshold} \\
        d_t &= m_t, \quad s_t = 1 / (1 - \beta_1^t) \quad \text{elsewhere} \\
        \theta_t &= (1 - \alpha \lambda) \theta_{t-1} - \alpha s_t d_t

    and on every k-th step :math:`\phi \leftarrow \phi + a (\theta_t - \phi)`, :math:`\theta_t \leftarrow \phi`. With
    `scaled_weight_decay` the decay is :math:`\alpha s_t \lambda`. Half-precision parameters are updated in float32 and
    rounded once. `table` is for the compiled back ends. Reads `found_inf` and the steps on the host.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, beta1, beta2, eps, weight_decay, alpha, n_sma_threshold = (
        float(x) for x in (lr, beta1, beta2, eps, weight_decay, alpha, n_sma_threshold)
    )
    for param, grad, exp_avg, exp_avg_sq, slow, step in zip(
        params, grads, exp_avgs, exp_avg_sqs, slow_buffers, steps, strict=True
    ):
        step += 1
        t = step.item()
        g = gradient(grad, param, maximize, grad_scale)
        if use_gc and g.dim() > (3 if gc_conv_only else 1) and g.numel():
            g = g - mean(g.flatten(1), dim=1).reshape(-1, *[1] * (g.dim() - 1))
        theta, m, v = (x.to(g.dtype) for x in (param, exp_avg, exp_avg_sq))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        rho, factor = rectification(beta2, t)
        step_size, direction = lr / one_minus_power(beta1, t), m
        if rho > n_sma_threshold:
            step_size, direction = step_size * factor * one_minus_power(beta2, t) ** 0.5, m / (v.sqrt() + eps)
        decay = 1 - (step_size if scaled_weight_decay else lr) * weight_decay
        theta = decay * theta - step_size * direction
        if t % k == 0:
            theta = slow + alpha * (theta - slow)
            slow.copy_(theta)
        param.copy_(theta)
