"""The op `lookahead`: the slow update of Lookahead over lists of tensors."""

from __future__ import annotations

from torch import Tensor

from fastcurv.ops._multi_tensor import multi_tensor_op


@multi_tensor_op()
def lookahead_(
    params: list[Tensor],
    slow_buffers: list[Tensor],
    *,
    alpha: float | Tensor = 0.5,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Moves slow weights towards the fast ones and starts these from there again, in place.

    slow <- slow + alpha (params - slow); params <- slow.

    Args:
        params: n fast weights of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        slow_buffers: Slow weights, in the parameters' layouts; float64 for float64 parameters, else float32.
        alpha: How far the slow weights go, in [0, 1]: a number, or a one-element float32 or float64 tensor, on the
            parameters' device (read by the kernel) or on the CPU (read at the call).
        found_inf: One float32 element; nonzero: nothing is written.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Zhang et al. (2019), Algorithm 1; spec first_order 3.1 item 6.

    Cost: 16 bytes per float32 element, 3 flops; one launch, or one parallel region, for the whole list.

    Example:
        >>> import torch
        >>> from fastcurv.ops import lookahead_
        >>> fast, slow = torch.full((3,), 2.0), torch.zeros(3)
        >>> lookahead_([fast], [slow], alpha=0.25)
        >>> fast, slow
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0.5000, 0.5000, 0.5000]))
    """
