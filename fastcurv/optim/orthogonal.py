"""Orthogonalised gradients for any optimizer, and which layers they are for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from fastcurv.ops.newton_schulz import Coefficients
from fastcurv.optim._gradients import MATRIX, SHAPES, SWITCH, Orthogonalisation, check_switch, keep
from fastcurv.optim._wrapper import OptimizerWrapper

KINDS = ("conv+linear", "conv")

# Of nn.MultiheadAttention: linear maps that are parameters of the module itself.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Layers whose parameters of three dimensions, if any, are no matrices in a stack.
_NO_STACKS = (nn.RNNBase, nn.LayerNorm, nn.RMSNorm, ParametrizationList)


def param_groups(
    model: nn.Module, orthogonal: str = "conv+linear", skip_last_linear: bool = False, *, verbose: bool = True
) -> list[dict[str, Any]]:
    """Splits the parameters of a model into those whose gradients are orthogonalised, and the others.

    Args:
        model: The model.
        orthogonal: `conv+linear`: weights of convolutions and linear layers, the projections of
            `nn.MultiheadAttention` among them, and stacks of matrices such as experts: parameters of three dimensions,
            each longer than one, of other modules; `conv`: of convolutions. A weight that is also an embedding's (tied)
            is none, and so are those of norm and recurrent layers, and what a parametrized weight (weight_norm,
            spectral_norm) is made of.
        skip_last_linear: Whether to leave out the last linear layer of the model, the classifier if it has one, which
            leaves accuracy as it is and improves the loss (thesis, table 5.6).
        verbose: Whether to print what went where.

    Returns:
        Groups for an optimizer, as many as are not empty, with named parameters. `orthogonal` says which are
        orthogonalised, and `matrix` of these what their matrices are: `rows` (filters and neurons), `columns`
        (transposed weights: the Conv1D of transformers) or `batch` (stacks).

    Raises:
        TypeError: If `model` is no module.
        ValueError: If `orthogonal` is none of the two.

    Source: Tuddenham (2026), Algorithm 6 and section 5.5.6; spec osgd 2.7.

    Example:
        >>> import fastcurv, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> groups = fastcurv.param_groups(model)
        orthogonal, matrix='rows': 2 parameters, 232 elements: 0.weight, 2.weight
        not orthogonal: 2 parameters, 10 elements: 0.bias, 2.bias
    """
    if orthogonal not in KINDS:
        raise ValueError(f"orthogonal: expected one of {', '.join(KINDS)}, got {orthogonal!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    kinds: dict[Tensor, str] = {}
    last: Tensor | None = None  # of the last linear layer, unless it is made of other parameters
    embeddings: set[Tensor] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embeddings |= set(own.values())
        elif isinstance(module, _ConvNd):
            kinds |= {} if weight is None else {weight: "rows"}
        elif orthogonal == "conv":
            continue
        elif isinstance(module, nn.MultiheadAttention):
            kinds |= {own[name]: "rows" for name in _PROJECTIONS if name in own}
        # The transformers library's Conv1D is a linear layer with its weight transposed.
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            last = weight
            kinds |= {} if weight is None else {weight: "rows" if isinstance(module, nn.Linear) else "columns"}
        elif not isinstance(module, _NO_STACKS):
            kinds |= {param: "batch" for param in own.values() if not is_lazy(param) and _is_stack(param)}
    chosen = {param: kind for param, kind in kinds.items() if param not in embeddings}
    if skip_last_linear and last is not None:
        chosen.pop(last, None)
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if chosen.get(p) == kind], SWITCH: True, MATRIX: kind}
        for kind in SHAPES
    ]
    groups.append({"params": [(name, p) for name, p in named if p not in chosen], SWITCH: False})
    groups = [group for group in groups if group["params"]]
    for group in groups if verbose else ():
        print(_described(group))
    return groups


def _is_stack(param: Tensor) -> bool:
    """Whether a parameter may be a stack of matrices; tokens and positions have one row or one matrix."""
    return param.dim() == 3 and min(param.shape) > 1


def _described(group: dict[str, Any]) -> str:
    """A line that says what is in a group."""
    params = group["params"]
    elements = sum(p.numel() for _, p in params if not is_lazy(p))
    what = f"orthogonal, {MATRIX}={group[MATRIX]!r}" if group[SWITCH] else "not orthogonal"
    return f"{what}: {len(params)} parameters, {elements} elements: {', '.join(name for name, _ in params)}"


class Orthogonal(OptimizerWrapper):
    """Any optimizer on orthogonalised gradients.

    In `step`, the closure runs first; then, for the wrapped optimizer's step, the `p.grad` of each matrix of the groups
    whose `orthogonal` is not False points to its orthogonalised version. Afterwards, also after an exception, it is the
    same object with the same contents as before. An optimizer whose step needs its closure (L-BFGS) gets one that
    orthogonalises what the closure computed.

    `param_groups`, `state` and checkpoints are those of the wrapped optimizer. GradScaler unscales gradients first.
    Clipping before the step has no effect on what is orthogonalised; `max_norm` clips what comes out.

    Args:
        optimizer: What takes the steps: of fastcurv, of torch, or of anybody.
        method: `polar` (the thesis's), `gram_schmidt` or `newton_schulz`: see `fastcurv.ops.orthogonalize`.
        rank_policy: `isometry`: what is zero stays zero (dead filters); `complete`: the thesis's full orthonormal set.
        coefficients: Of newton_schulz.
        steps: Of newton_schulz.
        dtype: Of newton_schulz.
        normalize: The thesis's controls in place of orthogonalisation: `layer` or `component`.
        matrix: As of `OSGD`: `rows`, `columns` or `batch`, for groups that have no `matrix` of their own.
        max_norm: Norm to which all gradients together are clipped after orthogonalisation; None: they are not.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Raises:
        TypeError: If `optimizer` is none.
        ValueError: On an option that cannot be honoured.

    Source: Tuddenham (2026), section 5.3, Algorithm 6; spec osgd 2.7.

    Example:
        >>> import fastcurv, torch
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = fastcurv.Orthogonal(torch.optim.SGD([p], lr=0.5))
        >>> p.grad = torch.tensor([[0.0, 3.0], [0.25, 0.0]])
        >>> optimizer.step()
        >>> p.data
        tensor([[ 0.0000, -0.5000],
                [-0.5000,  0.0000]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        method: str = "polar",
        rank_policy: str = "isometry",
        coefficients: str | Coefficients = "muon",
        steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        normalize: str | None = None,
        matrix: str | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
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
        super().__init__(optimizer)
        for group in self.param_groups:
            check_switch(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer; its `orthogonal` and `matrix` are checked first."""
        check_switch(param_group)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step of the wrapped optimizer on orthogonalised gradients.

        Args:
            closure: Evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned, or None.
        """
        if closure is not None and _needs_closure(self.optimizer):
            return self._step_with(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._orthogonalisation.shown(self.param_groups):
            self.optimizer.step()
        return loss

    def _load(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            check_switch(group)
        before = [dict(group) for group in self.param_groups]
        super()._load(state_dict)
        keep(before, self.param_groups)

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        shown = self._orthogonalisation.shown(self.param_groups)

        def orthogonalised() -> Any:
            nonlocal shown
            shown.__exit__(None, None, None)  # the closure sees its own gradients
            with torch.enable_grad():
                loss = closure()
            shown = self._orthogonalisation.shown(self.param_groups)
            shown.__enter__()
            return loss

        shown.__enter__()
        try:
            return self.optimizer.step(orthogonalised)
        finally:
            shown.__exit__(None, None, None)

    def __getstate__(self) -> dict[str, Any]:
        """See `OptimizerWrapper`."""
        return {**super().__getstate__(), "_orthogonalisation": self._orthogonalisation}

    def __repr__(self) -> str:
        return f"Orthogonal({self._orthogonalisation.options['method']}, {self.optimizer!r})"


def _needs_closure(optimizer: Optimizer) -> bool:
    if isinstance(optimizer, OptimizerWrapper):
        return _needs_closure(optimizer.optimizer)
    argument = inspect.signature(optimizer.step).parameters.get("closure")
    return argument is not None and argument.default is inspect.Parameter.empty
