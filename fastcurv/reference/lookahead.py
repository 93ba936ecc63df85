"""The slow update of Lookahead (Zhang et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcurv.reference._common import compute_dtype


@torch.no_grad()
def lookahead_(
    params: list[Tensor],
    slow_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    alpha: float | Tensor,
    found_inf: Tensor | None,
) -> None:
    r"""One slow update of every parameter; see `fastcurv.ops.lookahead_` for the arguments.

    :math:`\phi \leftarrow \phi + \alpha (\theta - \phi), \quad \theta \leftarrow \phi`. `table` is for the compiled
    back ends. Reads `found_inf` on the host: on a GPU it synchronises.
    """
    if found_inf is not None and found_inf.item():
        return
    alpha = float(alpha)
    for param, slow in zip(params, slow_buffers, strict=True):
        slow.copy_(slow + alpha * (param.to(compute_dtype(param)) - slow))
        param.copy_(slow)
