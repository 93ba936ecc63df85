"""The op `kron_apply`: gradients times the inverses of Kronecker products, and the inner products step sizes need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastcurv import _alloc, _backend, _check, _library
from fastcurv.ops import _kron, _matrices
from fastcurv.ops._stein import Stein

# On a GPU, larger layers are done by torch's products, which are near their peak there (not yet measured on a GPU).
VENDOR = 576
# The side of the tiles of the CUDA kernel, which leaves two sums of each.
TILE = 64


def kron_apply(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor] | Sequence[Stein],
    rights: Sequence[Tensor] | None = None,
    *,
    inputs: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Computes U = G^-1 V A^-1 for each layer of a list, <V, U> and the square of the norm of U.

    Three forms, one for all layers of a call:

    - `kron_apply(grads, lefts, rights)`: U = L V R. L and R need not be symmetric.
    - `kron_apply(grads, lefts, rights, inputs=inputs)`: V is the mean over m samples of outer products of what `grads`
      and `inputs` hold in their rows, g^T a / m, and is never formed: U = (L g^T)(a R) / m. It pays where m < d.
    - `kron_apply(grads, steins)`: U = (A kron B + sign C kron D)^-1 V, by what `fastcurv.ops.stein` makes of those.

    What is computed for a layer depends on its shapes and dtype only: not on the rest of the list, nor on the number of
    threads. A NaN never comes out: a layer whose update or products are not finite gets zeros, and the others of the
    list are done all the same.

    Args:
        grads: The gradient V of each layer, (d, a), of one dtype (float32 or float64) and device; with `inputs`, the
            gradients of its outputs, (m, d), one row for each sample.
        lefts: The inverse of the factor of each layer's outputs, (d, d), of the dtype and device of `grads`; or a
            `Stein` for each layer.
        rights: The inverse of the factor of each layer's inputs, (a, a). Not given with `Stein`s.
        inputs: The inputs of each layer, (m, a).
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Returns:
        The updates, contiguous, (d, a); float64 (n, 2) on their device, <V, U> and <U, U> of each layer, summed in
        float64 in a fixed order; and int32 elements, one for each: 0, or -2 where a gradient, a factor or what comes of
        them is not finite, and update and products are zero.

    Raises:
        TypeError, ValueError: Before anything is computed, naming argument and index.

    Source: Martens (2016), sections 6.4.2 and 6.8, and appendix B.2; spec kfac 3, 5 and 11.

    Cost: 2 d a (d + a) flops and 4 (2 d a + d^2 + a^2) bytes for each float32 layer, and twice as many flops with a
    `Stein`. With `inputs` 2 m (d^2 + a^2 + d a) flops for the update, and 2 m^2 (d + a) for <V, U>, the sum of the
    entries of g L g^T times those of a R^T a^T, over m^2.

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_apply
        >>> left, right = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([1.0, 0.5, 2.0]))
        >>> (update,), products, info = kron_apply([torch.ones(2, 3)], [left], [right])
        >>> update
        tensor([[1.0000, 0.5000, 2.0000],
                [2.0000, 1.0000, 4.0000]])
        >>> products, info
        (tensor([[10.5000, 26.2500]], dtype=torch.float64), tensor([0], dtype=torch.int32))
    """
    _check.backend(backend)
    layers = _read(grads, lefts, rights, inputs)
    if _library.must_dispatch([g for g in layers.grads if isinstance(g, Tensor)]):
        # torch.ops has no types.
        return _dispatch(*layers, backend=backend)
    return _applied(_checked(layers), backend)


class _Layers(NamedTuple):
    """The arguments of the implementations that are read; all but the first three may be empty."""

    grads: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    inputs: list[Tensor]
    left_values: list[Tensor]
    right_values: list[Tensor]

    def some(self, indices: Sequence[int]) -> _Layers:
        return _Layers(*([tensors[i] for i in indices] if tensors else [] for tensors in self))

    def shape(self, i: int) -> tuple[int, int]:
        """Of the update."""
        return self.lefts[i].shape[0], self.rights[i].shape[0]


def _read(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor] | Sequence[Stein],
    rights: Sequence[Tensor] | None,
    inputs: Sequence[Tensor] | None,
) -> _Layers:
    for name, tensors in (("grads", grads), ("lefts", lefts), ("rights", rights), ("inputs", inputs)):
        if isinstance(tensors, (Tensor, Stein)):
            raise TypeError(f"{name}: expected a list, got one {type(tensors).__name__}; for one layer, give [it]")
        if not isinstance(tensors, Sequence) and (tensors is not None or name in ("grads", "lefts")):
            raise TypeError(f"{name}: expected a list, got {type(tensors).__name__}")
    if any(isinstance(left, Stein) for left in lefts) or (rights is None and not len(lefts)):
        if rights is not None or inputs is not None:
            raise ValueError("lefts: expected tensors where rights or inputs are given, got Steins")
        for i, left in enumerate(lefts):
            if not isinstance(left, Stein):
                raise TypeError(f"lefts[{i}]: expected a Stein like the others, got {type(left).__name__}")
        columns = [[stein[k] for stein in lefts] for k in range(4)]
        return _Layers(list(grads), columns[0], columns[1], [], columns[2], columns[3])
    if rights is None:
        raise ValueError("rights: expected as many tensors as lefts, got None; only a list of Steins comes without")
    if inputs is not None and not len(inputs) and len(grads):
        raise ValueError(f"inputs: expected {len(grads)} tensors, one for each of grads, got 0")
    # There are no Steins among lefts.
    return _Layers(list(grads), list(lefts), list(rights), list(inputs or []), [], [])  # type: ignore[arg-type]


def _checked(layers: _Layers) -> _Layers:
    """The same, contiguous.

    Raises:
        TypeError, ValueError: Naming argument and index, what was expected and what was found.
    """
    count = len(layers.grads)
    for name, tensors in zip(_Layers._fields, layers, strict=True):
        if len(tensors) != count and (tensors or name in ("lefts", "rights")):
            raise ValueError(f"{name}: expected {count} tensors, one for each of grads, got {len(tensors)}")
    if not all(_is_usable(layers, i) for i in range(count)):
        _explain(layers)
    return _Layers(*([tensor.resolve_neg().contiguous() for tensor in tensors] for tensors in layers))


def _expected(layers: _Layers, i: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors of a layer, in the order of the lists."""
    rows, columns = layers.grads[i].shape
    d, a = (columns, layers.inputs[i].shape[-1]) if layers.inputs else (rows, columns)
    return (rows, columns), (d, d), (a, a), (rows, a), (d,), (a,)


def _is_usable(layers: _Layers, i: int) -> bool:
    """Whether there is nothing to say of a layer: what most are, for a tenth of what messages cost."""
    first = layers.grads[0]
    tensors = [of_all[i] for of_all in layers if of_all]
    if any(type(t) not in (Tensor, Parameter) or t.layout is not torch.strided or t.dim() == 0 for t in tensors):
        return False
    if first.dtype not in _kron.DTYPES or tensors[0].dim() != 2 or (layers.inputs and len(tensors[0]) == 0):
        return False
    shapes = [shape for of_all, shape in zip(layers, _expected(layers, i), strict=True) if of_all]
    return all(
        t.shape == shape and t.dtype == first.dtype and t.device == first.device
        for t, shape in zip(tensors, shapes, strict=True)
    )


def _explain(layers: _Layers) -> None:
    """Raises for the first tensor that is not what it should be."""
    for name, tensors in zip(_Layers._fields, layers, strict=True):
        for i, tensor in enumerate(tensors):
            _check.dense_tensor(tensor, f"{name}[{i}]")
            first, dim = layers.grads[0], 1 if name.endswith("values") else 2
            if tensor.dtype not in _kron.DTYPES:
                raise ValueError(f"{name}[{i}]: expected float32 or float64, got {tensor.dtype}")
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"{name}[{i}]: expected {first.dtype} on {first.device} like grads[0], got {tensor.dtype} on "
                    f"{tensor.device}; one call takes one dtype and device"
                )
            if tensor.dim() != dim:
                raise ValueError(f"{name}[{i}]: expected {dim} dimensions, got shape {tuple(tensor.shape)}")
    for i, grad in enumerate(layers.grads):
        if layers.inputs and len(grad) == 0:
            raise ValueError(f"grads[{i}]: expected a row for each of one or more samples, got {tuple(grad.shape)}")
        for name, tensors, shape in zip(_Layers._fields, layers, _expected(layers, i), strict=True):
            if tensors and tuple(tensors[i].shape) != shape:
                raise ValueError(
                    f"{name}[{i}]: expected shape {shape} for grads[{i}] of shape {tuple(grad.shape)}, got "
                    f"{tuple(tensors[i].shape)}"
                )


def _outputs(layers: _Layers, empty: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    count, device = len(layers.grads), layers.grads[0].device if layers.grads else None
    updates = [empty(*layers.shape(i), dtype=g.dtype, device=device) for i, g in enumerate(layers.grads)]
    products = empty(count, 2, dtype=torch.float64, device=device)
    return updates, products, empty(count, dtype=torch.int32, device=device)


def _applied(layers: _Layers, backend: str | None) -> tuple[list[Tensor], Tensor, Tensor]:
    updates, products, info = _outputs(layers, _alloc.empty)
    if not layers.grads:
        return updates, products, info
    device = info.device
    name, implementation = _backend.choose("kron_apply", device, backend)
    # TF32, where torch may use it, holds three digits: no update.
    by_torch = name == "cuda" and torch.backends.cuda.matmul.fp32_precision != "tf32"
    is_large = [by_torch and max(layers.shape(i)) > VENDOR for i in range(len(updates))]
    small, large = (tuple(i for i, found in enumerate(is_large) if found is wanted) for wanted in (False, True))
    with torch.no_grad():
        if large:
            _, reference = _backend.choose("kron_apply", device, "reference")
            _run(reference, layers, large, updates, products, info, 0)
        if small:
            words = 0 if name in ("triton", "cpp", "reference") else _words(layers.some(small))
            _run(implementation, layers, small, updates, products, info, words)
    return updates, products, info


def _run(
    implementation: Any,
    layers: _Layers,
    indices: tuple[int, ...],
    updates: list[Tensor],
    products: Tensor,
    info: Tensor,
    words: int,
) -> None:
    """Lets an implementation do some of the layers, with so many doubles of workspace."""
    workspace = _alloc.empty(words, dtype=torch.float64, device=info.device)
    if len(indices) == len(updates):
        implementation(*layers, updates, products, info, workspace)
        return
    some_products = _alloc.empty(len(indices), 2, dtype=products.dtype, device=info.device)
    some_info = _alloc.empty(len(indices), dtype=info.dtype, device=info.device)
    implementation(*layers.some(indices), [updates[i] for i in indices], some_products, some_info, workspace)
    numbers = _matrices.numbers(indices, info.device)
    products.index_copy_(0, numbers, some_products)
    info.index_copy_(0, numbers, some_info)


def _words(layers: _Layers) -> int:
    """Doubles that the CUDA kernel needs for what lies between its products, and for two sums of each tile."""
    words = 0
    for i, grad in enumerate(layers.grads):
        (d, a), samples = layers.shape(i), len(grad)
        between, summed = [d * a] * (2 if layers.left_values else 1), [(d, a)]
        if layers.inputs:
            between, summed = [samples * d, samples * a, samples * samples], [(d, a), (samples, samples)]
        words += sum(-(-elements * grad.element_size() // 8) for elements in between)
        words += sum(2 * -(-rows // TILE) * -(-columns // TILE) for rows, columns in summed)
    return words


def _registered(*layers: list[Tensor], backend: str | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    return _applied(_checked(_Layers(*layers)), backend)


def _fake(*layers: list[Tensor], backend: str | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    return _outputs(_Layers(*layers), torch.empty)


_dispatch = _library.register(
    "kron_apply(Tensor[] grads, Tensor[] lefts, Tensor[] rights, Tensor[] inputs, Tensor[] left_values, "
    "Tensor[] right_values, *, str? backend=None) -> (Tensor[], Tensor, Tensor)",
    _registered,
    _fake,
)
