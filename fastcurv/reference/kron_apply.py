"""Gradients times inverses of Kronecker products (Martens, 2016, sections 6.4.2 and 6.8, and appendix B.2)."""

from __future__ import annotations

import torch
from torch import Tensor

NOT_FINITE = -2


@torch.no_grad()
def kron_apply(
    grads: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    inputs: list[Tensor],
    left_values: list[Tensor],
    right_values: list[Tensor],
    updates: list[Tensor],
    products: Tensor,
    info: Tensor,
    workspace: Tensor,
) -> None:
    r"""The update of every layer and its inner products; see `fastcurv.ops.kron_apply`.

    .. math:: U = L V R, \quad
        U = \frac{1}{m} (L g^T)(a R), \quad
        U = K_2 \left[ (K_2^T V K_1) \oslash (1 1^T + s_2 s_1^T) \right] K_1^T.

    The second where there are `inputs` a, and `grads` are g; the third where there are values s_2 and s_1, and `lefts`
    and `rights` are K_2 and K_1. Nothing waits for a device, and `workspace` is not needed.
    """
    for i, grad in enumerate(grads):
        left, right = lefts[i], rights[i]
        if inputs:
            samples = len(grad)
            left_factor, right_factor = left @ grad.mT, inputs[i] @ right
            update = left_factor @ right_factor / samples
            # V is a sum over samples of outer products: so is <V, U>, of entries of two m x m matrices.
            dot = _dot(grad @ left_factor / samples, inputs[i] @ right_factor.mT / samples)
        else:
            if left_values:
                divisor = 1 + left_values[i][:, None] * right_values[i]
                quotient = torch.where(divisor.isfinite(), left.mT @ grad @ right / divisor, torch.nan)
                update = left @ quotient @ right.mT
            else:
                update = left @ grad @ right
            dot = _dot(grad, update)
        sums = torch.stack([dot, _dot(update, update)])
        finite = sums.isfinite().all()
        updates[i].copy_(torch.where(finite, update, 0.0))
        products[i].copy_(torch.where(finite, sums, 0.0))
        info[i].copy_(torch.where(finite, 0, NOT_FINITE))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of two matrices, in float64."""
    return (x.double() * y.double()).sum()
