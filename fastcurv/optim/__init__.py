"""Drop-in optimizers: thin `torch.optim.Optimizer` subclasses over `fastcurv.ops`."""

from fastcurv.optim.adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
