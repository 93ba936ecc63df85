"""What several references share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def gradient(grad: Tensor, param: Tensor, maximize: bool, grad_scale: Tensor | None) -> Tensor:
    """The gradient to descend along, in the dtype of the arithmetic."""
    g = grad.to(compute_dtype(param))
    if grad_scale is not None:
        g = g / grad_scale.to(g.dtype)
    return -g if maximize else g


def unit(x: Tensor, dim: int | None = None, part: float = 0.3) -> Tensor:
    """A power of two that brings the largest magnitude near one; 1 where its exponent is within a part of the range.

    Multiplying by a power of two is exact, so that the bits of a norm or mean stay what they were.

    Args:
        x: Float32 or float64.
        dim: Reduced, and kept; None: all.
        part: Of the dtype's exponents: below a half squares are safe.
    """
    most = math.log2(torch.finfo(x.dtype).max)
    if not x.numel():
        return x.new_ones(())
    peak = x.abs().amax(dim=() if dim is None else dim, keepdim=dim is not None).double()
    exponent = peak.log2().floor().clamp(2 - most, most - 2)
    return torch.where(peak.isfinite() & (exponent.abs() > part * most), exponent.neg().exp2(), 1.0).to(x.dtype)


def norm(x: Tensor, dim: int | None = None) -> Tensor:
    """The Euclidean norm, float64; no square overflows or vanishes."""
    scale = unit(x, dim)
    scaled: Tensor = torch.linalg.vector_norm(x * scale, dim=dim, keepdim=dim is not None)
    return scaled.double() / scale.double()


def mean(x: Tensor, dim: int | None = None) -> Tensor:
    """The mean; no sum overflows."""
    scale = unit(x, dim)
    return (x * scale).mean(dim=dim, keepdim=dim is not None) / scale


def times(factor: float, x: Tensor) -> Tensor:
    """A product with a factor that may be beyond the dtype."""
    limits = torch.finfo(x.dtype)
    is_held = limits.tiny <= factor <= limits.max
    return factor * x if is_held else (factor * x.double()).to(x.dtype)


def one_minus_power(beta: float, t: float) -> float:
    """1 - beta^t, without the cancellation where beta is close to 1."""
    return -math.expm1(t * math.log(beta)) if beta else 1.0


def rectification(beta2: float, t: float) -> tuple[float, float]:
    r"""Length :math:`\rho_t` of the approximated simple moving average, and RAdam's factor :math:`r_t`.

    :math:`\rho_\infty = 2 / (1 - \beta_2) - 1, \quad
    \rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t), \quad
    r_t^2 = \frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}{(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}`;
    the factor is 1 where that is not positive. Source: Liu et al. (2020), section 4; spec first_order 3.1 item 2.
    """
    rho_inf = 2 / (1 - beta2) - 1
    correction = one_minus_power(beta2, t)
    rho = rho_inf - 2 * t * (1 - correction) / correction
    if rho <= 4:
        return rho, 1.0
    return rho, ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5


def solve_damped(
    solve: Callable[[Tensor], Tensor | None],
    factors: list[Tensor],
    outs: list[Tensor],
    previous: list[Tensor],
    info: Tensor,
    damping: Tensor,
) -> None:
    r"""Solves with :math:`M + \lambda I` for every factor M whose `info` is not 0.

    Where that fails, :math:`\lambda` grows by :math:`10^{-6}` times the mean of the diagonal of M, then by ten and a
    hundred times that. `info` receives the number of these tries; -1 where all failed, or -2 where
    :math:`M + \lambda I` is not finite: the result is then the previous one, or zero if there is none.

    Args:
        solve: From a symmetric, finite matrix to its result, or None where there is none.
        factors: Square matrices, of which what is on and below the diagonal counts.
        outs: Written: the results.
        previous: One for each, or nothing.
        info: Written.
        damping: One for each.
    """
    for i, factor in enumerate(factors):
        if info[i] == 0:
            continue
        mean_diagonal = mean(factor.diagonal().double()).item()
        symmetric = factor.tril() + factor.tril(-1).mT
        info[i] = -1
        for tries in range(4):
            damped = symmetric.clone()
            damped.diagonal().add_(damping[i].item() + (10.0 ** (tries - 7) * mean_diagonal if tries else 0.0))
            if not (damped.isfinite().all() and factor.isfinite().all()):
                info[i] = -1 if tries else -2
                break
            result = solve(damped)
            if result is not None and result.isfinite().all():
                info[i] = tries
                outs[i].copy_(result)
                break
        if info[i] < 0:
            outs[i].copy_(previous[i] if previous else torch.zeros_like(factor))
