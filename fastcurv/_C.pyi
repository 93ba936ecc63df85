from collections.abc import Callable, Sequence

import torch
from torch import Tensor

def simd_level() -> str: ...
def exchange_api() -> bool: ...
def set_exchange_api(enabled: bool) -> None: ...
def cuda_sources() -> dict[str, str]: ...
def cuda_architectures() -> str: ...
def cuda_unusable(device: int) -> str | None: ...

class ChunkTable:
    def __init__(self, is_mutated: list[bool]) -> None: ...
    def update(self, lists: Sequence[Sequence[Tensor]], names: Sequence[str], accept: bool) -> int: ...
    def gather(
        self, params: list[Tensor], states: list[dict[str, Tensor]], keys: tuple[str | None, ...]
    ) -> list[list[Tensor]]: ...
    def size(self, chunk_elements: int, rows: int) -> tuple[int, int, int, int]: ...
    def write(self, address: int, chunk_elements: int, rows: int) -> None: ...

def stream_(table: Tensor, item_sizes: list[int], is_written: list[bool], block_elements: int) -> int: ...

# `<op>_kernel` takes the arguments of `<op>_` and says how a GPU would be asked for the same: for each launch the name
# expression of the kernel, the number of blocks that have something to do, threads, blocks per multiprocessor,
# bytes of dynamic shared memory, and the bytes of the kernel's one argument.
_Launches = list[tuple[str, int, int, int, int, bytes]]

def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    mu_products: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    mu_decay: float | Tensor,
    rule: str,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def adam_kernel(*args: object, **kwargs: object) -> _Launches: ...
def lamb_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    adaptive: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def lamb_kernel(*args: object, **kwargs: object) -> _Launches: ...
def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    eps: float | Tensor,
    nesterov: bool,
    adaptive: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def lars_kernel(*args: object, **kwargs: object) -> _Launches: ...
def lookahead_(
    params: list[Tensor],
    slow_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    alpha: float | Tensor,
    found_inf: Tensor | None,
) -> bool | None: ...
def lookahead_kernel(*args: object, **kwargs: object) -> _Launches: ...
def nero_(
    params: list[Tensor],
    grads: list[Tensor],
    row_exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta: float | Tensor,
    constraints: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def nero_kernel(*args: object, **kwargs: object) -> _Launches: ...
def ranger_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    slow_buffers: list[Tensor],
    steps: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    alpha: float | Tensor,
    n_sma_threshold: float | Tensor,
    k: int,
    use_gc: bool,
    gc_conv_only: bool,
    scaled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def ranger_kernel(*args: object, **kwargs: object) -> _Launches: ...
def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    table: tuple[Tensor, int, int] | None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    weight_decay: float | Tensor,
    nesterov: bool,
    is_first_step: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool | None: ...
def sgd_kernel(*args: object, **kwargs: object) -> _Launches: ...
def on_threads(function: Callable[[int], object], count: int) -> None: ...

# Ops on each matrix of a list.
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
) -> None: ...
def kron_factor_kernel(*args: object, **kwargs: object) -> _Launches: ...
def kron_factor_workspace(*args: object, **kwargs: object) -> int: ...
def are_square(matrices: list[Tensor]) -> bool: ...
def kron_inverse(
    factors: list[Tensor], inverses: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor
) -> None: ...
def kron_apply(
    grads: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    inputs: list[Tensor],
    left_values: list[Tensor],
    right_values: list[Tensor],
    updates: list[Tensor],
    products: Tensor,
    info: Tensor,
    workspace: Tensor,
) -> None: ...
def kron_apply_kernel(*args: object, **kwargs: object) -> _Launches: ...
def kron_inverse_kernel(*args: object, **kwargs: object) -> _Launches: ...
def kron_root(
    factors: list[Tensor], roots: list[Tensor], previous: list[Tensor], info: Tensor, damping: Tensor, p: int
) -> None: ...
def kron_root_kernel(*args: object, **kwargs: object) -> _Launches: ...
def gram_schmidt(matrices: list[Tensor], outs: list[Tensor], info: Tensor, *, floor: float) -> None: ...
def gram_schmidt_kernel(*args: object, **kwargs: object) -> _Launches: ...
def newton_schulz(
    matrices: list[Tensor],
    outs: list[Tensor],
    info: Tensor,
    *,
    coefficients: list[tuple[float, float, float]],
    dtype: torch.dtype,
    spectral: int,
    eps: float,
) -> None: ...
def newton_schulz_kernel(*args: object, **kwargs: object) -> _Launches: ...
def polar(matrices: list[Tensor], outs: list[Tensor], info: Tensor) -> None: ...
