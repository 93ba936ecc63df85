"""The op `kron_factor_`: moving averages of the second moments of samples."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastcurv import _alloc, _backend, _check, _library
from fastcurv.ops import _kron, _matrices

# Kernels count the sides of padded images in 32 bits, and samples in 64.
_MOST = 2**31 - 1
_Pair = int | tuple[int, ...] | list[int]


class Patches(NamedTuple):
    """What a convolution sees of images (images, channels, height, width): a row for each position of its kernel.

    Attributes:
        kernel_size: Height and width, or one number for both; so for the others.
        stride: Of the kernel.
        padding: With zeros; or, as in `torch.nn.Conv2d`, "valid" for none, or "same" for as many positions as the
            images have, with stride 1.
        dilation: Of the kernel.
    """

    kernel_size: _Pair
    stride: _Pair = 1
    padding: _Pair | str = 0
    dilation: _Pair = 1

    def numbers(self, where: str = "patches") -> list[int]:
        """All eight; for "same" the padding that both sides get.

        Args:
            where: What messages call it.

        Raises:
            TypeError, ValueError: Naming the field.
        """
        kernel, stride, dilation = (
            _two(f"{where}.{name}", getattr(self, name), 1) for name in ("kernel_size", "stride", "dilation")
        )
        if self._is_same():
            if stride != [1, 1]:
                raise ValueError(f"{where}.padding: expected numbers with stride {self.stride!r}, got 'same'")
            padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
        else:
            is_valid = isinstance(self.padding, str) and self.padding == "valid"
            padding = _two(f"{where}.padding", 0 if is_valid else self.padding, 0, "'same', 'valid', ")
        return [*kernel, *stride, *padding, *dilation]

    def _is_same(self) -> bool:
        return isinstance(self.padding, str) and self.padding == "same"

    def beyond(self) -> tuple[int, int]:
        """Rows below, and columns on the right, that "same" adds where the two sides cannot have the same."""
        if not self._is_same():
            return 0, 0
        kh, kw, _, _, _, _, dh, dw = self.numbers()
        return dh * (kh - 1) % 2, dw * (kw - 1) % 2


def _two(where: str, value: Any, least: int, otherwise: str = "") -> list[int]:
    """Two whole numbers, given as a pair or as one for both."""
    given = list(value) if isinstance(value, (tuple, list)) else [value, value]
    try:
        numbers = [operator.index(n) for n in given if not isinstance(n, bool)]
        error: type[Exception] | None = None if len(numbers) == len(given) else TypeError
    except TypeError:
        numbers, error = [], ValueError if isinstance(value, str) and otherwise else TypeError
    if error or len(numbers) != 2 or min(numbers) < least:
        pair = f"a whole number of at least {least}, or two of them (height, width)"
        raise (error or ValueError)(f"{where}: expected {otherwise}{pair}, got {value!r}")
    if max(numbers) > _MOST:
        raise ValueError(f"{where}: expected at most {_MOST}, got {value!r}")
    return numbers


def kron_factor_(
    factors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    decay: float = 0.0,
    *,
    has_ones: bool = False,
    patches: Sequence[Patches | None] | None = None,
    others: Sequence[Tensor] | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Updates Kronecker factors: M becomes decay M + (1 - decay) X^T X / N for each of a list.

    Args:
        factors: Matrices (d, d), contiguous, float32, or float64 for float64 samples. Written; symmetric afterwards, to
            the bit. With `decay` 0 it does not matter what stood there.
        inputs: Samples X: tensors (..., d) of which all dimensions but the last count samples, N in all; with
            `patches`, images. Of one dtype (float32, float64, bfloat16, float16) and device. Read only.
        decay: What is kept of the factors, in [0, 1].
        has_ones: Whether each sample has a one behind it, the homogeneous coordinate that stands for the bias; d then
            counts it, the samples do not hold it.
        patches: For each input None, or what a convolution sees of it; d is then channels times kernel height times
            kernel width, in the order of the convolution's weight.
        others: Samples Y for cross factors X^T Y (d, e), which are not symmetric; None: Y is X.
        scale: What takes the place of 1 / N.
        dtype: Of sums, torch.float32 or torch.float64.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Returns:
        The traces of what the factors have become, float64, one for each (0 for cross factors), and int32 elements: 0,
        or -2 where samples held NaN or infinity, sums of their squares come near the largest number of the dtype
        (within a factor of 256), or a `scale` makes the factor larger than that number; the factor is what it was.

    Raises:
        TypeError, ValueError: Before anything is written, naming argument and index.

    Source: Martens (2016), sections 6.3 and 6.5 (decay min(1 - 1/k, 0.95)), 6.4.3 (cross factors); spec kfac 2, 4 and
    6. Grosse and Martens (2016) for convolutions.

    Cost: N d^2 flops (half a product's), and 4 N d + 8 d^2 bytes for float32.

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_factor_
        >>> factor, x = torch.zeros(3, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> traces, info = kron_factor_([factor], [x], has_ones=True)
        >>> factor, traces
        (tensor([[ 5.,  7.,  2.],
                [ 7., 10.,  3.],
                [ 2.,  3.,  1.]]), tensor([16.], dtype=torch.float64))
    """
    if dtype not in _kron.DTYPES:
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype!r}")
    _check.option("has_ones", has_ones, "bool")
    _check.number("decay", decay)
    if isinstance(decay, Tensor) or decay > 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay!r}")
    if scale is not None:
        _check.number("scale", scale)
    _check.backend(backend)
    inputs = _check.tensors(inputs, "inputs", "for one factor, give [samples]")
    given = _listed(patches, len(inputs))
    seen = [patch.numbers(f"patches[{i}]") if patch else [] for i, patch in enumerate(given)]
    xs = _samples(inputs, "inputs", given, seen)
    ys = _samples(others, "others", given, seen, like=xs) if others is not None else []
    matrices = _written(factors, xs, ys, seen, has_ones)
    counts = [_rows(x, patch, i) for i, (x, patch) in enumerate(zip(xs, seen, strict=True))]
    for i, (y, patch) in enumerate(zip(ys, seen, strict=False)):
        if _rows(y, patch, i) != counts[i]:
            raise ValueError(f"others[{i}]: expected {counts[i]} samples like inputs[{i}], got {_rows(y, patch, i)}")
    scales = [(1.0 - decay) * (1.0 / n if scale is None else scale) for n in counts]
    wide = torch.float64 if xs and xs[0].dtype == torch.float64 else dtype
    flat = [number for patch in seen for number in patch or [0] * 8]
    run = _dispatch if _library.must_dispatch(xs) else _updated
    return run(
        matrices, xs, ys, decay=decay, scale=scales, has_ones=has_ones, patches=flat, dtype=wide, backend=backend
    )


def _listed(patches: object, count: int) -> list[Patches | None]:
    """Checks that there are patches, or None, for each of the inputs."""
    if patches is None:
        return [None] * count
    expected = "patches: expected a list with a Patches or None for each of inputs, got"
    if isinstance(patches, Patches):
        raise TypeError(f"{expected} one Patches; for one input, give [patches]")
    if isinstance(patches, (str, dict)) or not isinstance(patches, Iterable):
        raise TypeError(f"{expected} {type(patches).__name__}")
    given = list(patches)
    for i, patch in enumerate(given):
        if patch is not None and not isinstance(patch, Patches):
            raise TypeError(f"patches[{i}]: expected a fastcurv.ops.Patches or None, got {patch!r}")
    if len(given) != count:
        raise ValueError(f"patches: expected {count} entries, one for each of inputs, got {len(given)}")
    return given


def _samples(
    tensors: Sequence[Tensor],
    name: str,
    patches: list[Patches | None],
    numbers: list[list[int]],
    like: list[Tensor] | None = None,
) -> list[Tensor]:
    """Checks samples, and makes matrices of them, or contiguous images."""
    tensors = _check.tensors(tensors, name, "for one factor, give [samples]")
    if len(tensors) != len(patches):
        raise ValueError(f"{name}: expected {len(patches)} tensors, one for each of inputs, got {len(tensors)}")
    found: list[Tensor] = []
    for i, (tensor, patch, eight) in enumerate(zip(tensors, patches, numbers, strict=True)):
        where = f"{name}[{i}]"
        _check.dense_tensor(tensor, where)
        model, model_name = (like[0], "inputs") if like else (tensors[0], name)
        if tensor.dtype != model.dtype or tensor.device != model.device:
            raise ValueError(
                f"{where}: expected {model.dtype} on {model.device} like {model_name}[0], got {tensor.dtype} on "
                f"{tensor.device}; one call takes one dtype and device"
            )
        if tensor.dim() != 4 if patch else tensor.dim() < 1:
            wanted = (
                "four dimensions (images, channels, height, width) with patches" if patch else "one dimension or more"
            )
            raise ValueError(f"{where}: expected {wanted}, got shape {tuple(tensor.shape)}")
        if patch:
            samples = tensor.detach()
            below, right = patch.beyond()
            if below or right:
                samples = pad(samples, (0, right, 0, below))
        else:
            samples = tensor.detach().reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        if _rows(samples, eight, i) < 1:
            raise ValueError(f"{where}: expected one sample or more, got shape {tuple(tensor.shape)}")
        found.append(samples.resolve_neg().contiguous())
    return found


def _rows(samples: Tensor, patch: list[int], index: int) -> int:
    if not patch:
        return len(samples)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (patch[k : k + 2] for k in range(0, 8, 2))
    height, width = samples.shape[2] + 2 * ph, samples.shape[3] + 2 * pw
    down, across = height - dh * (kh - 1) - 1, width - dw * (kw - 1) - 1
    if min(down, across) < 0:
        raise ValueError(
            f"patches[{index}]: expected a kernel that fits into padded images of {height} x {width}, got kernel_size "
            f"{(kh, kw)} with dilation {(dh, dw)}"
        )
    count = len(samples) * (down // sh + 1) * (across // sw + 1)
    if max(height, width) > _MOST or count >= 2**63:
        raise ValueError(
            f"patches[{index}].padding: expected padded images of at most {_MOST} rows and columns, and fewer than "
            f"2**63 samples, got {height} x {width} and {count}"
        )
    return count


def _written(
    factors: Sequence[Tensor], xs: list[Tensor], ys: list[Tensor], patches: list[list[int]], has_ones: bool
) -> list[Tensor]:
    """Checks what is written."""
    factors = _check.tensors(factors, "factors", "for one factor, give [factor]")
    if len(factors) != len(xs) or len(ys) not in (0, len(xs)):
        raise ValueError(f"factors: expected {len(xs)} tensors, one for each of inputs, got {len(factors)}")
    for i, (factor, x, patch) in enumerate(zip(factors, xs, patches, strict=True)):
        where = f"factors[{i}]"
        _check.dense_tensor(factor, where)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = tuple(_columns(samples, patch) + has_ones for samples in (x, ys[i] if ys else x))
        if factor.dtype != wide or factor.device != x.device:
            raise ValueError(
                f"{where}: expected {wide} on {x.device} for {x.dtype} inputs, got {factor.dtype} on {factor.device}"
            )
        # What is being compiled has no negative bit to ask for.
        is_negative = not torch.compiler.is_compiling() and factor.is_neg()
        if tuple(factor.shape) != shape or not factor.is_contiguous() or is_negative:
            raise ValueError(
                f"{where}: expected a contiguous matrix of shape {shape}, got shape {tuple(factor.shape)} with strides "
                f"{tuple(factor.stride())}"
            )
    return factors


def _columns(samples: Tensor, patch: list[int]) -> int:
    return samples.shape[1] * patch[0] * patch[1] if patch else samples.shape[1]


def _updated(
    factors: list[Tensor],
    inputs: list[Tensor],
    others: list[Tensor],
    *,
    decay: float,
    scale: list[float],
    has_ones: bool,
    patches: list[int],
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    traces, info = _results(factors)
    if not factors:
        return traces, info
    _check_memory(factors)
    name, implementation = _backend.choose("kron_factor", factors[0].device, backend)
    info.zero_()
    run = functools.partial(
        implementation, decay=decay, scale=scale, has_ones=has_ones, dtype=dtype,
        patches=[patches[k : k + 8] if patches[k] else [] for k in range(0, len(patches), 8)],
    )  # fmt: skip
    workspace = _alloc.empty(0, dtype=dtype, device=info.device)
    if name == "cuda":
        sized = functools.partial(_backend.native().kron_factor_workspace, **run.keywords)
        elements = sized(factors, inputs, others, traces, info, workspace)
        workspace = _alloc.empty(elements, dtype=dtype, device=info.device)
    # An average of two finite numbers is finite; the sum that a scale of the caller's makes of them may not be.
    samples = zip(scale, inputs, run.keywords["patches"], strict=True)
    weights = (s * _rows(x, patch, i) for i, (s, x, patch) in enumerate(samples))
    is_average = decay == 0.0 or all(weight <= 1.0001 * (1.0 - decay) for weight in weights)
    torch.autograd.graph.increment_version(factors)
    with torch.no_grad():
        kept = [] if is_average else [factor.clone() for factor in factors]
        run(factors, inputs, others, traces, info, workspace)
        if kept:
            _put_back(factors, kept, traces, info, is_symmetric=not others)
    return traces, info


def _put_back(factors: list[Tensor], kept: list[Tensor], traces: Tensor, info: Tensor, *, is_symmetric: bool) -> None:
    """Gives factors that are no longer finite what they were before, and says so in `info`; waits for no GPU."""
    for i, (factor, before) in enumerate(zip(factors, kept, strict=True)):
        is_held = factor.isfinite().all()
        factor.copy_(torch.where(is_held, factor, before))
        info[i] = torch.where(is_held, info[i], _matrices.NOT_FINITE)
        if is_symmetric:
            traces[i] = torch.where(is_held, traces[i], before.diagonal().sum(dtype=torch.float64))


def _check_memory(factors: list[Tensor]) -> None:
    """Raises where two factors overlap: both are written."""
    pieces = sorted((f.data_ptr(), f.numel() * f.element_size(), i) for i, f in enumerate(factors) if f.numel())
    for (begin, size, i), (address, _, j) in itertools.pairwise(pieces):
        if begin + size > address:
            raise ValueError(f"factors[{max(i, j)}]: expected memory of its own, but it overlaps factors[{min(i, j)}]")


def _results(factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    device = factors[0].device if factors else None
    traces = _alloc.empty(len(factors), dtype=torch.float64, device=device)
    return traces, _alloc.empty(len(factors), dtype=torch.int32, device=device)


_dispatch = _library.register(
    "kron_factor_(Tensor(a!)[] factors, Tensor[] inputs, Tensor[] others, *, float decay, float[] scale, "
    "bool has_ones, int[] patches, ScalarType dtype, str? backend=None) -> (Tensor, Tensor)",
    _updated,
    lambda factors, *_, **__: _results(factors),
)
