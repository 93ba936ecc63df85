"""Layers for the op `kron_apply`, and the float64 truth about them with bounds on the error."""

import pytest
import torch
from cases import DEVICE
from spectra import UNIT

from fastcurv import _backend, ops
from fastcurv.ops import Stein

BACKENDS = [name for name in ("cuda", "triton", "cpp") if not _backend.unusable("kron_apply", name, DEVICE)]
# The CUDA kernel in the host emulator.
BACKENDS += ["reference", *(["emulator"] if _backend.native() is not None and DEVICE.type == "cpu" else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FORMS = ("plain", "samples", "stein")


def kron_apply(grads, lefts, rights=None, *, backend=None, order="ascending", **options):
    """The op; in the emulator, where that is asked for."""
    if backend != "emulator":
        return ops.kron_apply(grads, lefts, rights, backend=backend, **options)
    from cuda_host import emulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "choose", lambda *_: ("emulator", emulator.emulated("kron_apply", order=order, seed=1)))
        return ops.kron_apply(grads, lefts, rights, **options)


class Problem:
    """Layers of one form, what is asked of the op, and its float64 answer with bounds on the error.

    A sum of n products, in any order, is off by at most n u times the sum of their absolute values (n - 1 additions, and
    a product each; Higham, 2002, section 3.1), if n u is small; products of such sums add up their n. Everything below
    has room for a few more roundings: scales, quotients, and what is stored.
    """

    def __init__(self, form, shapes, generator, dtype=torch.float32, samples=12, sign=1):
        self.form, self.dtype = form, dtype

        def random(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

        rows = [(samples, d) if form == "samples" else (d, a) for d, a in shapes]
        self.grads = [random(*shape) for shape in rows]
        self.lefts = [random(d, d, scale=d**-0.5) for d, _ in shapes]
        self.rights = [random(a, a, scale=a**-0.5) for _, a in shapes]
        self.inputs = [random(samples, a) for _, a in shapes] if form == "samples" else []
        self.values = [(random(d).abs(), random(a).abs()) for d, a in shapes] if form == "stein" else []
        if sign < 0:  # of all quotients at most 1 / (1 - 0.81)
            self.values = [(-0.9 * s2 / s2.max(), 0.9 * s1 / s1.max()) for s2, s1 in self.values]

    def some(self, indices):
        part = object.__new__(Problem)
        part.form, part.dtype = self.form, self.dtype
        for name in ("grads", "lefts", "rights", "inputs", "values"):
            whole = getattr(self, name)
            setattr(part, name, [whole[i] for i in indices] if whole else [])
        return part

    def run(self, **options):
        if self.form == "stein":
            steins = [
                Stein(left, right, *v) for left, right, v in zip(self.lefts, self.rights, self.values, strict=True)
            ]
            return kron_apply(self.grads, steins, **options)
        inputs = {"inputs": self.inputs} if self.form == "samples" else {}
        return kron_apply(self.grads, self.lefts, self.rights, **inputs, **options)

    def check(self, updates, products, info):
        assert info.tolist() == [0] * len(self.grads) and info.dtype == torch.int32
        assert products.shape == (len(self.grads), 2) and products.dtype == torch.float64
        for i, update in enumerate(updates):
            assert update.dtype == self.dtype and update.is_contiguous()
            truth, bound, dot, dot_bound = self.truth(i)
            assert ((update.double() - truth).abs() <= bound).all(), (self.form, tuple(update.shape))
            u, n = update.double(), update.numel() + 2
            square = (u * u).sum()
            assert (products[i, 1] - square).abs() <= 2 * n * 2.0**-53 * square
            if dot is None:  # of what was returned, by sums in float64
                v = self.grads[i].double()
                dot, dot_bound = (v * u).sum(), 2 * n * 2.0**-53 * (v * u).abs().sum()
            assert (products[i, 0] - dot).abs() <= dot_bound

    def truth(self, i):
        """The update, a bound on the error of each entry; and of <V, U> the same, where V is not formed."""
        unit = 1.01 * UNIT[self.dtype]
        g, left, right = (t[i].double() for t in (self.grads, self.lefts, self.rights))
        d, a, m = len(left), len(right), len(g)
        if self.form == "samples":
            x = self.inputs[i].double()
            update = left @ (g.mT @ x / m) @ right
            bound = (d + a + m + 8) * unit * (left.abs() @ (g.abs().mT @ x.abs() / m) @ right.abs())
            # Twice: float64's own rounding counts where that is what is tested.
            grams = (g.abs() @ left.abs() @ g.abs().mT) * (x.abs() @ right.abs() @ x.abs().mT)
            dot = ((g.mT @ x / m) * update).sum()
            return update, 2 * bound, dot, 2 * (2 * d + 2 * a + 10) * unit * grams.sum() / m**2
        if self.form == "plain":
            return left @ g @ right, 2 * (d + a + 4) * unit * (left.abs() @ g.abs() @ right.abs()), None, None
        s2, s1 = (s.double() for s in self.values[i])
        divisor = 1 + s2[:, None] * s1
        quotient = left.mT @ g @ right / divisor
        # A divisor is off by a rounding of its parts.
        parts = (1 + 2 * (s2[:, None] * s1).abs()) / divisor.abs()
        off = (2 * d + 2 * a + 8 + 2 * parts) * (left.abs().mT @ g.abs() @ right.abs()) / divisor.abs()
        return left @ quotient @ right.mT, 2 * unit * left.abs() @ off @ right.abs().mT, None, None


def definite(n, generator, damping=0.3):
    x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
    return (x.mT @ x / (2 * n) + damping * torch.eye(n, dtype=torch.float64)).to(DEVICE)
