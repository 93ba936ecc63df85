"""Factors of Stein equations, against dense solves."""

import itertools
import math

import pytest
import torch
from cases import DEVICE
from layers import definite, every_backend, kron_apply

from fastcurv import ops
from fastcurv.ops import stein


def dense(a, b, c, d, sign):
    return torch.kron(b, a) + sign * torch.kron(d, c)  # of V by rows: the other way round


@every_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(4, 6), (9, 3), (1, 5)])
def test_stein_equations(backend, sign, shape, generator):
    """Against dense solves, of which those with a minus are as in a block-tridiagonal inverse: C < A and D < B."""
    m, n = shape
    a, b = definite(n, generator), definite(m, generator)
    c, d = (x @ definite(len(x), generator, 0.0) @ x for x in (a, b))
    c, d = (0.7 * y / torch.linalg.eigvals(torch.linalg.solve(x, y)).real.max() for x, y in ((a, c), (b, d)))
    v = torch.randn(m, n, generator=generator, dtype=torch.float64).to(DEVICE)
    for first, second in ((a, b), (1.0, b), (a, torch.tensor(2.0, device=DEVICE)), (0.9, 1.5)):
        whole_a, whole_b = (
            x if isinstance(x, torch.Tensor) and x.dim() else float(x) * torch.eye(k, dtype=v.dtype, device=DEVICE)
            for x, k in ((first, n), (second, m))
        )
        if sign < 0 and min(torch.linalg.eigvalsh(whole_a - c).min(), torch.linalg.eigvalsh(whole_b - d).min()) <= 0.01:
            continue
        truth = torch.linalg.solve(dense(whole_a, whole_b, c, d, sign), v.flatten()).view(m, n)
        (update,), _, info = kron_apply([v], [stein(first, second, c, d, sign)], backend=backend)
        assert info.tolist() == [0]
        torch.testing.assert_close(update, truth, rtol=1e-9, atol=1e-9)


def test_stein_keeps_eigenvalues_below_one(generator):
    a, b = definite(4, generator).float(), definite(3, generator).float()
    factors = stein(a, b, 1.5 * a, b, -1)
    assert (factors.right_values <= 1 - 9e-7).all() and (factors.left_values >= -1 + 9e-7).all()
    (update,), _, info = kron_apply([torch.ones(3, 4, device=DEVICE)], [factors])
    assert info.tolist() == [0] and update.isfinite().all()
    assert torch.allclose(stein(a, b, 1.5 * a, b).right_values, torch.tensor(1.5, device=DEVICE))


def test_stein_of_what_is_not_definite_or_finite(generator):
    good, v = definite(3, generator), torch.ones(3, 3, dtype=torch.float64, device=DEVICE)
    spoilt = good.clone()
    spoilt[1, 1] = math.nan
    arguments = [
        (-good, good, good, good),
        (good, -good, good, good),
        (spoilt, good, good, good),
        (0.0, 1.0, good, good),
    ]
    arguments += [(good, good, spoilt, good), (good, good, good, spoilt), (good, good, good, good)]
    updates, products, info = kron_apply([v] * len(arguments), [stein(*a) for a in arguments])
    assert info.tolist() == [-2] * 6 + [0]
    assert not any(u.any() for u in updates[:-1]) and not products[:-1].any() and updates[-1].all()


EYES = [torch.eye(2), torch.eye(3)]


@pytest.mark.parametrize("arguments, error, match", [
    ((1.0, 1.0, EYES[0], EYES[1], 2), ValueError, "sign: expected 1 or -1, got 2"),
    ((-1.0, 1.0, EYES[0], EYES[1]), ValueError, r"a: expected a value in \[0, inf\), got -1.0"),
    ((1.0, "b", EYES[0], EYES[1]), TypeError, "b: expected a number"),
    ((EYES[1], 1.0, EYES[0], EYES[1]), ValueError, r"a: expected torch.float32 of shape \(2, 2\) on cpu like c, or a number"),
    ((1.0, EYES[1].double(), EYES[0], EYES[1]), ValueError, r"b: expected torch.float32 of shape \(3, 3\) on cpu like d"),
    ((1.0, 1.0, torch.ones(2, 3), EYES[1]), ValueError, r"c\[0\]: expected a square matrix"),
    ((1.0, 1.0, EYES[0], EYES[1].double()), ValueError, "d: expected torch.float32 on cpu like c, got torch.float64"),
])  # fmt: skip
def test_errors_of_stein(arguments, error, match):
    with pytest.raises(error, match=match):
        stein(*arguments)


def test_inner_products_of_all_pairs_of_forms_agree(generator):
    """One layer in every form, all exact: B = G, A = A, and nothing added."""
    g, a = definite(6, generator), definite(5, generator)
    x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64).to(DEVICE) for n in (6, 5))
    v, inverses = x.mT @ y / 4, ops.kron_inverse([g, a])[0]
    found = [
        kron_apply([v], inverses[:1], inverses[1:]),
        kron_apply([x], inverses[:1], inverses[1:], inputs=[y]),
        kron_apply([v], [stein(a, g, torch.zeros_like(a), g)]),
    ]
    for one, two in itertools.combinations(found, 2):
        torch.testing.assert_close(one[0][0], two[0][0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one[1], two[1], rtol=1e-10, atol=1e-10)
