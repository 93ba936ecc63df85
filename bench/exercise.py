"""Runs one instance of a kernel a few times and checks what it did: what compute-sanitizer and ncu are given to watch.

`python -m fastcurv.bench.exercise adam/float32/float32/amsgrad --device cuda [--elements N]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcurv import _check, ops

STEPS = 3
# Empty, one element, a vector and a bit, an exact number of vectors, and more than one chunk of the chunk table.
SIZES = (0, 1, 17, 1024, 40_003)


def instances() -> list[str]:
    """Every instance of every kernel, as op/parameter dtype/state dtype/rule."""
    return [
        f"adam/{_name(param)}/{_name(state)}/{rule}"
        for param, states in _check.STATE_DTYPES.items()
        for state in states
        for rule in ("adam", "amsgrad")
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _views(sizes: Sequence[int], dtype: torch.dtype, device: str, generator: torch.Generator | None) -> list[Tensor]:
    """Tensors of given sizes; every second one starts an element after an aligned address. Without generator: zeros."""
    tensors = []
    for k, size in enumerate(sizes):
        base = torch.zeros(size + 1, dtype=dtype, device=device)
        if generator is not None:
            base = torch.randn(size + 1, generator=generator).to(device, dtype)
        tensors.append(base[1:] if k % 2 else base[:size])
    return tensors


def adam(param: torch.dtype, state: torch.dtype, rule: str, device: str, sizes: Sequence[int]) -> str:
    """Takes a few steps of Adam on a device and compares them with the reference on the CPU.

    Args:
        param: Dtype of parameters and gradients.
        state: Dtype of the moments.
        rule: `adam` or `amsgrad`.
        device: Where to run.
        sizes: Elements of the tensors.

    Returns:
        What is wrong, or an empty string.
    """

    def start(where: str) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        params, grads = (_views(sizes, param, where, generator) for _ in range(2))
        moments = [_views(sizes, state, where, None) for _ in range(3 if rule == "amsgrad" else 2)]
        steps = [torch.zeros((), device=where) for _ in sizes]
        return [params, grads, *moments, *([] if rule == "amsgrad" else [[]]), [], steps]

    found, expected = start(device), start("cpu")
    backend = "cuda" if device == "cuda" else "cpp"
    for _ in range(STEPS):
        ops.adam_(*found, lr=0.1, weight_decay=0.01, rule=rule, backend=backend)
        ops.adam_(*expected, lr=0.1, weight_decay=0.01, rule=rule, backend="reference")
    # The moments are rounded once a step and the parameters too; each may be off by an ulp at a step.
    allowed = 2 * STEPS * max(torch.finfo(param).eps, torch.finfo(state).eps)
    for k, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
        error = (
            float(((a.cpu().double() - b.double()).abs() / b.double().abs().clamp(min=1)).max()) if a.numel() else 0.0
        )
        if not error <= allowed:
            return f"params[{k}] is off by {error:.2g}, {allowed:.2g} allowed"
    if any(step.item() != STEPS for step in found[-1]):
        return "a step count was not advanced"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        1 if the kernel was wrong, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m fastcurv.bench.exercise", description=__doc__)
    parser.add_argument("instance", choices=instances())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, help="one tensor of this many instead of several awkward ones")
    options = parser.parse_args(argv)
    _, param, state, rule = options.instance.split("/")
    sizes = (options.elements,) if options.elements else SIZES
    wrong = adam(getattr(torch, param), getattr(torch, state), rule, options.device, sizes)
    print(f"{options.instance}: {wrong or 'right'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
