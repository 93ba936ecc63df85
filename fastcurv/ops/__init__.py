"""Public operations. Each takes tensors, checks them, chooses a back end and runs it; in-place ones end in `_`."""

from fastcurv.ops.adam import adam_

__all__ = ["adam_"]
