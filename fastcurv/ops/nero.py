"""The op `nero`: rotation of neurons over lists of tensors."""

from __future__ import annotations

from torch import Tensor

from fastcurv.ops._multi_tensor import multi_tensor_op


@multi_tensor_op(read_only=("grads", "scales"), rows=lambda arguments: 0)
def nero_(
    params: list[Tensor],
    grads: list[Tensor],
    row_exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor = 0.01,
    beta: float | Tensor = 0.999,
    constraints: bool = True,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of Nero on a list of parameters, in place.

    A neuron is a slice of a parameter along dim 0; in tensors of one dimension or none, an element. The formulas are in
    `fastcurv.reference.nero`. A neuron whose gradients were all zero so far does not move (0 / 0 counts as zero). The
    constraints do not touch neurons of one element, which they would leave nothing of, nor those whose elements are all
    equal after the step, which have no direction: these become zero. A neuron stays where it is if the square of its
    gradient's norm is beyond the dtype of the averages. Compiled back ends sum squares in float64: norms of float64
    neurons must lie within 1e-150 and 1e150.

    Args:
        params: n parameters of one dtype (float32, float64, bfloat16 or float16) and device, of any shapes and dense
            layouts.
        grads: Their gradients: same shapes, dtype and device, any layout. Read only.
        row_exp_avg_sqs: Averages of the squared norm of each neuron's gradient: one element for each slice along dim 0,
            float64 for float64 parameters, else float32.
        scales: Typical norm of a tensor's neurons, one element of that dtype each, to which steps are proportional.
            Read only.
        steps: Steps taken by each parameter, one float32 element each, on its device; advanced by one.
        lr: Angle, in radians, by which a neuron turns. Like the next: a number, or a one-element float32 or float64
            tensor, on the parameters' device (read by the kernel) or on the CPU (read at the call).
        beta: Decay of the averages, in [0, 1).
        constraints: Whether to bring each neuron of a tensor of two or more dimensions to mean zero and norm one after
            the step.
        maximize: Whether to ascend.
        grad_scale: One float32 element by which the gradients are divided first.
        found_inf: One float32 element; nonzero: nothing is written, steps included.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Liu, Bernstein et al. (2021), Algorithm 1, with the defaults of the published implementation jxbz/nero; spec
    nero 1.5.

    Cost: 12 bytes per float32 element and 22 flops, where a neuron fits into the cache, else 20 bytes. One launch, or
    one parallel region, for the whole list; three launches where a neuron has more than 32768 elements or is not
    contiguous.

    Example:
        >>> import torch
        >>> from fastcurv.ops import nero_
        >>> p, s, scale, t = torch.tensor([[0.6, -0.8, 0.2]]), torch.zeros(1, 1), torch.ones(()), torch.zeros(())
        >>> nero_([p], [torch.tensor([[1.0, 0.0, 0.0]])], [s], [scale], [t], lr=0.01)
        >>> abs(p.sum()) < 1e-6, abs(p.norm() - 1) < 1e-6
        (tensor(True), tensor(True))
    """
