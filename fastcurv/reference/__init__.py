"""Pure-torch references: one module per op, written to be read beside the paper, right on every device and dtype."""

from fastcurv.reference.adam import adam_
from fastcurv.reference.gram_schmidt import gram_schmidt
from fastcurv.reference.lamb import lamb_
from fastcurv.reference.lars import lars_
from fastcurv.reference.lookahead import lookahead_
from fastcurv.reference.nero import nero_
from fastcurv.reference.newton_schulz import newton_schulz
from fastcurv.reference.polar import polar
from fastcurv.reference.ranger import ranger_
from fastcurv.reference.sgd import sgd_

__all__ = [
    "adam_",
    "gram_schmidt",
    "lamb_",
    "lars_",
    "lookahead_",
    "nero_",
    "newton_schulz",
    "polar",
    "ranger_",
    "sgd_",
]
