"""fastcurv: compiled kernels for PyTorch optimizers, behind drop-in classes."""

from fastcurv import ops, reference
from fastcurv._backend import Availability, backends
from fastcurv.optim import Adam, AdamW

__version__ = "0.1.0"

__all__ = ["Adam", "AdamW", "Availability", "backends", "ops", "reference"]
