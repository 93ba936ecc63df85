"""The op `kron_inverse`: the damped inverse of each factor of a list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcurv import _alloc, _backend, _check, _library
from fastcurv.ops import _kron, _matrices
from fastcurv.ops.kron_eigh import Eigen, check_method
from fastcurv.ops.kron_root import kron_root

METHODS = ("cholesky", "newton", "eigh")

# On a GPU, larger matrices are done by torch's calls, which are near their peak there (not yet measured on a GPU).
VENDOR = 576


def kron_inverse(
    factors: Sequence[Tensor] | Eigen,
    damping: float | Tensor = 0.0,
    *,
    previous: Sequence[Tensor] | None = None,
    method: str = "cholesky",
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Inverts M + damping I for each symmetric positive definite M of a list.

    What is computed for a matrix depends on its size and dtype only: not on the rest of the list, nor on the number of
    threads. Results are symmetric to the bit. A NaN never comes out: a matrix that is not positive definite gets 1e-6
    times the mean of its diagonal on top of the damping, then ten times and a hundred times that; if nothing helps, its
    previous inverse, or zeros, and the others of the list are done all the same.

    Args:
        factors: Square matrices (n, n) of any sizes, of one dtype (float32 or float64) and device. Read only, and of
            what is read to invert them only what is on and below the diagonal; or what `kron_eigh` made of them, with
            `method="eigh"`.
        damping: What is added to the diagonals: a number, or a float32 or float64 tensor on the device of the factors,
            with one element or one for each factor. It is read where it is: a GPU is not waited for.
        previous: Inverses that take the place of those that cannot be had; None: zeros.
        method: "cholesky"; "newton": products alone, from the previous inverse where that is near; or "eigh": by
            eigenvalues, which `kron_eigh` keeps for other dampings. The last two are `kron_root` with p = 1.
        backend: `cuda`, `cpp`, `reference`, or None for the best that can run.

    Returns:
        The inverses, contiguous, like `factors`; and int32 elements on their device, one for each: 0, or how many tries
        with jitter it took (1 to 3), -1 where none helped, -2 where the damped factor holds NaN or infinity.

    Raises:
        TypeError, ValueError: Before anything is computed, naming argument and index.

    Source: Martens (2016), sections 6.4.2 and 6.6.3 (equation 6.7); spec kfac 3 and 7.2. Bientinesi, Gunter and van de
    Geijn (2008): factor, its inverse and their product in one sweep.

    Cost: n^3 flops and 8 n^2 bytes for each float32 matrix.

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_inverse
        >>> (inverse,), info = kron_inverse([torch.tensor([[3.0, 2.0], [2.0, 4.0]])], damping=1.0)
        >>> 16 * inverse, info
        (tensor([[ 5., -2.],
                [-2.,  4.]]), tensor([0], dtype=torch.int32))
    """
    _check.backend(backend)
    check_method(factors, method, METHODS)
    if method != "cholesky" or isinstance(factors, Eigen):
        return kron_root(factors, damping, 1, previous=previous, method=method, backend=backend)
    factors = _kron.listed(factors)
    if _library.must_dispatch([f for f in factors[:1] if isinstance(f, Tensor)]):
        values = _kron.dampings(damping, factors)
        before = [] if previous is None else _kron.listed(previous, "previous")
        return _dispatch(factors, values, before, backend=backend)
    matrices = _kron.factors(factors)
    before = [] if previous is None else _kron.factors(previous, "previous", like=matrices)
    return _inverted(matrices, _kron.dampings(damping, matrices), before, backend)


def _inverted(
    factors: list[Tensor], damping: Tensor, previous: list[Tensor], backend: str | None
) -> tuple[list[Tensor], Tensor]:
    inverses = _kron.results(factors)
    info = _alloc.empty(len(factors), dtype=torch.int32, device=damping.device)
    if not factors:
        return inverses, info
    name, implementation = _backend.choose("kron_inverse", factors[0].device, backend)
    info.fill_(1)
    with torch.no_grad():
        if name == "cuda":
            _by_vendor(factors, inverses, info, damping)
        implementation(factors, inverses, previous, info, damping)
    return inverses, info


def _by_vendor(factors: list[Tensor], inverses: list[Tensor], info: Tensor, damping: Tensor) -> None:
    """Inverts large matrices by torch's calls, in batches; what they cannot do is left to the kernel."""
    for indices in _kron.by_size(factors, at_least=VENDOR + 1):
        batch = torch.stack([factors[i] for i in indices])
        numbers = _matrices.numbers(tuple(indices), batch.device)
        batch.diagonal(dim1=1, dim2=2).add_(damping.index_select(0, numbers)[:, None])
        finite = batch.isfinite().all(dim=2).all(dim=1)
        lower, failed = torch.linalg.cholesky_ex(batch)
        batch = torch.cholesky_inverse(lower).tril_()
        batch += batch.tril(-1).mT
        good = finite & (failed == 0) & batch.isfinite().all(dim=2).all(dim=1)
        info.index_copy_(0, numbers, (~good).to(torch.int32))
        for i, inverse in zip(indices, batch, strict=True):
            inverses[i].copy_(inverse)


def _registered(
    factors: list[Tensor], damping: Tensor, previous: list[Tensor], *, backend: str | None = None
) -> tuple[list[Tensor], Tensor]:
    matrices = _kron.factors(factors)
    before = _kron.factors(previous, "previous", like=matrices) if previous else []
    return _inverted(matrices, _kron.dampings(damping, matrices), before, backend)


_dispatch = _library.register(
    "kron_inverse(Tensor[] factors, Tensor damping, Tensor[] previous, *, str? backend=None) -> (Tensor[], Tensor)",
    _registered,
    lambda factors, damping, previous, *, backend=None: _kron.fake(factors, damping),
)
