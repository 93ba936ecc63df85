"""Eigendecompositions of Kronecker factors, from which any damping and any power follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcurv import _alloc, _library
from fastcurv.ops import _kron, _matrices
from fastcurv.ops.kron_factor import kron_factor_

# Which torch's stub forgets.
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
NOT_DEFINITE = -1
TRIES = 4


class Eigen(NamedTuple):
    """What `kron_eigh` returns.

    Attributes:
        values: Of each factor its eigenvalues (n,), ascending.
        vectors: Likewise eigenvectors (n, n), in columns.
        info: int32, on the device: 0, -1 where the iteration did not converge or an eigenvalue is beyond the dtype, -2
            where the factor holds NaN or infinity.
    """

    values: list[Tensor]
    vectors: list[Tensor]
    info: Tensor


def kron_eigh(factors: Sequence[Tensor]) -> Eigen:
    """Eigenvalues and eigenvectors of each symmetric matrix of a list.

    It is torch.linalg's, in float64: in float32 small eigenvalues would have no correct digit. On the CPU small
    matrices have a thread each; on a GPU those of one size are one call, which waits for the GPU.

    Args:
        factors: Square matrices (n, n) of one dtype (float32 or float64) and device, of which what is on and below the
            diagonal is read.

    Returns:
        Values, vectors and info, to be given to `kron_inverse` or `kron_root` with `method="eigh"`.

    Raises:
        TypeError, ValueError: Naming argument and index.

    Source: Martens (2016), section 6.6.3: one decomposition serves every damping; spec kfac 7.2.

    Cost: about 9 n^3 flops, at a low rate.

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_eigh, kron_inverse
        >>> eigen = kron_eigh([torch.diag(torch.tensor([3.0, 1.0]))])
        >>> kron_inverse(eigen, damping=1.0, method="eigh")[0][0].diagonal()
        tensor([0.2500, 0.5000])
    """
    factors = _kron.listed(factors)
    must_dispatch = _library.must_dispatch([f for f in factors[:1] if isinstance(f, Tensor)])
    outs, info = (_dispatch if must_dispatch else _decomposed)(factors)
    return Eigen([out[0] for out in outs], [out[1:] for out in outs], info)


def _empty(factors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """For each factor its values in the first row, its vectors below; and info."""
    info = _alloc.empty(len(factors), dtype=torch.int32, device=factors[0].device if factors else None)
    return [_alloc.empty(len(m) + 1, len(m), dtype=m.dtype, device=m.device) for m in factors], info


def _decomposed(factors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    matrices = _kron.factors(factors)
    outs, info = _empty(matrices)
    with torch.no_grad():
        if info.device.type == "cpu" and matrices:
            _matrices.each(_decompose, matrices, outs, info)
        else:
            _decompose_batches(matrices, outs, info)
    return outs, info


def _decompose(matrix: Tensor, out: Tensor) -> int:
    try:
        if not bool(matrix.isfinite().all()):
            out.zero_()
            return _matrices.NOT_FINITE
        values, vectors = torch.linalg.eigh(matrix.double())
    except LinAlgError:
        out.zero_()
        return NOT_DEFINITE
    out[0], out[1:] = values, vectors
    return 0 if bool(out[0].isfinite().all()) else NOT_DEFINITE


def _decompose_batches(matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None:
    for indices in _kron.by_size(matrices):
        batch = torch.stack([matrices[i] for i in indices]).double()
        finite = batch.isfinite().all(dim=2).all(dim=1)
        try:
            values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], batch, 0.0))
        except LinAlgError:  # of one of them
            for i in indices:
                info[i] = _decompose(matrices[i], outs[i])
            continue
        numbers = _matrices.numbers(tuple(indices), batch.device)
        held = torch.where(values.to(outs[indices[0]].dtype).isfinite().all(dim=1), 0, NOT_DEFINITE)
        info.index_copy_(0, numbers, torch.where(finite, held, _matrices.NOT_FINITE).int())
        for i, value, vector in zip(indices, values, vectors, strict=True):
            outs[i][0], outs[i][1:] = value, vector


def check_method(factors: Sequence[Tensor] | Eigen, method: str, known: Sequence[str]) -> None:
    """Raises ValueError unless a method is one of those known, and "eigh" for a decomposition."""
    if method not in known:
        raise ValueError(f"method: expected one of {', '.join(known)}, got {method!r}")
    if isinstance(factors, Eigen) and method != "eigh":
        raise ValueError(f"method: expected 'eigh' with factors that are an Eigen, got {method!r}")


def root_of(
    eigen: Eigen, damping: Tensor, previous: list[Tensor], p: int, backend: str | None, scale: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """(M + damping I)^(-1/p) from a decomposition of M, with the policies of `kron_inverse`.

    It is S S^T with S = Q (values + damping)^(-1/(2 p)): symmetric to the bit, by half a product. What fails has no S,
    and `kron_factor_` leaves it as it was. `scale`: what M and the damping were multiplied by.
    """
    values, vectors, found = eigen
    roots = [v.clone() for v in previous] if previous else [torch.zeros_like(v) for v in vectors]
    full = [i for i, value in enumerate(values) if len(value)]
    info = torch.zeros_like(found)
    if not full:
        return roots, info
    numbers = _matrices.numbers(tuple(full), found.device)
    found, damping = found.index_select(0, numbers), damping.index_select(0, numbers)
    least, most = (torch.stack([end(values[i]) for i in full]) for end in (Tensor.amin, Tensor.amax))
    by = _matrices.unit(torch.maximum(least.abs(), most.abs()))  # or a sum may overflow
    mean = torch.stack([(values[i] * unit).mean() for i, unit in zip(full, by, strict=True)]).double() / by
    least = least.double()
    jitters = torch.tensor(
        [0.0, *(10.0 ** (tries - 7) for tries in range(1, TRIES))], dtype=torch.float64, device=mean.device
    )
    shifts = damping[:, None] + mean[:, None] * jitters
    finite = damping.to(vectors[0].dtype).isfinite()
    positive = (least[:, None] + shifts > 0) & (finite & (found == 0))[:, None]
    tries = positive.int().argmax(dim=1)
    shift = torch.where(positive.any(dim=1), shifts.gather(1, tries[:, None])[:, 0], torch.nan)
    dtype = vectors[0].dtype
    factor = torch.ones_like(shift) if scale is None else scale.index_select(0, numbers).pow(1 / p)
    # Sums are scaled by what their largest can be: of very large ones `kron_factor_` takes none.
    largest = ((least + shift).pow(-1 / p) * factor).clamp(max=torch.finfo(dtype).max)
    units = _matrices.unit(largest.to(dtype), part=0.75).double()
    halves = [
        (vectors[i] * ((values[i].double() + s) ** (-0.5 / p) * f.sqrt()).to(dtype)).mT.contiguous()
        for i, s, f in zip(full, shift, factor * units, strict=True)
    ]
    _, failed = kron_factor_([roots[i] for i in full], halves, scale=1.0, dtype=dtype, backend=backend)
    # On the CPU it is known which were scaled; asking a GPU would make the host wait.
    is_known = units.device.type == "cpu" and not _library.must_dispatch([units])
    for k in [k for k, u in enumerate(units.tolist()) if u != 1.0] if is_known else range(len(full)):
        root, kept = roots[full[k]], previous[full[k]] if previous else torch.zeros_like(roots[full[k]])
        result = torch.where(failed[k] == 0, root / units[k].to(dtype), torch.nan)
        is_held = result.isfinite().all()
        root.copy_(torch.where(is_held, result, kept))
        failed[k] = torch.where(is_held, failed[k], _matrices.NOT_FINITE)
    result = torch.where(failed == 0, tries, torch.where(finite, NOT_DEFINITE, _matrices.NOT_FINITE))
    result = torch.where(found < 0, found, result)
    return roots, info.index_copy(0, numbers, result.int())


_dispatch = _library.register("kron_eigh(Tensor[] factors) -> (Tensor[], Tensor)", _decomposed, _empty)
