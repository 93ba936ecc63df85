"""Pure-torch references: one module per op, written to be read beside the paper, right on every device and dtype."""

from fastcurv.reference.adam import adam_
from fastcurv.reference.lamb import lamb_
from fastcurv.reference.lars import lars_
from fastcurv.reference.lookahead import lookahead_
from fastcurv.reference.nero import nero_
from fastcurv.reference.ranger import ranger_
from fastcurv.reference.sgd import sgd_

__all__ = ["adam_", "lamb_", "lars_", "lookahead_", "nero_", "ranger_", "sgd_"]
