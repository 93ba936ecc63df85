"""Adam (Kingma and Ba, 2015), AdamW (Loshchilov and Hutter, 2019), AMSGrad, RAdam, NAdam and Yogi."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype, gradient, one_minus_power, rectification


@torch.no_grad()
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
    r"""One step of the Adam family on every parameter; see `fastcurv.ops.adam_` for the arguments.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \alpha \hat m_t / (\sqrt{\hat v_t} + \epsilon),
        \quad \hat m_t = m_t / (1 - \beta_1^t), \quad \hat v_t = v_t / (1 - \beta_2^t)

    Weight decay is :math:`g_t \leftarrow g_t + \lambda \theta` or, decoupled, :math:`\theta \leftarrow
    (1 - \alpha \lambda) \theta` before the update. The rules differ from `adam` in:

    * `amsgrad`: the running maximum of :math:`v` in the place of :math:`v`, before bias correction, as in torch;
    * `yogi`: :math:`v_t = v_{t-1} - (1 - \beta_2) \, \mathrm{sign}(v_{t-1} - g_t^2) \, g_t^2`;
    * `radam`: :math:`\theta_t = \theta_{t-1} - \alpha \hat m_t r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon)`
      where :math:`\rho_t > 5`, else :math:`\theta_{t-1} - \alpha \hat m_t`;
    * `nadam`: :math:`\mu_t = \beta_1 (1 - \tfrac12 q^t)`, and in the place of :math:`\hat m_t` stands
      :math:`\frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i} g_t + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1} \mu_i} m_t`.

    Half-precision parameters are updated in float32 and rounded once. `table` is for the compiled back ends. Reads
    `found_inf` and the steps on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, beta1, beta2, eps, weight_decay, mu_decay = (float(x) for x in (lr, beta1, beta2, eps, weight_decay, mu_decay))
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        step += 1
        t = step.item()
        g = gradient(grad, param, maximize, grad_scale)
        theta, m, v = (x.to(compute_dtype(param)) for x in (param, exp_avg, exp_avg_sq))
        if decoupled_weight_decay:
            theta = theta * (1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + weight_decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * torch.sign(v - g * g) * g * g if rule == "yogi" else beta2 * v + (1 - beta2) * g * g
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if rule == "amsgrad":
            v = torch.maximum(max_exp_avg_sqs[i].to(v.dtype), v)
            max_exp_avg_sqs[i].copy_(v)
        correction1, correction2 = one_minus_power(beta1, t), one_minus_power(beta2, t)
        denominator: Tensor | float = (v / correction2).sqrt() + eps
        m_hat = m / correction1
        if rule == "radam":
            rho, factor = rectification(beta2, t)
            denominator = (v.sqrt() + eps) / (factor * correction2**0.5) if rho > 5 else 1.0
        elif rule == "nadam":
            mu, mu_next = (beta1 * (1 - 0.5 * mu_decay**s) for s in (t, t + 1))
            mu_products[i].mul_(mu)
            product = mu_products[i].item()
            m_hat = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
        param.copy_(theta - lr * m_hat / denominator)
