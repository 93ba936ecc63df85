"""Drop-in optimizers: thin `torch.optim.Optimizer` subclasses over `fastcurv.ops`."""

from fastcurv.optim.adam import Adam, AdamW, NAdam, RAdam, Yogi
from fastcurv.optim.lamb import LAMB
from fastcurv.optim.lars import LARS
from fastcurv.optim.lookahead import Lookahead
from fastcurv.optim.muon import Muon
from fastcurv.optim.nero import Nero
from fastcurv.optim.orthogonal import Orthogonal, param_groups
from fastcurv.optim.osgd import OSGD
from fastcurv.optim.ranger import Ranger
from fastcurv.optim.sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "OSGD",
    "SGD",
    "Adam",
    "AdamW",
    "Lookahead",
    "Muon",
    "NAdam",
    "Nero",
    "Orthogonal",
    "RAdam",
    "Ranger",
    "Yogi",
    "param_groups",
]
