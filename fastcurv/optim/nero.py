"""Nero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastcurv import _check
from fastcurv.ops import _matrices, nero_
from fastcurv.optim._base import MultiTensorOptimizer


class Nero(MultiTensorOptimizer):
    """Nero, the neuronal rotator: turns each neuron by a fixed angle, by one fused kernel launch per step.

    A neuron is a slice of a parameter along dim 0; each element is one in parameters of fewer than two dimensions. Its
    state is one number per neuron. As in the published implementation, `constraints` bring the neurons to mean zero and
    norm one already here, at construction: that changes the function a pretrained network computes.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Angle of a step in radians: a number, or a one-element tensor, which the kernel reads at each step.
        beta: Decay of the average of squared gradient norms.
        constraints: Whether to keep each neuron of two or more weights at mean zero and norm one, in parameters of two
            or more dimensions.
        maximize: Whether to ascend.
        fused: Whether the kernel does GradScaler's part, as in `fastcurv.Adam`.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        ValueError: On a hyper-parameter out of range.

    Source: Liu, Bernstein et al. (2021), Algorithm 1, with the defaults of the published implementation jxbz/nero; spec
    nero 1.5 and 3. The formulas are in `fastcurv.reference.nero`, the cost in `fastcurv.ops.nero_`.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.eye(2, 3))
        >>> optimizer = fastcurv.Nero([p])
        >>> p.grad = torch.ones(2, 3) + torch.eye(2, 3)
        >>> optimizer.step()
        >>> bool((p.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """

    _op = nero_
    _anchored = "scale"
    # False while torch's constructor adds groups, of which a later one may be wrong.
    _is_made = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.01,
        beta: float | Tensor = 0.999,
        constraints: bool = True,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "constraints": constraints,
            "maximize": maximize,
            "fused": fused,
        }
        self._is_made = False
        super().__init__(params, defaults, backend=backend, state_dtype=None)
        self._is_made = True
        self._project(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and, with `constraints`, brings its neurons to mean zero and norm one."""
        super().add_param_group(param_group)
        if self._is_made:  # else once all groups are known to be right
            self._project(self.param_groups[-1:])

    @torch.no_grad()
    def _project(self, groups: list[dict[str, Any]]) -> None:
        projected = []
        for group in groups:
            for i, param in enumerate(group["params"]) if group["constraints"] else ():
                _check.whole(param, f"params[{i}]")
                if is_lazy(param):
                    raise ValueError(f"params[{i}]: expected values, which Nero normalises; run the model once before")
                whole = not (param.is_floating_point() or param.is_complex())  # nobody optimizes whole numbers
                if whole or param.dim() < 2 or param.numel() <= param.shape[0]:
                    continue
                _check.parameters([param], None, [i])
                projected.append(param)
        for param in projected:
            param.copy_(_projected(_neurons(param), param.dtype).view(param.shape))

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Takes the typical norm of each tensor's neurons anew, as after loading other weights in mid-training."""
        self._anchor()

    def _has_moved(self, param: Tensor) -> Tensor:
        # Turned neurons keep their norms: what has seen no gradient has not turned.
        seen: Tensor = self.state[param]["exp_avg_sq"]
        return seen.any()

    def _initial(self, key: str, param: Tensor) -> Tensor:
        initial = super()._initial(key, param)
        if key == "scale" and param.numel():
            neurons = _neurons(param)
            unit = _matrices.unit(neurons.abs().amax())
            scale = ((neurons * unit).norm(dim=1).mean() / unit).clamp(max=torch.finfo(unit.dtype).max)
            initial.copy_(torch.where(scale == 0, 0.01, scale))
        return initial

    def _arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("lr", "beta", "constraints", "maximize")}


def _projected(neurons: Tensor, dtype: torch.dtype) -> Tensor:
    """Neurons at mean zero and norm one; those that are there already, but for rounding to a dtype, as they were."""
    # Scaled by powers of two, which change no direction: no square overflows or vanishes.
    scaled = neurons * _matrices.unit(neurons.abs().amax(dim=1, keepdim=True))
    centred = scaled - scaled.double().mean(dim=1, keepdim=True).to(neurons.dtype)
    norms = centred.norm(dim=1, keepdim=True)
    # As in the op: weights that are equal but for rounding become zero.
    alike = norms <= 2**-23 * scaled.norm(dim=1, keepdim=True)
    exact = neurons.double()
    means = exact.mean(dim=1, keepdim=True)
    # A step rounds each weight once; in float64 its sums are rounded too.
    rounding = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float64).eps)
    there = (exact.norm(dim=1, keepdim=True) - 1).abs() <= rounding
    there &= means.abs() * neurons.shape[1] ** 0.5 <= rounding
    return torch.where(there, neurons, torch.where(alike, 0, centred / norms))


def _neurons(param: Tensor) -> Tensor:
    """The neurons of a parameter as rows, in the dtype of the arithmetic."""
    _, dtype = _check.template("exact", param, param.dtype)
    return param.detach().to(dtype).reshape(param.shape[0] if param.dim() else 1, -1)
