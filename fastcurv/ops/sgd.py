"""The op `sgd`: stochastic gradient descent with momentum over lists of tensors."""

from __future__ import annotations

from torch import Tensor

from fastcurv.ops._multi_tensor import multi_tensor_op


@multi_tensor_op(optional=("momentum_buffers",))
def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    is_first_step: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of stochastic gradient descent on a list of parameters, in place.

    The formulas are in `fastcurv.reference.sgd`. Differs from `torch.optim.SGD` in: the momentum of half-precision
    parameters is float32; `grads` are never written, not even with `grad_scale`.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        momentum_buffers: Momenta, in the parameters' layouts; float32 for 16-bit parameters, float32 or bfloat16 for
            float32 ones, float64 for float64 ones. In bfloat16 a momentum above 1 - 2^-8 does not decay.
            Empty: no momentum, whatever `momentum` says.
        lr: Learning rate. Like the next three: a number, or a one-element float32 or float64 tensor, on the parameters'
            device (read by the kernel) or on the CPU (read at the call).
        momentum: Decay of the momentum.
        dampening: The gradient enters the momentum times one minus this; below 1 for an effect.
        weight_decay: L2 penalty.
        nesterov: Whether to look one step ahead along the momentum.
        is_first_step: Whether the momenta hold nothing yet: they start as the gradient, without dampening.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Sutskever et al. (2013), equations 1 to 4, in the form of torch.optim.SGD, whose learning rate stands
    outside the momentum; spec first_order 1.1 (6), (7).

    Cost: 20 bytes per float32 element, 12 without momentum; 4 flops; one launch, or one parallel region, for the list.

    Example:
        >>> import torch
        >>> from fastcurv.ops import sgd_
        >>> p, b = torch.ones(3), torch.zeros(3)
        >>> for _ in range(2):
        ...     sgd_([p], [torch.ones(3)], [b], lr=0.1, momentum=0.5)
        >>> p
        tensor([0.7500, 0.7500, 0.7500])
    """
