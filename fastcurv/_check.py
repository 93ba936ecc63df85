"""What is asked of the arguments of an op, and the errors that say which one fails, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Storage dtypes of parameters and gradients, and the dtypes their optimizer state may have; the default first.
STATE_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.float32,),
    torch.float16: (torch.float32,),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def layout(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a tensor with those of its size-1 dimensions, which address nothing, set to zero."""
    return tuple(s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a block of memory, each once, in any order of dimensions."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own that a kernel can address (a DTensor, say, has not)."""
    return not is_traceable_wrapper_subclass(tensor)


def is_addressable(value: object) -> bool:
    """Whether `data_ptr` means something for a value."""
    return isinstance(value, Tensor) and is_plain(value) and value.layout is torch.strided


def dense_tensor(value: object, where: str) -> None:
    """Raises unless `value` is a plain strided tensor of a supported floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(value).__name__}")
    if not is_plain(value):
        raise TypeError(
            f"{where}: expected a plain tensor, got {type(value).__name__}, which is a wrapper around other tensors "
            "and has no memory of its own. Sharded parameters (FSDP2, tensor parallelism) are not supported yet: "
            "use torch.optim for them, or pass the local tensors"
        )
    if value.layout is not torch.strided:
        raise ValueError(
            f"{where}: expected a dense tensor, got layout {value.layout}. Use torch.optim.SparseAdam for sparse "
            "gradients, sparse=False in the embedding, or grad.to_dense()"
        )
    if value.is_complex():
        raise ValueError(
            f"{where}: expected a real tensor, got {_name(value.dtype)}. Optimize the real view of the same memory: "
            "make torch.view_as_real(param) the parameter"
        )
    if value.dtype not in STATE_DTYPES:
        known = ", ".join(map(_name, STATE_DTYPES))
        raise ValueError(f"{where}: expected one of {known}, got {_name(value.dtype)}")


def _like(tensor: Tensor, where: str, model: Tensor, model_where: str) -> None:
    if tensor.shape != model.shape:
        raise ValueError(f"{where}: expected shape {_shape(model)} like {model_where}, got {_shape(tensor)}")
    if tensor.device != model.device:
        raise ValueError(f"{where}: expected device {model.device} like {model_where}, got {tensor.device}")


def parameters(params: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[int] | None = None) -> None:
    """Checks parameters and their gradients.

    Args:
        params: Parameters of one dtype and device.
        grads: One gradient for each.
        indices: The numbers by which messages name them, if not 0, 1, ...

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    if len(grads) != len(params):
        raise ValueError(f"grads: expected {len(params)} tensors, one for each of params, got {len(grads)}")
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        index = indices[i] if indices else i
        where, grad_where = f"params[{index}]", f"grads[{index}]"
        dense_tensor(param, where)
        if param.dtype != params[0].dtype or param.device != params[0].device:
            raise ValueError(
                f"{where}: expected {_name(params[0].dtype)} on {params[0].device} like params[0], got "
                f"{_name(param.dtype)} on {param.device}. One call takes one dtype and device; the optimizers of "
                "fastcurv split their groups themselves"
            )
        if not is_dense(param):
            raise ValueError(
                f"{where}: expected elements that fill their memory without gaps or overlap, got shape {_shape(param)} "
                f"with strides {tuple(param.stride())}. A strided or expanded view cannot be a parameter: make a "
                "parameter of its base, or of param.contiguous()"
            )
        dense_tensor(grad, grad_where)
        _like(grad, grad_where, param, where)
        if grad.dtype != param.dtype:
            raise ValueError(f"{grad_where}: expected {_name(param.dtype)} like {where}, got {_name(grad.dtype)}")


def elementwise(lists: Mapping[str, list[Tensor]], indices: Sequence[int] | None = None) -> dict[str, list[Tensor]]:
    """Checks the lists of a multi-tensor elementwise op.

    Args:
        lists: `params`, `grads`, then state lists of the parameters' shapes (an empty one is absent) and `steps`
            (one float32 element each), by argument name.
        indices: The numbers by which messages name the tensors, if not 0, 1, ...

    Returns:
        The lists, with each gradient whose memory layout differs from its parameter's replaced by a copy in that layout
        (the gradient itself is never touched).

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    params, grads = lists["params"], lists["grads"]
    parameters(params, grads, indices)
    for name, tensors in lists.items():
        if len(tensors) != len(params) and (len(tensors) or name == "steps"):
            raise ValueError(f"{name}: expected {len(params)} tensors, one for each of params, got {len(tensors)}")
    states = {name: x for name, x in lists.items() if name not in ("params", "grads", "steps") and x}
    model: tuple[str, torch.dtype] | None = None
    for i, param in enumerate(params):
        index = indices[i] if indices else i
        for name, tensors in states.items():
            state, where = tensors[i], f"{name}[{index}]"
            dense_tensor(state, where)
            _like(state, where, param, f"params[{index}]")
            if layout(state) != layout(param):
                raise ValueError(
                    f"{where}: expected strides {tuple(param.stride())} like params[{index}], got "
                    f"{tuple(state.stride())}"
                )
            if state.dtype not in STATE_DTYPES[param.dtype]:
                allowed = " or ".join(map(_name, STATE_DTYPES[param.dtype]))
                raise ValueError(
                    f"{where}: expected {allowed} for {_name(param.dtype)} params, got {_name(state.dtype)}"
                )
            model = model or (where, state.dtype)
            if state.dtype != model[1]:
                raise ValueError(f"{where}: expected {_name(model[1])} like {model[0]}, got {_name(state.dtype)}")
        step, where = lists["steps"][i], f"steps[{index}]"
        if not isinstance(step, Tensor):
            raise TypeError(f"{where}: expected a torch.Tensor, got {type(step).__name__}")
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != param.device:
            raise ValueError(
                f"{where}: expected one float32 element on {param.device}, got shape {_shape(step)}, "
                f"{_name(step.dtype)} on {step.device}"
            )
    same_layout = [g if layout(g) == layout(p) else _relaid(g, p) for p, g in zip(params, grads, strict=True)]
    return {**lists, "grads": same_layout}


def _relaid(tensor: Tensor, model: Tensor) -> Tensor:
    return torch.empty_strided(model.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def number(name: str, value: float | Tensor, *, below: float = float("inf")) -> None:
    """Raises unless a hyper-parameter is in [0, below); a tensor must have one element (its value is not read)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: expected a number or a tensor of one float32 or float64 element, got shape {_shape(value)}, "
                f"{_name(value.dtype)}"
            )
    elif isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"{name}: expected a number or a one-element tensor, got {type(value).__name__}")
    elif not 0.0 <= value < below and not (value == below == float("inf")):
        interval = f"[0, {below:g})" if below != float("inf") else "[0, inf)"
        raise ValueError(f"{name}: expected a value in {interval}, got {value}")


def scalar_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raises when a one-element tensor is where the kernel cannot read it.

    Hyper-parameters may be in host memory (they are read at the call); flags that the GPU computes may not.
    """
    if value.device == device or (value.device.type == "cpu" and name not in ("grad_scale", "found_inf")):
        return
    raise ValueError(f"{name}: expected a tensor on {device} like the parameters, got {value.device}")
