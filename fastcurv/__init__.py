"""fastcurv: compiled kernels for PyTorch optimizers, behind drop-in classes."""

from fastcurv import ops, reference
from fastcurv._backend import Availability, backends
from fastcurv.optim import (
    LAMB,
    LARS,
    OSGD,
    SGD,
    Adam,
    AdamW,
    Lookahead,
    Muon,
    NAdam,
    Nero,
    Orthogonal,
    RAdam,
    Ranger,
    Yogi,
    param_groups,
)

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "OSGD",
    "SGD",
    "Adam",
    "AdamW",
    "Availability",
    "Lookahead",
    "Muon",
    "NAdam",
    "Nero",
    "Orthogonal",
    "RAdam",
    "Ranger",
    "Yogi",
    "backends",
    "ops",
    "param_groups",
    "reference",
]
