"""What is asked of the arguments of an op, and the errors that say which one fails, where, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcurv import _backend

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


# Advice in every refusal of a shard.
_LOCAL = (
    "Local tensors are enough for what works element by element (Adam, AdamW, RAdam, NAdam, Yogi, SGD); LAMB, LARS, "
    "Nero, Ranger, OSGD and Muon need whole tensors, of which they take norms, rows or matrices"
)


def whole(param: Tensor, where: str) -> None:
    """Raises if a parameter is a flattened shard, which has lost the rows and the norm of the tensor it is part of."""
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{where}: expected a whole tensor, got a shard that FSDP1 (FullyShardedDataParallel) has flattened to "
            f"shape {_shape(param)}: use DistributedDataParallel, or torch.optim. {_LOCAL}"
        )


# An average keeps its state in bfloat16, of 8 bits, only if a step takes more of it away than rounding puts back.
_SLOWEST_BFLOAT16 = 1 - 2.0**-8


def moves_in_bfloat16(arguments: Mapping[str, Any]) -> None:
    """Raises if an average among the keyword arguments of an op would stand still in bfloat16.

    Tensors on a GPU are not read.
    """
    for name in ("beta1", "beta2", "momentum"):
        value = arguments.get(name, 0.0)
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue
        if float(value) > _SLOWEST_BFLOAT16:
            raise ValueError(
                f"state_dtype=torch.bfloat16: expected {name} of at most 1 - 2^-8 = {_SLOWEST_BFLOAT16}, got "
                f"{float(value)}: an average that loses less than 2^-8 of itself in a step is rounded back to where "
                f"it was, and never falls. Lower {name} (0.95 is usual for large models), or leave state_dtype out"
            )


def tensors(values: object, name: str, hint: str) -> list[Any]:
    """The list that was given; its items are not checked.

    Args:
        values: What was given.
        name: What the argument is called.
        hint: What to do with one tensor.

    Raises:
        TypeError: If that is one tensor, or nothing to iterate over.
    """
    if isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a list of tensors, got a tensor; {hint}")
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of tensors, got {type(values).__name__}")
    return list(values)


def dense_tensor(value: object, where: str) -> None:
    """Raises unless `value` is a plain strided tensor of a supported floating-point dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(value).__name__}")
    if not is_plain(value):
        raise TypeError(
            f"{where}: expected a plain tensor, got {type(value).__name__}, which is a wrapper around other tensors "
            "and has no memory of its own. Sharded parameters (FSDP2, tensor parallelism) are not supported yet: "
            f"use torch.optim for them. {_LOCAL}"
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


def parameters(params: Sequence[Tensor], grads: Sequence[Tensor] | None, indices: Sequence[int] | None = None) -> None:
    """Checks parameters and their gradients.

    Args:
        params: Parameters of one dtype and device.
        grads: One gradient for each; None for an op that takes no gradients.
        indices: The numbers by which messages name them, if not 0, 1, ...

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    if grads is not None and len(grads) != len(params):
        raise ValueError(f"grads: expected {len(params)} tensors, one for each of params, got {len(grads)}")
    for i, param in enumerate(params):
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
        if grads is None:
            continue
        grad = grads[i]
        dense_tensor(grad, grad_where)
        _like(grad, grad_where, param, where)
        if grad.dtype != param.dtype:
            raise ValueError(f"{grad_where}: expected {_name(param.dtype)} like {where}, got {_name(grad.dtype)}")


# What the tensors of a list are, by the argument's name; those not named here are "state": of their parameter's shape
# and layout, in one of its STATE_DTYPES. "exact": the same in the dtype of the arithmetic. "row": one element of that
# dtype for each slice of the parameter along dim 0. "one": one element of that dtype. "count": one float32 element.
KINDS = {
    "params": "param",
    "grads": "grad",
    "slow_buffers": "exact",
    "row_exp_avg_sqs": "row",
    "scales": "one",
    "mu_products": "count",
    "steps": "count",
}


def kind(name: str) -> str:
    """What the tensors of a list are: see `KINDS`."""
    return KINDS.get(name, "state")


def template(kind: str, param: Tensor, state_dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor of some kind beside a parameter.

    Args:
        kind: One of those of `KINDS`.
        param: The parameter.
        state_dtype: For "state".
    """
    shape = tuple(param.shape)
    exact = torch.float64 if param.dtype == torch.float64 else torch.float32
    if kind in ("one", "count"):
        return (), exact if kind == "one" else torch.float32
    if kind == "row":
        return shape[:1] + (1,) * (len(shape) - 1), exact
    return shape, {"state": state_dtype, "exact": exact}.get(kind, param.dtype)


def elementwise(
    lists: Mapping[str, list[Tensor]], optional: Sequence[str] = (), indices: Sequence[int] | None = None
) -> dict[str, list[Tensor]]:
    """Checks the lists of a multi-tensor elementwise op.

    Args:
        lists: `params` first, then the others by argument name: see `KINDS`.
        optional: Names of the lists that may be empty.
        indices: The numbers by which messages name the tensors, if not 0, 1, ...

    Returns:
        The lists, with each gradient whose memory layout differs from its parameter's replaced by a copy in that layout
        (the gradient itself is never touched).

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    params = lists["params"]
    parameters(params, lists.get("grads"), indices)
    for name, tensors in lists.items():
        if len(tensors) != len(params) and (len(tensors) or name not in optional):
            raise ValueError(f"{name}: expected {len(params)} tensors, one for each of params, got {len(tensors)}")
    present = [(name, tensors) for name, tensors in lists.items() if tensors and name not in ("params", "grads")]
    model: tuple[str, torch.dtype] | None = None
    for i, param in enumerate(params):
        index = indices[i] if indices else i
        for name, tensors in present:
            state, where = tensors[i], f"{name}[{index}]"
            if kind(name) not in ("state", "exact"):
                _few(state, where, kind(name), param)
                continue
            dense_tensor(state, where)
            _like(state, where, param, f"params[{index}]")
            if layout(state) != layout(param):
                raise ValueError(
                    f"{where}: expected strides {tuple(param.stride())} like params[{index}], got "
                    f"{tuple(state.stride())}"
                )
            exact = template("exact", param, param.dtype)[1]
            dtypes = (exact,) if kind(name) == "exact" else STATE_DTYPES[param.dtype]
            if state.dtype not in dtypes:
                allowed = " or ".join(map(_name, dtypes))
                raise ValueError(
                    f"{where}: expected {allowed} for {_name(param.dtype)} params, got {_name(state.dtype)}"
                )
            if kind(name) == "state":
                model = model or (where, state.dtype)
                if state.dtype != model[1]:
                    raise ValueError(f"{where}: expected {_name(model[1])} like {model[0]}, got {_name(state.dtype)}")
    if "grads" not in lists:
        return dict(lists)
    grads = [
        g if layout(g) == layout(p) and not g._is_zerotensor() else _relaid(g, p)
        for p, g in zip(params, lists["grads"], strict=True)
    ]
    return {**lists, "grads": grads}


def _few(value: object, where: str, kind: str, param: Tensor) -> None:
    """Checks a tensor that has one element, or one for each row of its parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a torch.Tensor, got {type(value).__name__}")
    shape, dtype = template(kind, param, param.dtype)
    count = math.prod(shape)
    if value.dtype != dtype or value.numel() != count or value.device != param.device or not value.is_contiguous():
        wanted = f"one {_name(dtype)} element" if count == 1 else f"{count} contiguous {_name(dtype)} elements"
        raise ValueError(
            f"{where}: expected {wanted} on {param.device}, got shape {_shape(value)}, {_name(value.dtype)} on "
            f"{value.device}"
        )


def _relaid(tensor: Tensor, model: Tensor) -> Tensor:
    return torch.empty_strided(model.shape, model.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# Hyper-parameters that have an upper bound, and whether they may reach it.
_BOUNDED = {"beta1": False, "beta2": False, "beta": False, "alpha": True, "mu_decay": True}


def number(name: str, value: float | Tensor, interval: bool = True) -> None:
    """Raises unless a hyper-parameter is a number in its interval, or a tensor of one element, which is not read.

    Args:
        name: Its name.
        value: The hyper-parameter.
        interval: Whether it has to be in its interval.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: expected a number or a tensor of one float32 or float64 element, got shape {_shape(value)}, "
                f"{_name(value.dtype)}"
            )
    elif isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"{name}: expected a number or a one-element tensor, got {type(value).__name__}")
    elif not interval:
        return
    elif name not in _BOUNDED:
        if not value >= 0.0:
            raise ValueError(f"{name}: expected a value in [0, inf), got {value}")
    elif not (0.0 <= value < 1.0 or (value == 1.0 and _BOUNDED[name])):
        raise ValueError(f"{name}: expected a value in [0, 1{']' if _BOUNDED[name] else ')'}, got {value}")


def option(name: str, value: object, kind: str) -> None:
    """Raises unless an option that is "bool" is True or False, and one that is "int" a whole number of at least 1."""
    if kind == "bool" and not isinstance(value, (bool, int)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def backend(value: object) -> None:
    """Raises unless a back end is a name or None; which names are known is said where it is chosen."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend: expected one of {', '.join(_backend.BACKENDS)}, or None, got {value!r}")


def scalar_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raises when a one-element tensor is where the kernel cannot read it.

    Hyper-parameters may be in host memory (they are read at the call); flags that the GPU computes may not.
    """
    if value.device == device or (value.device.type == "cpu" and name not in ("grad_scale", "found_inf")):
        return
    raise ValueError(f"{name}: expected a tensor on {device} like the parameters, got {value.device}")
