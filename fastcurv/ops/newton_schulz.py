"""The op `newton_schulz`: Newton-Schulz steps on each matrix of a list."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastcurv import _backend
from fastcurv.ops._matrices import NOT_FINITE, in_groups, symmetric_product, wide

# Up to this many rows (or columns, if fewer) a matrix is done by a thread of its own, in its cache.
SMALL = 128
# From this ratio of its sides on a matrix is worth more passes over its Gram matrix and fewer over itself.
TOGETHER = 1.5
# Elements of a float64 matrix up to this have squares whose sum is finite.
MUCH = 2.0**480

Coefficients = list[tuple[float, float, float]]

# Of the steps, by name; a list that is shorter than the number of steps goes on with its last.
COEFFICIENTS: dict[str, Coefficients] = {
    # Jordan et al. (2024), Muon: fast at the start, then singular values stay within about [0.7, 1.2].
    "muon": [(3.4445, -4.7750, 2.0315)],
    # Amsel et al. (2025), Polar Express, Algorithm 1: each the best for what the one before leaves.
    "polar_express": [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ],
    # Kovarik (1970), Bjorck and Bowie (1971): slow at the start, quadratic at the end.
    "cubic": [(1.5, -0.5, 0.0)],
}


def newton_schulz(
    matrices: list[Tensor],
    outs: list[Tensor],
    info: Tensor,
    *,
    coefficients: Coefficients,
    dtype: torch.dtype,
    spectral: int = 0,
    eps: float = 0.0,
    backend: str | None,
) -> None:
    """Chooses and runs an implementation; see `fastcurv.ops.orthogonalize`.

    Args:
        matrices: Contiguous matrices of one dtype and device, none of them empty.
        outs: Written: what the steps make of them.
        info: Written: an int32 element for each, 0 or -2.
        coefficients: Those of each step.
        dtype: The least that products may be formed in.
        spectral: 0, or a length: matrices are first divided by their largest singular value and by the root of their
            longer side over this length, and not by their norm; `info` then counts singular values that became zero.
        eps: A norm below it is taken for it, unless `spectral`.
        backend: A back end by name, or None for the best that can run.
    """
    name, implementation = _backend.choose("newton_schulz", matrices[0].device, backend)
    options = {"coefficients": coefficients, "dtype": dtype, "spectral": spectral, "eps": eps}
    run = functools.partial(implementation, **options)
    if matrices[0].dtype == torch.float64:  # its squares may be beyond it
        peaks = [matrix.abs().amax().clamp(min=torch.finfo(matrix.dtype).tiny) for matrix in matrices]
        # With eps, a matrix whose norm may count as eps stays as it is.
        divisors = peaks if eps == 0.0 else [(peak / MUCH).clamp(min=1.0) for peak in peaks]
        matrices = [matrix / divisor for matrix, divisor in zip(matrices, divisors, strict=True)]
    if name in ("reference", "triton"):
        run(matrices, outs, info)
        return
    batched = functools.partial(_batched, coefficients, dtype, spectral, eps)
    groups: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        # Small kernels work on the Gram matrix in double, which has float64's small singular values only by half.
        is_small = min(matrix.shape) <= SMALL and matrix.dtype != torch.float64
        # On a CPU products gain nothing by batches, and lose their place in the cache.
        key = None if is_small else (matrix.shape, i if name == "cpp" else 0)
        groups.setdefault(key, []).append(i)
    in_groups(
        {tuple(indices): run if key is None else batched for key, indices in groups.items()}, matrices, outs, info
    )


def _batched(
    coefficients: Coefficients,
    dtype: torch.dtype,
    spectral: int,
    eps: float,
    matrices: list[Tensor],
    outs: list[Tensor],
    info: Tensor,
) -> None:
    x = wide(matrices[0][None] if len(matrices) == 1 else torch.stack(matrices))
    steps = _in_gram_space(x, coefficients, spectral) if spectral else _by_products(x, coefficients, dtype, eps)
    results, found = steps
    info.copy_(found)
    for out, result in zip(outs, results, strict=True):
        wide(out).copy_(result)


def _by_products(x: Tensor, coefficients: Coefficients, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """The steps on a batch in torch's products, of which the symmetric ones are formed by half.

    Args:
        x: (b, m, n) with m <= n, in any layout.
        coefficients: Those of each step.
        dtype: The least that products may be formed in; on a CPU bfloat16 is slower than float32.
        eps: A norm below it is taken for it.

    Returns:
        The results, (b, m, n), and `info`.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64)
    finite = norms.isfinite()
    scales = torch.where(finite & (norms > 0), 1 / norms.clamp(min=eps), 0.0)
    # In two factors: one alone may be beyond float32.
    first = scales.clamp(2.0**-100, 2.0**100)
    x = torch.where(finite, x * first.to(exact), 0.0)
    x *= torch.where(scales > 0, scales / first, 0.0).to(exact)
    if x.device.type != "cpu" and exact == torch.float32:
        x = x.to(dtype)
    # The last two steps go over the matrix together, as P2 P1 with both in terms of its Gram matrix. Longer chains of
    # rounded Gram matrices lose small singular values.
    together = 2 if x.dtype == exact and x.shape[2] >= TOGETHER * x.shape[1] and len(coefficients) > 1 else 0
    for a, b, c in coefficients[: len(coefficients) - together]:
        x = _apply(_polynomial(symmetric_product(x, x), b, c), x, a)
    if together:
        (a, b, c), (d, e, f) = coefficients[-2:]
        gram = symmetric_product(x, x)
        first = _polynomial(gram, b, c, a)
        last = _polynomial(symmetric_product(first @ gram, first), e, f, d)
        x = _apply(symmetric_product(last, first), x)
    return x, torch.where(finite.flatten(), 0, NOT_FINITE).int()


def _polynomial(gram: Tensor, b: float, c: float, a: float = 0.0) -> Tensor:
    """A + b R + c R^2."""
    result = symmetric_product(gram, gram, gram, alpha=c, beta=b)
    if a:
        result.diagonal(dim1=1, dim2=2).add_(a)
    return result


def _apply(polynomial: Tensor, x: Tensor, a: float = 0.0) -> Tensor:
    """A X + P X, in the layout of X."""
    return torch.baddbmm(x, polynomial, x, beta=a, out=torch.empty_like(x))


def _in_gram_space(x: Tensor, coefficients: Coefficients, spectral: int) -> tuple[Tensor, Tensor]:
    """The algorithm of csrc/cpu/newton_schulz.cpp, spectral, on a batch in torch's products; nothing waits for a GPU.

    Args:
        x: (b, m, n) with m <= n.
        coefficients: Those of each step.
        spectral: See `newton_schulz`.

    Returns:
        The results, (b, m, n), and `info`.
    """
    x = x.double()
    gram = symmetric_product(x, x)
    trace = _trace(gram)
    counts = trace.isfinite() & (trace > 0)
    gram = torch.where(counts, gram / trace, 0.0)
    power, log = gram, torch.zeros_like(trace)
    for exponent in (2, 4, 8, 16, 32, 64):
        power = symmetric_product(power, power)
        scale = torch.where(counts, _trace(power), 1.0)
        power, log = power / scale, log + scale.log() / exponent
    largest = log.exp() * (x.shape[2] / spectral)
    gram = gram / largest
    whole = torch.where(counts, (trace * largest).rsqrt(), 0.0) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for a, b, c in coefficients:
        step = _polynomial(gram, b, c, a)
        # All are polynomials of one matrix and commute, but for rounding: only what is symmetric even then may be
        # formed by half, or rounding grows from step to step.
        whole = step @ whole
        gram = symmetric_product(step @ gram, step)
    result = torch.where(trace.isfinite(), whole @ torch.where(trace.isfinite(), x, 0.0), 0.0)
    zero = x.shape[1] - result.square().sum(dim=(1, 2)).round()
    return result, torch.where(trace.isfinite().flatten(), zero, NOT_FINITE).int()


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
