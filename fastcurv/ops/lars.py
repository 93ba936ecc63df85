"""The op `lars`: layer-wise adaptive rate scaling of SGD over lists of tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcurv._chunks import NO_ROWS, TENSOR_ROWS
from fastcurv.ops._multi_tensor import multi_tensor_op


def tensor_rows(arguments: dict[str, Any]) -> int:
    """A tensor is one row where its step depends on its norm."""
    return TENSOR_ROWS if arguments["adaptive"] else NO_ROWS


@multi_tensor_op(rows=tensor_rows)
def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    momentum: float | Tensor = 0.9,
    weight_decay: float | Tensor = 0.0,
    trust_coefficient: float | Tensor = 1e-3,
    eps: float | Tensor = 1e-8,
    nesterov: bool = False,
    adaptive: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of LARS on a list of parameters, in place.

    The formulas are in `fastcurv.reference.lars`. Where the norm of a tensor or of its gradient is zero its trust ratio
    is 1. Compiled back ends sum squares in float64: norms of float64 tensors must lie within 1e-150 and 1e150.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        momentum_buffers: Momenta, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones. In bfloat16 a momentum above 1 - 2^-8 does not decay.
        lr: Learning rate. Like the next four: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        momentum: Decay of the momentum.
        weight_decay: L2 penalty.
        trust_coefficient: Trust ratio of a tensor whose norm is that of its gradient.
        eps: Added to the denominator of the trust ratio.
        nesterov: Whether to look one step ahead along the momentum.
        adaptive: Whether to scale the step of each tensor by its trust ratio; without, every ratio is 1.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: You, Gitman and Ginsburg (2017), Algorithm 1, with the learning rate outside the momentum as in SGD of
    torch; spec nero 4.

    Cost: 20 bytes per float32 element and 11 flops where a tensor fits into the cache, else 28 bytes; one launch, or
    one parallel region, for the whole list; three launches where a tensor has more than 32768 elements.

    Example:
        >>> import torch
        >>> from fastcurv.ops import lars_
        >>> p, b = torch.tensor([3.0, 4.0]), torch.zeros(2)
        >>> lars_([p], [torch.tensor([0.0, 10.0])], [b], lr=0.1, trust_coefficient=1.0)
        >>> p
        tensor([3.0000, 3.5000])
    """
