from collections.abc import Sequence

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
    def words(self, chunk_elements: int) -> int: ...
    def write(self, address: int, chunk_elements: int) -> None: ...

def stream_(table: Tensor, item_sizes: list[int], is_written: list[bool], block_elements: int) -> int: ...
def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    table: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None: ...
def adam_kernel(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    table: Tensor | None,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[str, int, int, int, bytes]: ...
