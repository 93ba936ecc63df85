"""The op `ranger`: RAdam, gradient centralisation and Lookahead in one pass over lists of tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcurv._chunks import NO_ROWS
from fastcurv.ops._multi_tensor import multi_tensor_op


def _rows(arguments: dict[str, Any]) -> int:
    if not arguments["use_gc"]:
        return NO_ROWS
    return 4 if arguments["gc_conv_only"] else 2


@multi_tensor_op(rows=_rows, occasional=("slow_buffers",))
def ranger_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    slow_buffers: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.95,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-5,
    weight_decay: float | Tensor = 0.0,
    alpha: float | Tensor = 0.5,
    n_sma_threshold: float | Tensor = 5.0,
    k: int = 6,
    use_gc: bool = True,
    gc_conv_only: bool = False,
    scaled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of Ranger on a list of parameters, in place.

    The formulas are in `fastcurv.reference.ranger`. The mean over a row of the gradient is taken without writing the
    gradient; the slow weights are read and written only on the steps on which they move.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        exp_avgs: First moments, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones. In bfloat16 averages stand still where 1 - beta is below 2^-8.
        exp_avg_sqs: Second moments, of the dtype of `exp_avgs`.
        slow_buffers: Slow weights, in the parameters' layouts; float64 for float64 parameters, else float32.
        steps: Steps taken by each parameter, one float32 element each, on its device; advanced by one.
        lr: Learning rate. Like the next six: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the raw second moment.
        weight_decay: Decoupled decay.
        alpha: How far the slow weights go towards the fast ones, in [0, 1].
        n_sma_threshold: The step is rectified where the length of the approximated average exceeds this, else it is one
            of momentum alone.
        k: The slow weights of a parameter move on every k-th of its own steps.
        use_gc: Whether to subtract from each slice of a gradient along dim 0 its mean, in tensors of two or more
            dimensions.
        gc_conv_only: Whether to do so in tensors of four or more dimensions only.
        scaled_weight_decay: Whether weight decay is scaled by the rectified step size (version 2020.9.4 of the
            published implementation) and not by the learning rate alone (20.4.11).
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Wright (2019), Ranger-Deep-Learning-Optimizer, versions 20.4.11 and 2020.9.4; Liu et al. (2020), Algorithm
    2; Yong et al. (2020), equation 1; Zhang et al. (2019), Algorithm 1; spec first_order 3.1 items 2, 6, 7 and 3.3.

    Cost: 28 bytes per float32 element, and 8 more on every k-th step (29.3 on average for k = 6); 15 flops. One launch,
    or one parallel region, for the whole list; three launches where a row has more than 32768 elements or is not
    contiguous.

    Example:
        >>> import torch
        >>> from fastcurv.ops import ranger_
        >>> p, m, v, s, t = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(())
        >>> ranger_([p], [torch.tensor([[3.0, 1.0]])], [m], [v], [s], [t], lr=0.1)
        >>> p
        tensor([[0.9000, 1.1000]])
    """
