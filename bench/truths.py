"""Optimizers to compare with where torch.optim has none: loops over parameters, written from the papers.

They share nothing with fastcurv, and are exact to rounding in the dtype of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class _Loop(Optimizer):
    """Calls `_update` for each parameter; keywords are hyper-parameters."""

    def __init__(self, params: Iterable[Parameter], lr: float, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                self._update(p, p.grad, state, group["lr"], state["step"], group)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        raise NotImplementedError


def _average(state: dict[str, Any], key: str, new: Tensor, beta: float, start: float = 0.0) -> Tensor:
    """An exponential moving average, kept in the state."""
    if key not in state:
        state[key] = torch.full_like(new, start)
    return state[key].mul_(beta).add_(new, alpha=1 - beta)


class Ranger(_Loop):
    """Ranger 20.4.11 (Wright, 2019): RAdam, gradient centralisation and Lookahead."""

    def __init__(self, params: Iterable[Parameter], lr: float, eps: float = 1e-5, use_gc: bool = True) -> None:
        super().__init__(params, lr, eps=eps, use_gc=use_gc)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        beta1, beta2, k, alpha = 0.95, 0.999, 6, 0.5
        slow = state.setdefault("slow", p.clone())
        if o["use_gc"] and g.dim() > 1:
            g = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)
        m, v = _average(state, "m", g, beta1), _average(state, "v", g * g, beta2)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length > 5:
            variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            p.addcdiv_(m, v.sqrt() + o["eps"], value=-lr * math.sqrt(variance * (1 - beta2**t)) / (1 - beta1**t))
        else:
            p.sub_(m, alpha=lr / (1 - beta1**t))
        if t % k == 0:
            p.copy_(slow.lerp_(p, alpha))


class Yogi(_Loop):
    """Yogi (Zaheer et al., 2018, Algorithm 2) with the bias correction of Adam."""

    def __init__(self, params: Iterable[Parameter], lr: float, eps: float = 1e-3, start: float = 1e-6) -> None:
        super().__init__(params, lr, eps=eps, start=start)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        beta1, beta2 = 0.9, 0.999
        m = _average(state, "m", g, beta1)
        v = state.setdefault("v", torch.full_like(p, o["start"]))
        v.sub_((v - g * g).sign() * (g * g), alpha=1 - beta2)
        p.addcdiv_(m, (v / (1 - beta2**t)).sqrt() + o["eps"], value=-lr / (1 - beta1**t))


class Nero(_Loop):
    """Nero (Liu, Bernstein et al., 2021, Algorithm 1), with constraints, for neurons that are not zero."""

    def __init__(self, params: Iterable[Parameter], lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self._constrain(p.data)
                self.state[p]["scale"] = self._norms(p.data).mean()

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        beta = 0.999
        s = _average(state, "s", self._norms(g).square(), beta)
        p.sub_(lr * state["scale"] * g / (s / (1 - beta**t)).sqrt())
        self._constrain(p)

    @staticmethod
    def _norms(x: Tensor) -> Tensor:
        """The norm of each neuron, as broadcasts over the tensor."""
        return x.square().sum(dim=tuple(range(1, x.dim())), keepdim=True).sqrt() if x.dim() > 1 else x.abs()

    def _constrain(self, x: Tensor) -> None:
        if x.dim() > 1 and x[0].numel() > 1:
            x.sub_(x.mean(dim=tuple(range(1, x.dim())), keepdim=True))
            x.div_(self._norms(x))


class LARS(_Loop):
    """LARS (You, Gitman and Ginsburg, 2017), for tensors that are not zero; SGD for those of fewer dimensions."""

    def __init__(self, params: Iterable[Parameter], lr: float, trust: float = 1e-3, dimensions: int = 0) -> None:
        super().__init__(params, lr, trust=trust, dimensions=dimensions)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        ratio = o["trust"] * p.norm() / g.norm() if p.dim() >= o["dimensions"] else 1.0
        b = state.setdefault("b", torch.zeros_like(p)).mul_(0.9).add_(ratio * g)
        p.sub_(b, alpha=lr)


class LAMB(_Loop):
    """LAMB (You et al., 2020, Algorithm 2), for tensors that are not zero."""

    def __init__(self, params: Iterable[Parameter], lr: float, eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, eps=eps, weight_decay=weight_decay)

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float, t: int, o: dict[str, Any]) -> None:
        beta1, beta2 = 0.9, 0.999
        m, v = _average(state, "m", g, beta1), _average(state, "v", g * g, beta2)
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + o["eps"]) + o["weight_decay"] * p
        p.sub_(p.norm() / u.norm() * u, alpha=lr)


class Lookahead(Optimizer):
    """Lookahead (Zhang et al., 2019, Algorithm 1) around SGD, by torch's own operations.

    Args:
        params: Parameters.
        lr: Learning rate of SGD.
        k: Fast steps between two slow ones.
        foreach: Whether the slow update goes over the whole list at once.
        sgd: Options of torch.optim.SGD.
    """

    def __init__(self, params: Iterable[Parameter], lr: float, k: int = 5, foreach: bool = False, **sgd: Any) -> None:
        super().__init__(params, {"lr": lr})
        self.fast = torch.optim.SGD(self.param_groups[0]["params"], lr=lr, **sgd)
        self.k, self.foreach, self.steps = k, foreach, 0
        self.params = [p.data for p in self.param_groups[0]["params"]]
        self.slow = [p.clone() for p in self.params]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes a fast step, and on every k-th a slow one."""
        self.fast.step()
        self.steps += 1
        if self.steps % self.k:
            return
        if self.foreach:
            torch._foreach_lerp_(self.slow, self.params, 0.5)
            torch._foreach_copy_(self.params, self.slow)
            return
        for slow, p in zip(self.slow, self.params, strict=True):
            p.copy_(slow.add_(p - slow, alpha=0.5))
