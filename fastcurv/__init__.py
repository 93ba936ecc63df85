"""fastcurv: compiled kernels for PyTorch optimizers, behind drop-in classes."""

from fastcurv import ops, reference
from fastcurv._backend import Availability, backends
from fastcurv.optim import LAMB, LARS, SGD, Adam, AdamW, Lookahead, NAdam, Nero, RAdam, Ranger, Yogi

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adam",
    "AdamW",
    "Availability",
    "Lookahead",
    "NAdam",
    "Nero",
    "RAdam",
    "Ranger",
    "Yogi",
    "backends",
    "ops",
    "reference",
]
