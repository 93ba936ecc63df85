"""Moving averages of Kronecker factors (Martens, 2016, sections 6.3 and 6.5; Grosse and Martens, 2016)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import unfold


@torch.no_grad()
def kron_factor_(
    factors: list[Tensor],
    inputs: list[Tensor],
    others: list[Tensor],
    traces: Tensor,
    info: Tensor,
    workspace: Tensor,
    *,
    decay: float,
    scale: list[float],
    has_ones: bool,
    patches: list[list[int]],
    dtype: torch.dtype,
) -> None:
    r"""Moving averages of second moments; see `fastcurv.ops.kron_factor_`.

    .. math:: M \leftarrow \epsilon M + s X^T Y,

    where Y is X unless there are others, and each has a one behind every row if `has_ones`. `patches`: of an input of
    images, kernel size, stride, padding and dilation, two numbers each; of one that is a matrix, nothing. The workspace
    is for CUDA kernels.
    """
    for i, factor in enumerate(factors):
        x = _rows(inputs[i], patches[i], has_ones).to(dtype)
        y = _rows(others[i], patches[i], has_ones).to(dtype) if others else x
        moment = scale[i] * (x.mT @ y)
        info[i] = 0 if moment.isfinite().all() else -2
        if info[i] == 0:
            if not others:
                moment = moment.tril() + moment.tril(-1).mT
            # Not a product with zero: whatever stood there.
            factor.copy_(moment if decay == 0.0 else decay * factor.to(dtype) + moment)
        traces[i] = 0.0 if others else factor.diagonal().sum(dtype=torch.float64)


def _rows(samples: Tensor, patch: list[int], has_ones: bool) -> Tensor:
    if patch:
        kernel, stride, padding, dilation = (tuple(patch[k : k + 2]) for k in range(0, 8, 2))
        wide = samples if samples.dtype == torch.float64 else samples.float()
        samples = unfold(wide, kernel, dilation, padding, stride).mT.flatten(0, 1)
    ones = samples.new_ones(len(samples), 1)
    return torch.cat([samples, ones], dim=1) if has_ones else samples
