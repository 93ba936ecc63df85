"""The op `kron_root`: the inverse p-th root of each damped factor of a list."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcurv import _alloc, _backend, _check, _library
from fastcurv.ops import _kron, _matrices
from fastcurv.ops.kron_eigh import NOT_DEFINITE, TRIES, Eigen, check_method, kron_eigh, root_of

METHODS = ("newton", "eigh")
# Larger matrices do not fit into the shared memory of a GPU's block; they are done by torch's products.
SMALL = 64
# Steps that the least eigenvalue that counts takes, which is rounding of the largest.
STEPS = {torch.float32: 36, torch.float64: 64}
# From a batch of damped matrices and p to the roots, and which of them converged.
Iterate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# Of Newton's iteration from an inverse that is near.
HOT_STEPS = 6


def kron_root(
    factors: Sequence[Tensor] | Eigen,
    damping: float | Tensor = 0.0,
    p: int = 4,
    *,
    previous: Sequence[Tensor] | None = None,
    method: str = "newton",
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Computes (M + damping I)^(-1/p) for each symmetric positive definite M of a list.

    Results are symmetric to the bit. A NaN never comes out: damping, jitter, `previous` and `info` are those of
    `kron_inverse`.

    Args:
        factors: As for `kron_inverse`; or what `kron_eigh` made of them, with `method="eigh"`.
        damping: As for `kron_inverse`.
        p: Of which root: 1 is the inverse, 2 or 4 what Shampoo wants.
        previous: Roots that take the place of those that cannot be had; None: zeros. With p = 1 and "newton" the
            iteration starts from them where they are definite and near: where ||I - M X|| < 1 (Frobenius norm).
        method: "newton": coupled Newton iteration, products alone; what is computed for a matrix depends on its size
            and dtype only (on a GPU up to 64 rows; above, and from a near inverse, products are torch's). "eigh": by
            eigenvalues, which `kron_eigh` keeps for any other damping and root.
        backend: `cuda`, `triton`, `cpp`, `reference`, or None for the best that can run.

    Returns:
        The roots, contiguous, like `factors`; and `info` as of `kron_inverse`.

    Raises:
        TypeError, ValueError: Before anything is computed, naming argument and index.

    Source: Guo and Higham (2006), coupled Newton iteration; Gupta et al. (2018), Shampoo: p = 4; spec first_order,
    Shampoo, and kfac 11: hot start and its convergence test.

    Cost: for k steps, about log2 of the condition number, k (2 + floor(log2 p)) n^3 flops (p a power of two).

    Example:
        >>> import torch
        >>> from fastcurv.ops import kron_root
        >>> (root,), info = kron_root([torch.diag(torch.tensor([15.0, 255.0]))], damping=1.0)
        >>> root.diagonal().mul(100).round(), info
        (tensor([50., 25.]), tensor([0], dtype=torch.int32))
    """
    _check.backend(backend)
    check_method(factors, method, METHODS)
    if not isinstance(p, int) or isinstance(p, bool) or p < 1:
        raise ValueError(f"p: expected a whole number, 1 or more, got {p!r}")
    if isinstance(factors, Eigen) or method == "eigh":
        return _by_eigh(factors, damping, previous, p, backend)
    factors = _kron.listed(factors)
    if _library.must_dispatch([f for f in factors[:1] if isinstance(f, Tensor)]):
        values = _kron.dampings(damping, factors)
        # torch.ops has no types.
        before = [] if previous is None else _kron.listed(previous, "previous")
        return _dispatch(factors, values, before, p, backend=backend)
    matrices = _kron.factors(factors)
    before = [] if previous is None else _kron.factors(previous, "previous", like=matrices)
    return _rooted(matrices, _kron.dampings(damping, matrices), before, p, backend)


def _by_eigh(
    factors: Sequence[Tensor] | Eigen,
    damping: float | Tensor,
    previous: Sequence[Tensor] | None,
    p: int,
    backend: str | None,
) -> tuple[list[Tensor], Tensor]:
    if isinstance(factors, Eigen):
        values = _kron.dampings(damping, factors.vectors)
        before = [] if previous is None else _kron.factors(previous, "previous", like=factors.vectors)
        with torch.no_grad():
            return root_of(factors, values, before, p, backend)
    must_dispatch = _library.must_dispatch([f for f in factors[:1] if isinstance(f, Tensor)])
    matrices = list(factors) if must_dispatch else _kron.factors(factors)
    values = _kron.dampings(damping, matrices)
    before = [] if previous is None else _kron.factors(previous, "previous", like=matrices)
    full = [i for i, matrix in enumerate(matrices) if len(matrix)]
    with torch.no_grad():
        scale = torch.ones_like(values)
        if full:
            numbers = _matrices.numbers(tuple(full), values.device)
            peaks = torch.stack([_peak(matrices[i], values[i]) for i in full])
            # Scaled, or eigenvalues may be beyond the dtype that keeps them.
            units = _matrices.unit(peaks, part=0.75)
            scale = scale.index_copy(0, numbers, units.double())
            # A factor that is not finite with its damping has no root.
            values = values.index_copy(0, numbers, torch.where(peaks.isfinite(), values[numbers] * units, torch.inf))
        eigen = kron_eigh([matrix * s.to(matrix.dtype) for matrix, s in zip(matrices, scale, strict=True)])
        return root_of(eigen, values, before, p, backend, scale)


def _peak(matrix: Tensor, damping: Tensor) -> Tensor:
    """The largest magnitude in a matrix, also with what is added to its diagonal."""
    damped = matrix.diagonal() + damping.to(matrix.dtype)
    return torch.maximum(matrix.abs().amax(), damped.abs().amax())


def _rooted(
    factors: list[Tensor], damping: Tensor, previous: list[Tensor], p: int, backend: str | None
) -> tuple[list[Tensor], Tensor]:
    roots = _kron.results(factors)
    info = _alloc.empty(len(factors), dtype=torch.int32, device=damping.device)
    if not factors:
        return roots, info
    name, implementation = _backend.choose("kron_root", factors[0].device, backend)
    info.fill_(1)
    with torch.no_grad():
        if p == 1 and previous:
            # On a CPU batches would gain nothing, and change the bits.
            one_by_one = info.device.type == "cpu"
            for indices in [[i] for i in range(len(factors))] if one_by_one else _kron.by_size(factors, at_least=1):
                _hot_start(indices, factors, roots, previous, info, damping)
        if name not in ("cuda", "triton"):
            implementation(factors, roots, previous, info, damping, p)
            return roots, info
        # Triton's kernel takes matrices of any size, but leaves the jitter to this module.
        most, iterate = (SMALL, _coupled) if name == "cuda" else (0, functools.partial(_by_kernel, implementation))
        small = [i for i, factor in enumerate(factors) if len(factor) <= most]
        if small:
            numbers = _matrices.numbers(tuple(small), info.device)
            found = info.index_select(0, numbers)
            before = [previous[i] for i in small] if previous else []
            given, written = [factors[i] for i in small], [roots[i] for i in small]
            implementation(given, written, before, found, damping.index_select(0, numbers), p)
            info.index_copy_(0, numbers, found)
        for indices in _kron.by_size(factors, at_least=most + 1):
            _by_products(indices, factors, roots, previous, info, damping, p, iterate)
    return roots, info


def _stacked(indices: list[int], factors: list[Tensor]) -> Tensor:
    return _matrices.mirrored(torch.stack([factors[i] for i in indices]))


def _hot_start(
    indices: list[int],
    factors: list[Tensor],
    inverses: list[Tensor],
    previous: list[Tensor],
    info: Tensor,
    damping: Tensor,
) -> None:
    """Newton's iteration X (2 I - M X) from previous inverses of matrices of one size; 0 in `info` where it is done.

    It is done where the residual, taken in double, is as small as rounding of X makes it. In single precision a step
    would lose by rounding what it gains: of what is not exactly symmetric, half is not the inverse.
    """
    numbers = _matrices.numbers(tuple(indices), info.device)
    a = _stacked(indices, factors).double()
    a.diagonal(dim1=1, dim2=2).add_(damping.index_select(0, numbers)[:, None])
    x = _stacked(indices, previous)
    norms = torch.linalg.matrix_norm(a)
    unit = torch.finfo(x.dtype).eps / 2
    best, done = x, torch.zeros_like(norms, dtype=torch.bool)
    # Of matrices that are definite: what is near is then definite, too.
    is_near = torch.linalg.cholesky_ex(x).info == 0
    for step in range(HOT_STEPS):
        residual = -torch.bmm(a, x.double())
        residual.diagonal(dim1=1, dim2=2).add_(1.0)
        size = torch.linalg.matrix_norm(residual)
        is_near = is_near & (size < 1.0)
        is_good = size <= unit * len(a[0]) ** 0.5 * norms * torch.linalg.matrix_norm(x.double())
        best = torch.where((is_near & is_good & ~done)[:, None, None], x, best)
        done = done | (is_near & is_good)
        # A GPU is not asked.
        if step + 1 == HOT_STEPS or (a.device.type == "cpu" and bool((done | ~is_near).all())):
            break
        x = _matrices.mirrored((x + torch.bmm(x.double(), residual)).to(x.dtype))
    info.index_copy_(0, numbers, (~done).to(torch.int32))
    for i, inverse in zip(indices, best, strict=True):
        inverses[i].copy_(inverse)


def _by_products(
    indices: list[int],
    factors: list[Tensor],
    roots: list[Tensor],
    previous: list[Tensor],
    info: Tensor,
    damping: Tensor,
    p: int,
    iterate: Iterate,
) -> None:
    """The algorithm of the reference on matrices of one size; nothing waits for a GPU.

    How much jitter a matrix takes, Cholesky's decomposition says beforehand.
    """
    numbers = _matrices.numbers(tuple(indices), info.device)
    a = _stacked(indices, factors)
    finite = torch.stack([factors[i] for i in indices]).isfinite().all(dim=2).all(dim=1)
    shift = damping.index_select(0, numbers)
    finite &= (a.diagonal(dim1=1, dim2=2) + shift.to(a.dtype)[:, None]).isfinite().all(dim=1)
    a = torch.where(finite[:, None, None], a, 0.0)
    # Scaled, or the sum of a row may overflow, and a small root lose digits.
    scale = _matrices.unit(torch.maximum(a.abs().amax(dim=(1, 2)), shift.to(a.dtype)), part=0.75)
    a, shift = a * scale[:, None, None], shift * scale
    mean = a.diagonal(dim1=1, dim2=2).double().mean(dim=1)
    tries = torch.full_like(mean, NOT_DEFINITE, dtype=torch.int32)
    damped = a
    for k in reversed(range(TRIES)):
        trial = a.clone()
        trial.diagonal(dim1=1, dim2=2).add_((shift + (10.0 ** (k - 7) if k else 0.0) * mean)[:, None])
        good = torch.linalg.cholesky_ex(trial).info == 0
        damped = torch.where(good[:, None, None], trial, damped)
        tries = torch.where(good, k, tries)
    results, converged = iterate(damped, p)
    results = results * scale.double().pow(1 / p).to(results.dtype)[:, None, None]
    good = finite & (tries >= 0) & converged & results.isfinite().all(dim=2).all(dim=1)
    found = torch.where(good, tries, torch.where(finite, NOT_DEFINITE, _matrices.NOT_FINITE))
    done = info.index_select(0, numbers) == 0
    info.index_copy_(0, numbers, torch.where(done, 0, found).int())
    for k, i in enumerate(indices):
        instead = previous[i] if previous else torch.zeros_like(factors[i])
        roots[i].copy_(torch.where(done[k], roots[i], torch.where(good[k], results[k], instead)))


def _by_kernel(implementation: _backend.Implementation, a: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """What `_coupled` returns, by an implementation."""
    x, zero = _alloc.empty_like(a), torch.zeros(len(a), dtype=torch.float64, device=a.device)
    info = torch.ones(len(a), dtype=torch.int32, device=a.device)
    implementation(list(a.unbind()), list(x.unbind()), [], info, zero, p)
    return x, info == 0


def _coupled(matrices: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """A^(-1/p) of each matrix of a batch, by torch's products, and whether the iteration converged."""
    a = matrices.double() if torch.backends.cuda.matmul.fp32_precision == "tf32" else matrices
    one = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    norm = a.abs().sum(dim=2).amax(dim=1)
    z = torch.where(norm > 0, min(p + 1, 5) / (2 * norm), 0.0)[:, None, None]
    x, m = z ** (1 / p) * one, z * a
    done = torch.zeros_like(norm, dtype=torch.bool)
    for _ in range(STEPS[a.dtype]):
        error = (m - one).abs().amax(dim=(1, 2))
        t = torch.where(done[:, None, None], one, ((p + 1) * one - m) / p)
        x = _matrices.symmetric_product(x, t)
        # What is left is about the square of it.
        done = done | (error < torch.finfo(a.dtype).eps ** 0.5 / 2)
        # A GPU is not asked. The error grows only if an eigenvalue is below zero.
        if a.device.type == "cpu" and bool((done | ~(error <= p + 1)).all()):
            break
        power = p
        while power:
            if power & 1:
                m = _matrices.symmetric_product(t, m)
            power >>= 1
            if power:
                t = _matrices.symmetric_product(t, t)
    return x.to(matrices.dtype), done


def _registered(
    factors: list[Tensor], damping: Tensor, previous: list[Tensor], p: int, *, backend: str | None = None
) -> tuple[list[Tensor], Tensor]:
    matrices = _kron.factors(factors)
    before = _kron.factors(previous, "previous", like=matrices) if previous else []
    return _rooted(matrices, _kron.dampings(damping, matrices), before, p, backend)


_dispatch = _library.register(
    "kron_root(Tensor[] factors, Tensor damping, Tensor[] previous, int p, *, str? backend=None) -> (Tensor[], Tensor)",
    _registered,
    lambda factors, damping, previous, p, *, backend=None: _kron.fake(factors, damping),
)
