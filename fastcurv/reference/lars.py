"""LARS (You, Gitman and Ginsburg, 2017): SGD with a learning rate for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype, gradient, norm, times


@torch.no_grad()
def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    eps: float | Tensor,
    nesterov: bool,
    adaptive: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    r"""One step of LARS on every parameter; see `fastcurv.ops.lars_` for the arguments.

    .. math::
        \gamma &= \eta \|\theta\| / (\|g_t\| + \lambda \|\theta\| + \epsilon),
        \quad 1 \text{ where } \|\theta\| = 0 \text{ or } \|g_t\| = 0 \\
        b_t &= \mu b_{t-1} + \gamma (g_t + \lambda \theta) \\
        \theta_t &= \theta_{t-1} - \alpha b_t

    with :math:`\gamma (g_t + \lambda \theta) + \mu b_t` in the place of :math:`b_t` for Nesterov. Half-precision
    parameters are updated in float32 and rounded once. `table` is for the compiled back ends. Reads `found_inf` and the
    norms on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, momentum, weight_decay, trust_coefficient, eps = (
        float(x) for x in (lr, momentum, weight_decay, trust_coefficient, eps)
    )
    for param, grad, momentum_buffer in zip(params, grads, momentum_buffers, strict=True):
        theta, g = param.to(compute_dtype(param)), gradient(grad, param, maximize, grad_scale)
        size, grad_size = norm(theta).item(), norm(g).item()
        ratio = 1.0
        if adaptive and size != 0 and grad_size != 0:
            ratio = trust_coefficient * size / (grad_size + weight_decay * size + eps)
        g = times(ratio, g + weight_decay * theta)
        b = momentum * momentum_buffer.to(g.dtype) + g
        momentum_buffer.copy_(b)
        param.copy_(theta - lr * (g + momentum * b if nesterov else b))
