"""OSGD: gradient descent along orthogonalised gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcurv.ops.newton_schulz import Coefficients
from fastcurv.optim._gradients import SWITCH, Orthogonalisation, check_options, check_switch, keep
from fastcurv.optim.sgd import SGD


class OSGD(SGD):
    """Orthogonal-SGDM: each layer's gradient is orthogonalised, then come weight decay and momentum, as in SGD.

    A row is a filter or neuron: a gradient of more than two dimensions is flattened from dim 1 on, unless its group
    says `matrix="batch"`, for stacks of matrices such as experts. The size of a gradient is discarded: the update of a
    layer of m x n has norm sqrt(min(m, n)) times the learning rate. Given plain parameters, every tensor of two or more
    dimensions is orthogonalised, embeddings too; `fastcurv.param_groups` tells layers apart. `p.grad` itself is not
    changed.

    *Clipping*: `torch.nn.utils.clip_grad_norm_` before the step has no effect on what is orthogonalised, only on the
    rest; `max_norm` clips what comes out, all parameters together. *Accumulation and DDP*: gradients are orthogonalised
    in `step`, after they were summed.

    Args:
        params: Parameters, named parameters, or groups of them, such as `fastcurv.param_groups` returns.
        lr: Learning rate, outside the momentum.
        momentum: Decay of the momentum.
        dampening: As in SGD.
        weight_decay: L2 penalty, added to the orthogonalised gradient.
        nesterov: Whether to look one step ahead along the momentum.
        method: `polar` (the thesis's), `gram_schmidt` or `newton_schulz`: see `fastcurv.ops.orthogonalize`.
        rank_policy: `isometry`: what is zero stays zero (dead filters); `complete`: the thesis's full orthonormal set.
        coefficients: Of newton_schulz.
        steps: Of newton_schulz.
        dtype: Of newton_schulz.
        orthogonal: Whether groups that do not say so are orthogonalised.
        matrix: What matrices tensors are, in groups that do not say so themselves. `rows`: slices along dim 0 are rows,
            flattened (filters, neurons). `columns`: slices along dim 1 are columns (transposed weights). `batch`: the
            last two dimensions are a matrix, of which those before count many (experts). None: `rows`, with a warning
            where there are three dimensions.
        normalize: The thesis's controls in place of orthogonalisation: `layer` (N-SGDM) or `component` (CN-SGDM).
        max_norm: Norm to which all gradients together are clipped after orthogonalisation; None: they are not.
        maximize: Whether to ascend.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.
        state_dtype: torch.bfloat16 keeps the momentum of float32 parameters in bfloat16, for `momentum` of at most
            1 - 2^-8, above which averages would stand still; None: float32.

    Raises:
        ValueError: On a hyper-parameter out of range, or an option that cannot be honoured.

    Source: Tuddenham (2026), section 5.3, equations 5.5 to 5.9, Algorithm 6; spec osgd 2.7, 2.8. With a learning rate
    that changes, momentum is torch's (the learning rate outside), not equation 5.8's.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = fastcurv.OSGD([p], lr=0.5)
        >>> p.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.25]])
        >>> optimizer.step()
        >>> p.data
        tensor([[-0.5000,  0.0000,  0.0000],
                [ 0.0000,  0.0000, -0.5000]])
    """

    # Orthogonalised gradients have lost the scale: GradScaler has to take it off before.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        method: str = "polar",
        rank_policy: str = "isometry",
        coefficients: str | Coefficients = "muon",
        steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        orthogonal: bool = True,
        matrix: str | None = None,
        normalize: str | None = None,
        max_norm: float | None = None,
        maximize: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._orthogonalisation = Orthogonalisation(
            normalize,
            max_norm,
            matrix,
            method=method,
            rank_policy=rank_policy,
            coefficients=coefficients,
            steps=steps,
            dtype=dtype,
            backend=backend,
        )
        self._orthogonal = orthogonal
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            backend=backend,
            state_dtype=state_dtype,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its `orthogonal` says whether its matrices are orthogonalised, `matrix` which those are."""
        if param_group.get(SWITCH) is None:
            param_group[SWITCH] = self._orthogonal
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_switch(group)
        check_options(group, self._orthogonalisation)
        super()._check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `MultiTensorOptimizer`; a checkpoint of SGD does not say what is orthogonalised: that stays as it is."""
        keep(self.__dict__.get("param_groups", []), state.get("param_groups", []))
        super().__setstate__(state)

    def _step(self) -> None:
        with self._orthogonalisation.shown(self.param_groups):
            super()._step()

    def __getstate__(self) -> dict[str, Any]:
        """See `MultiTensorOptimizer`."""
        own = {"_orthogonalisation": self._orthogonalisation, "_orthogonal": self._orthogonal}
        return {**super().__getstate__(), **own}
