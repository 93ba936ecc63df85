"""The op `lamb`: layer-wise adaptive moments over lists of tensors."""

from __future__ import annotations

from torch import Tensor

from fastcurv.ops._multi_tensor import multi_tensor_op
from fastcurv.ops.lars import tensor_rows


@multi_tensor_op(rows=tensor_rows)
def lamb_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-6,
    weight_decay: float | Tensor = 0.0,
    adaptive: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of LAMB on a list of parameters, in place.

    The formulas are in `fastcurv.reference.lamb`. Where the norm of a tensor or of its update is zero its trust ratio
    is 1. Compiled back ends sum squares in float64: norms of float64 tensors must lie within 1e-150 and 1e150.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        exp_avgs: First moments, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones. In bfloat16 averages stand still where 1 - beta is below 2^-8.
        exp_avg_sqs: Second moments, of the dtype of `exp_avgs`.
        steps: Steps taken by each parameter, one float32 element each, on its device; advanced by one.
        lr: Learning rate. Like the next four: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay, added to the update before its norm is taken.
        adaptive: Whether to scale the step of each tensor by its trust ratio; without, every ratio is 1.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: You et al. (2020), Algorithm 2; spec nero 4.

    Cost: 28 bytes per float32 element and 24 flops where a tensor fits into the cache, else 40 bytes; one launch, or
    one parallel region, for the whole list; three launches where a tensor has more than 32768 elements.

    Example:
        >>> import torch
        >>> from fastcurv.ops import lamb_
        >>> p, m, v, t = torch.tensor([3.0, 4.0]), torch.zeros(2), torch.zeros(2), torch.zeros(())
        >>> lamb_([p], [torch.tensor([1.0, 1.0])], [m], [v], [t], lr=0.1)
        >>> p
        tensor([2.6464, 3.6464])
    """
