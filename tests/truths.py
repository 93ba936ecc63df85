"""What the ops should return, in 80-bit arithmetic by the formulas of the papers; neither torch nor our references help.

One function per op: from the arrays of one parameter and the options, the arrays of that parameter afterwards.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

Arrays = dict[str, Any]
one = np.longdouble(1)


def long(tensor: Tensor) -> np.ndarray:
    """A tensor's values, exactly."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def truth(op: str, lists: dict[str, list[Tensor]], options: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """All lists after a call of an op; inputs of any dtype are taken as exact, nothing is rounded."""
    o = SimpleNamespace(**{name: _scalar(value) for name, value in options.items()})
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in lists}
    for i in range(len(lists["params"])):
        arrays = {name: long(tensors[i]) for name, tensors in lists.items() if tensors}
        result = {**arrays, **FORMULAS[op](SimpleNamespace(**arrays), o)}
        for name in arrays:
            outputs[name].append(np.asarray(result[name]))
    return outputs


def _scalar(value: Any) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    return np.longdouble(float(value))


def _gradient(x: Any, o: Any) -> np.ndarray:
    g = x.grads if o.grad_scale is None else x.grads / o.grad_scale
    return -g if o.maximize else g


def _rectification(beta2: np.longdouble, t: np.longdouble) -> tuple[np.longdouble, np.longdouble]:
    """rho_t and r_t of Liu et al. (2020), section 4."""
    rho_inf = 2 / (one - beta2) - one
    rho = rho_inf - 2 * t * beta2**t / (one - beta2**t)
    square = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return rho, np.sqrt(square) if rho > 4 else one


def _norm(a: np.ndarray) -> np.longdouble:
    return np.sqrt(np.sum(a * a))


def adam(x: Any, o: Any) -> Arrays:
    t, p, g = x.steps.item() + one, x.params, _gradient(x, o)
    if o.decoupled_weight_decay:
        p = p * (one - o.lr * o.weight_decay)
    else:
        g = g + o.weight_decay * p
    m = o.beta1 * x.exp_avgs + (one - o.beta1) * g
    v = o.beta2 * x.exp_avg_sqs + (one - o.beta2) * g * g
    if o.rule == "yogi":
        v = x.exp_avg_sqs - (one - o.beta2) * np.sign(x.exp_avg_sqs - g * g) * g * g
    result = {"exp_avgs": m, "exp_avg_sqs": v, "steps": t}
    if o.rule == "amsgrad":
        v = result["max_exp_avg_sqs"] = np.maximum(x.max_exp_avg_sqs, v)
    m_hat, denominator = m / (one - o.beta1**t), np.sqrt(v / (one - o.beta2**t)) + o.eps
    if o.rule == "radam":
        rho, factor = _rectification(o.beta2, t)
        denominator = (np.sqrt(v) + o.eps) / (factor * np.sqrt(one - o.beta2**t)) if rho > 5 else one
    if o.rule == "nadam":
        mu, mu_next = (o.beta1 * (one - o.mu_decay**s / 2) for s in (t, t + one))
        # The product is kept in float32 and advanced there, as in torch.
        product = result["mu_products"] = np.longdouble(np.float32(x.mu_products) * np.float32(mu))
        m_hat = (one - mu) / (one - product) * g + mu_next / (one - product * mu_next) * m
    return {**result, "params": p - o.lr * m_hat / denominator}


def sgd(x: Any, o: Any) -> Arrays:
    g = _gradient(x, o) + o.weight_decay * x.params
    if not hasattr(x, "momentum_buffers"):
        return {"params": x.params - o.lr * g}
    b = g if o.is_first_step else o.momentum * x.momentum_buffers + (one - o.dampening) * g
    return {"params": x.params - o.lr * (g + o.momentum * b if o.nesterov else b), "momentum_buffers": b}


def lookahead(x: Any, o: Any) -> Arrays:
    slow = x.slow_buffers + o.alpha * (x.params - x.slow_buffers)
    return {"params": slow, "slow_buffers": slow}


def ranger(x: Any, o: Any) -> Arrays:
    """peers/elementwise g1, version 20.4.11; `scaled_weight_decay`: g2 without the leak into the momentum."""
    t, p, g = x.steps.item() + one, x.params, _gradient(x, o)
    if o.use_gc and g.ndim > (3 if o.gc_conv_only else 1) and g.size:
        g = g - np.mean(g, axis=tuple(range(1, g.ndim)), keepdims=True)
    v = o.beta2 * x.exp_avg_sqs + (one - o.beta2) * g * g
    m = o.beta1 * x.exp_avgs + (one - o.beta1) * g
    rho, factor = _rectification(o.beta2, t)
    direction, size = m, one / (one - o.beta1**t)
    if rho > o.n_sma_threshold:
        direction, size = m / (np.sqrt(v) + o.eps), size * factor * np.sqrt(one - o.beta2**t)
    if o.scaled_weight_decay:
        p = p - o.lr * size * (direction + o.weight_decay * p)
    else:
        p = p - o.weight_decay * o.lr * p
        p = p - o.lr * size * direction
    slow = x.slow_buffers
    if int(t) % o.k == 0:
        p = slow = slow + o.alpha * (p - slow)
    return {"params": p, "exp_avgs": m, "exp_avg_sqs": v, "slow_buffers": slow, "steps": t}


def nero(x: Any, o: Any) -> Arrays:
    """spec nero 1.5, [PUB]: the state is the average of the squared norm of each neuron's gradient."""
    t, p, g = x.steps.item() + one, x.params, _gradient(x, o)
    if not p.size:
        return {"steps": t}
    axes = tuple(range(1, p.ndim))
    s = o.beta * x.row_exp_avg_sqs + (one - o.beta) * np.sum(g * g, axis=axes, keepdims=True)
    norm = np.sqrt(s / (one - o.beta**t))
    p = p - o.lr * x.scales * np.where(norm == 0, 0, g / np.where(norm == 0, 1, norm))
    if o.constraints and p.ndim > 1 and p[0].size > 1:
        p = p - np.mean(p, axis=axes, keepdims=True)
        norm = np.sqrt(np.sum(p * p, axis=axes, keepdims=True))
        p = np.where(norm == 0, 0, p / np.where(norm == 0, 1, norm))
    return {"params": p, "row_exp_avg_sqs": s, "steps": t}


def lars(x: Any, o: Any) -> Arrays:
    p, g = x.params, _gradient(x, o)
    ratio, norm, grad_norm = one, _norm(p), _norm(g)
    if o.adaptive and norm > 0 and grad_norm > 0:
        ratio = o.trust_coefficient * norm / (grad_norm + o.weight_decay * norm + o.eps)
    step = ratio * (g + o.weight_decay * p)
    b = o.momentum * x.momentum_buffers + step
    return {"params": p - o.lr * (step + o.momentum * b if o.nesterov else b), "momentum_buffers": b}


def lamb(x: Any, o: Any) -> Arrays:
    t, p, g = x.steps.item() + one, x.params, _gradient(x, o)
    m = o.beta1 * x.exp_avgs + (one - o.beta1) * g
    v = o.beta2 * x.exp_avg_sqs + (one - o.beta2) * g * g
    u = m / (one - o.beta1**t) / (np.sqrt(v / (one - o.beta2**t)) + o.eps) + o.weight_decay * p
    ratio, norm, update_norm = one, _norm(p), _norm(u)
    if o.adaptive and norm > 0 and update_norm > 0:
        ratio = norm / update_norm
    return {"params": p - o.lr * ratio * u, "exp_avgs": m, "exp_avg_sqs": v, "steps": t}


FORMULAS = {
    "adam": adam, "lamb": lamb, "lars": lars, "lookahead": lookahead, "nero": nero, "ranger": ranger, "sgd": sgd,
}  # fmt: skip
