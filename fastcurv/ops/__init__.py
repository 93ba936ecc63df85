"""Public operations. Each takes tensors, checks them, chooses a back end and runs it; in-place ones end in `_`."""

from fastcurv.ops._stein import Stein, stein
from fastcurv.ops.adam import adam_
from fastcurv.ops.kron_apply import kron_apply
from fastcurv.ops.kron_eigh import Eigen, kron_eigh
from fastcurv.ops.kron_factor import Patches, kron_factor_
from fastcurv.ops.kron_inverse import kron_inverse
from fastcurv.ops.kron_root import kron_root
from fastcurv.ops.lamb import lamb_
from fastcurv.ops.lars import lars_
from fastcurv.ops.lookahead import lookahead_
from fastcurv.ops.nero import nero_
from fastcurv.ops.orthogonalize import orthogonalize
from fastcurv.ops.ranger import ranger_
from fastcurv.ops.sgd import sgd_

__all__ = [
    "Eigen",
    "Patches",
    "Stein",
    "adam_",
    "kron_apply",
    "kron_eigh",
    "kron_factor_",
    "kron_inverse",
    "kron_root",
    "lamb_",
    "lars_",
    "lookahead_",
    "nero_",
    "orthogonalize",
    "ranger_",
    "sgd_",
    "stein",
]
