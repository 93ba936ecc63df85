"""The op `orthogonalize`: each matrix of a list by the nearest orthonormal one, or by another of that kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastcurv import _alloc, _backend, _check, _library
from fastcurv.ops import _matrices
from fastcurv.ops.gram_schmidt import gram_schmidt
from fastcurv.ops.newton_schulz import COEFFICIENTS, Coefficients, newton_schulz
from fastcurv.ops.polar import polar

METHODS = ("polar", "gram_schmidt", "newton_schulz")
RANK_POLICIES = ("isometry", "complete")
WORKING_DTYPES = (torch.float32, torch.bfloat16)

# What completes an orthonormal set is sought this often: a direction may lie too close to what is there already.
_ROUNDS = 3


def orthogonalize(
    matrices: Sequence[Tensor],
    *,
    method: str = "polar",
    rank_policy: str = "isometry",
    coefficients: str | Coefficients = "muon",
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    eps: float = 0.0,
    info: Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Orthogonalises each matrix of a list.

    A tensor of more than two dimensions counts as the matrix of its slices along dim 0, flattened: a row is a filter.
    Where there are more rows than columns it is the columns that become orthonormal.

    Args:
        matrices: n tensors of two or more dimensions, of one dtype (float32, float64, bfloat16, float16) and device, in
            any layout. Read only.
        method: `polar`: the nearest matrix with orthonormal rows, U V^T of the singular value decomposition.
            `gram_schmidt`: rows one after another, each less its projection on those before; it depends on their order.
            `newton_schulz`: steps of a polynomial iteration towards the polar factor, which stop short of it.
        rank_policy: What becomes of singular values, or of rows, that count as zero. `isometry`: they stay zero.
            `complete`: they are replaced, by directions that depend on nothing but the matrix, so that all rows or
            columns are orthonormal. Not for newton_schulz.
        coefficients: Of newton_schulz: `muon`, `polar_express`, `cubic`, or a list of (a, b, c), one for each step, the
            last again where there are more.
        steps: Of newton_schulz; None: 5, or as many as the list has coefficients.
        dtype: The least precise dtype that newton_schulz may form products in, torch.float32 or torch.bfloat16; a back
            end may do better. Float32 products are those that `torch.set_float32_matmul_precision` allows, TF32 too;
            the other methods do not depend on it.
        eps: Of newton_schulz: a norm below it is taken for it, so that what is that small fades and is not scaled up.
        info: n int32 elements on the device of the matrices; written: how many singular values (polar) or rows
            (gram_schmidt) counted as zero, or -2 for a matrix with NaN or infinity, whose result is zero.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Returns:
        n tensors of the shapes, dtypes and layouts of `matrices`.

    Raises:
        TypeError, ValueError: Before anything is computed, naming argument and index.

    Singular values count as zero up to sqrt(max(m, n)) 2^-24 times the largest, rows up to sqrt(max(m, n, 64)) 2^-24
    times what they were before the projection; 2^-53 for float64 matrices. float32 and smaller dtypes are computed in
    float64 where that is what makes the polar factor exact to float32 for condition numbers up to 1e5.

    Source: Tuddenham (2026), section 5.3.1, equations 5.5 to 5.7; spec osgd 2.7 (polar). Giraud et al. (2005)
    (gram_schmidt). Jordan et al. (2024), Amsel et al. (2025) (newton_schulz).

    Cost for m rows and n >= m columns: polar m^2 n flops for the Gram matrix, about 9 m^3 for its eigenvectors, 2 m^2 n
    for the product; gram_schmidt 4 m^2 n; newton_schulz 3 m^2 n + m^3 for each step. 8 m n bytes in float32.

    Example:
        >>> import torch
        >>> from fastcurv.ops import orthogonalize
        >>> (q,) = orthogonalize([torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.5]])])
        >>> q
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if rank_policy not in RANK_POLICIES:
        raise ValueError(f"rank_policy: expected one of {', '.join(RANK_POLICIES)}, got {rank_policy!r}")
    if method == "newton_schulz" and rank_policy == "complete":
        raise ValueError(
            "rank_policy: expected 'isometry' with method='newton_schulz', whose steps leave what is zero at zero"
        )
    if dtype not in WORKING_DTYPES:
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype!r}")
    if backend not in (None, *_backend.BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(_backend.BACKENDS)}, or None, got {backend!r}")
    _check.number("eps", eps)
    schedule = _schedule(coefficients, steps)
    matrices = _check.tensors(matrices, "matrices", "for one matrix, give [matrix]")
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrices[{i}]: expected a torch.Tensor, got {type(matrix).__name__}")
    _matrices.check_info(matrices, info)
    if _library.must_dispatch(matrices):
        flat = [number for step in schedule for number in step]
        results, found = _dispatch(
            matrices, method=method, rank_policy=rank_policy, coefficients=flat, dtype=dtype, eps=eps, backend=backend
        )
        if info is not None:
            info.copy_(found)
        return results
    _matrices.check(matrices)
    return _orthogonalize(matrices, method, rank_policy, schedule, dtype, eps, info, backend) if matrices else []


def _registered(
    matrices: list[Tensor],
    *,
    method: str,
    rank_policy: str,
    coefficients: list[float],
    dtype: torch.dtype,
    eps: float = 0.0,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    schedule = [(a, b, c) for a, b, c in zip(*[iter(coefficients)] * 3, strict=True)]
    info = _new_info(matrices)
    _matrices.check(matrices)
    return _orthogonalize(matrices, method, rank_policy, schedule, dtype, eps, info, backend) if matrices else [], info


def _new_info(matrices: list[Tensor]) -> Tensor:
    return _alloc.empty(len(matrices), dtype=torch.int32, device=matrices[0].device if matrices else None)


_dispatch = _library.register(
    "orthogonalize(Tensor[] matrices, *, str method, str rank_policy, float[] coefficients, ScalarType dtype, "
    "float eps=0.0, str? backend=None) -> (Tensor[], Tensor)",
    _registered,
    lambda matrices, **_: ([torch.empty_like(matrix) for matrix in matrices], _new_info(matrices)),
)


def _schedule(coefficients: str | Coefficients, steps: int | None) -> Coefficients:
    """The coefficients of each step."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = ", ".join(COEFFICIENTS)
            raise ValueError(f"coefficients: expected one of {known}, or a list of (a, b, c), got {coefficients!r}")
        listed, wanted = COEFFICIENTS[coefficients], 5 if steps is None else steps
    else:
        try:
            listed = [(float(a), float(b), float(c)) for a, b, c in coefficients]
        except (TypeError, ValueError):
            listed = []
        if not listed or not all(math.isfinite(number) for step in listed for number in step):
            known = ", ".join(COEFFICIENTS)
            raise ValueError(f"coefficients: expected one of {known}, or a list of (a, b, c), got {coefficients!r}")
        wanted = len(listed) if steps is None else steps
    _check.option("steps", wanted, "int")
    return [listed[min(k, len(listed) - 1)] for k in range(wanted)]


@torch.no_grad()
def _orthogonalize(
    matrices: list[Tensor],
    method: str,
    rank_policy: str,
    schedule: Coefficients,
    dtype: torch.dtype,
    eps: float,
    info: Tensor | None,
    backend: str | None,
) -> list[Tensor]:
    info = _new_info(matrices) if info is None else info
    op: _matrices.Work = partial(polar if method == "polar" else gram_schmidt, backend=backend)

    def completed(ins: list[Tensor], outs: list[Tensor], found: Tensor) -> None:
        op(ins, outs, found)
        for number in range(_ROUNDS):
            _complete(op, outs, found, number)

    # Columns that are done one after another have an order.
    work, in_order = op, method == "gram_schmidt"
    if method == "newton_schulz":
        work = partial(newton_schulz, coefficients=schedule, dtype=dtype, eps=eps, backend=backend)
    elif rank_policy == "complete":
        # What 16-bit numbers hold is not orthogonal enough to tell what it lacks.
        work, in_order = partial(_matrices.widened, completed), True
    # What autocast makes of products is for the model.
    with torch.autocast(info.device.type, enabled=False):
        return _matrices.mapped(matrices, work, info, in_order)


def _complete(op: _matrices.Work, outs: list[Tensor], info: Tensor, number: int) -> None:
    """Adds to each O the same op's result for (1 - O O^T) D (1 - O^T O), which is orthogonal to it on both sides.

    D is a matrix of numbers without pattern; where there is nothing to add, what is left of it is rounding. What is
    added comes from float32, which has a clear idea of what is zero, and is made exact afterwards.
    """
    # On the CPU it is known which have anything to add; asking a GPU would make the host wait.
    chosen = [i for i in range(len(outs)) if outs[i].device.type != "cpu" or _lacks(outs[i], info[i])]
    seeds = []
    for i in chosen:
        o = _matrices.wide(outs[i]).double()
        count = torch.arange(1, o.numel() + 1, dtype=torch.float64, device=o.device).view(o.shape)
        seed = torch.frac(torch.sin(count * (12.9898 + number)) * 43758.5453)
        seed = _beside(seed, o)
        lengths = torch.linalg.vector_norm(seed, dim=1, keepdim=True)
        # Rounding is no direction; and a matrix that is not finite stays zero.
        seed = torch.where((info[i] < 0) | (lengths < 1e-9 * o.shape[1] ** 0.5), 0.0, seed).float()
        seeds.append(seed if seed.shape == outs[i].shape else seed.mT.contiguous())
    if not seeds:
        return
    added = [_alloc.empty_like(seed) for seed in seeds]
    op(seeds, added, _alloc.empty(len(seeds), dtype=torch.int32, device=info.device))
    for i, found in zip(chosen, added, strict=True):
        o, more = _matrices.wide(outs[i]), _matrices.wide(found).double()
        more = _beside(more, o.double())
        for _ in range(2):  # from nearly orthonormal to rounding
            more = 1.5 * more - 0.5 * (more @ more.mT) @ more
        o += more.to(o.dtype)


def _beside(x: Tensor, o: Tensor) -> Tensor:
    """What is left of X without the rows and columns that O spans."""
    for _ in range(2):  # what O lacks of being orthonormal is left once, but not twice
        x = x - (o @ o.mT) @ x
        x = x - (x @ o.mT) @ o
    return x


def _lacks(out: Tensor, info: Tensor) -> bool:
    """Whether an orthonormal set on the CPU is short of some."""
    return info.item() > 0 and round(out.double().square().sum().item()) < min(out.shape)
