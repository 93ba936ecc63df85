"""Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019) and AMSGrad (Reddi et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
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
    r"""One step of Adam on every parameter; see `fastcurv.ops.adam_` for the arguments.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon),
        \quad \hat m_t = m_t / (1 - \beta_1^t), \quad \hat v_t = v_t / (1 - \beta_2^t)

    AMSGrad puts the running maximum of :math:`v` in the place of :math:`v`, before bias correction, as torch does.
    Weight decay is :math:`g_t \leftarrow g_t + \lambda \theta` or, decoupled, :math:`\theta \leftarrow
    (1 - \alpha \lambda) \theta` before the update. Half-precision parameters are updated in float32 and rounded once.
    `table` is for the compiled back ends. Reads `found_inf` and the steps on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, beta1, beta2, eps, weight_decay = (float(x) for x in (lr, beta1, beta2, eps, weight_decay))
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        step += 1
        t = step.item()
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
        theta, g, m, v = (x.to(compute) for x in (param, grad, exp_avg, exp_avg_sq))
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        if maximize:
            g = -g
        if decoupled_weight_decay:
            theta = theta * (1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i].to(compute), v)
            max_exp_avg_sqs[i].copy_(v)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        param.copy_(theta - lr * m_hat / (v_hat.sqrt() + eps))
