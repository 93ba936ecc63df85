"""Stochastic gradient descent with momentum (Sutskever et al., 2013), as torch.optim.SGD has it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype, gradient


@torch.no_grad()
def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    weight_decay: float | Tensor,
    nesterov: bool,
    is_first_step: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    r"""One step of SGD on every parameter; see `fastcurv.ops.sgd_` for the arguments.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \quad b_1 = g_1 \\
        \theta_t &= \theta_{t-1} - \alpha b_t

    with :math:`g_t + \mu b_t` in the place of :math:`b_t` for Nesterov, :math:`g_t` without momentum, and weight decay
    :math:`g_t \leftarrow g_t + \lambda \theta`. Half-precision parameters are updated in float32 and rounded once.
    `table` is for the compiled back ends. Reads `found_inf` on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, momentum, dampening, weight_decay = (float(x) for x in (lr, momentum, dampening, weight_decay))
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        theta, g = param.to(compute_dtype(param)), gradient(grad, param, maximize, grad_scale)
        if weight_decay != 0:
            g = g + weight_decay * theta
        if momentum_buffers:
            b = g if is_first_step else momentum * momentum_buffers[i].to(g.dtype) + (1 - dampening) * g
            momentum_buffers[i].copy_(b)
            g = g + momentum * b if nesterov else b
        param.copy_(theta - lr * g)
