"""Nero, the neuronal rotator (Liu, Bernstein et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype, gradient, one_minus_power, unit


@torch.no_grad()
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
    r"""One step of Nero on every parameter; see `fastcurv.ops.nero_` for the arguments.

    For each neuron n, a slice along dim 0 with weights w and gradient g, and the tensor's scale c:

    .. math::
        s_t &= \beta s_{t-1} + (1 - \beta) \|g_t\|^2 \\
        w &\leftarrow w - \eta c g_t / \sqrt{s_t / (1 - \beta^t)} \\
        w &\leftarrow (w - \bar w) / \|w - \bar w\|

    the last line with `constraints`, in tensors of two or more dimensions whose neurons have more than one weight.
    :math:`0 / 0 = 0`; weights that are equal in their first 23 bits count as equal. Half-precision parameters are
    updated in float32 and rounded once. `table` is for the compiled back ends. Reads `found_inf` and the steps on the
    host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    lr, beta = float(lr), float(beta)
    for param, grad, average, scale, step in zip(params, grads, row_exp_avg_sqs, scales, steps, strict=True):
        step += 1
        if not param.numel():
            continue
        rows = param.shape[0] if param.dim() else 1
        w = param.to(compute_dtype(param)).reshape(rows, -1)
        g = gradient(grad, param, maximize, grad_scale).reshape(rows, -1)
        s = beta * average.reshape(rows, 1) + (1 - beta) * g.double().square().sum(dim=1, keepdim=True)
        average.copy_(s.reshape(average.shape))
        norm = (s / one_minus_power(beta, step.item())).sqrt()
        w = w - lr * scale * torch.where(norm == 0, 0, g / norm).to(w.dtype)
        if constraints and w.shape[1] > 1:
            w = w * unit(w, dim=1)  # changes neither direction
            whole = w.norm(dim=1, keepdim=True)
            w = w - w.double().mean(dim=1, keepdim=True).to(w.dtype)
            norm = w.norm(dim=1, keepdim=True)
            # Weights that are equal in their first 23 bits have no direction but that of their rounding.
            w = torch.where(norm <= 2**-23 * whole, 0, w / norm)
        param.copy_(w.reshape(param.shape))
