"""Moving averages of Kronecker factors in Triton, on the samples of each shape together.

X^T X is formed by half, of a transposed copy of the samples with the ones behind them. Torch unfolds patches of images
before, which takes as many times their memory as a kernel has elements. A cross factor is a block of the product of
both samples side by side, at twice the flops. No step waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import unfold

from ._common import load, read_scalar, scalar, store
from ._products import symmetric_product

# Elements of a program that updates.
_CHUNK = 1024


@triton.jit(do_not_specialize=["scalars"])
def average_kernel(factors_ptr, moments_ptr, info_ptr, scalars, numel, chunks, CHUNK: tl.constexpr):
    """A chunk of decay factor + scale moment, in place, of a matrix whose info is zero."""
    program = tl.program_id(0)
    batch = (program // chunks).to(tl.int64)
    offsets = program % chunks * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < numel
    WIDE: tl.constexpr = moments_ptr.dtype.element_ty
    decay, scale = read_scalar(scalars[0]).to(WIDE), read_scalar(scalars[1]).to(WIDE)
    before = load(factors_ptr + batch * numel, offsets, mask, WIDE)
    added = scale * load(moments_ptr + batch * numel, offsets, mask, WIDE)
    # Not a product with zero: whatever stood there.
    after = tl.where(decay == 0.0, added, decay * before + added)
    keeps = tl.load(info_ptr + batch) != 0
    store(factors_ptr + batch * numel, offsets, tl.where(keeps, before, after), mask)


def _transposed(samples: list[Tensor], patch: list[int], has_ones: bool, dtype: torch.dtype) -> Tensor:
    """Samples of one shape as columns, (batch, features, samples), with a row of ones below.

    Zeros follow up to a multiple of 16 samples, so that rows are aligned.
    """
    first = samples[0]
    if patch:
        kernel, stride, padding, dilation = (tuple(patch[k : k + 2]) for k in range(0, 8, 2))
        columns = [unfold(x.to(dtype), kernel, dilation, padding, stride).movedim(0, 1).flatten(1) for x in samples]
    else:
        columns = [x.mT for x in samples]
    features, count = columns[0].shape
    result = first.new_empty(len(samples), features + has_ones, triton.cdiv(count, 16) * 16, dtype=dtype)
    torch._foreach_copy_(list(result[:, :features, :count].unbind()), columns)
    result[:, features:, :count] = 1
    result[:, :, count:] = 0
    return result


def kron_factor_(
    factors: list[Tensor],
    inputs: list[Tensor],
    others: list[Tensor],
    traces: Tensor,
    info: Tensor,
    workspace: Tensor,
    *,
    decay: float,
    scale: list[float],
    has_ones: bool,
    patches: list[list[int]],
    dtype: torch.dtype,
) -> None:
    """About ten launches for each shape of samples; see `fastcurv.ops.kron_factor_` for the arguments."""
    batches: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(inputs):
        key = (x.shape, others[i].shape if others else None, scale[i], *patches[i])
        batches.setdefault(key, []).append(i)
    found, sums = list(info.unbind()), list(traces.unbind())
    for members in batches.values():
        patch, i = patches[members[0]], members[0]
        x = _transposed([inputs[k] for k in members], patch, has_ones, dtype)
        rows = x.shape[1]
        if others:
            x = torch.cat([x, _transposed([others[k] for k in members], patch, has_ones, dtype)], dim=1)
        moments = symmetric_product(x, x) if x.shape[1] else x.new_empty(len(x), 0, 0)
        if others:
            moments = moments[:, :rows, rows:].contiguous()
        averages = factors[i][None] if len(members) == 1 else torch.stack([factors[k] for k in members])
        # Elements beside the diagonal may exceed it by rounding.
        largest = moments.flatten(1) if others else moments.diagonal(dim1=1, dim2=2)
        finite = (2 * scale[i] * largest).to(averages.dtype).isfinite().all(dim=1)
        failed = torch.where(finite, 0, -2).int()
        chunks = triton.cdiv(moments[0].numel(), _CHUNK)
        if chunks:
            average_kernel[(len(members) * chunks,)](
                averages, moments, failed, (scalar(decay), scalar(scale[i])), moments[0].numel(), chunks, CHUNK=_CHUNK
            )
        if len(members) > 1:
            torch._foreach_copy_([factors[k] for k in members], list(averages.unbind()))
        trace = averages.diagonal(dim1=1, dim2=2).sum(dim=1, dtype=torch.float64)
        for k, one, of_each in zip(members, failed.unbind(), trace.unbind(), strict=True):
            found[k], sums[k] = one, of_each
    # One launch each, and no index that would have to travel to the device.
    torch.stack(found, out=info)
    torch.stack(sums, out=traces)
    if others:
        traces.zero_()
