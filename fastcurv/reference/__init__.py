"""Pure-torch references: one module per op, written to be read beside the paper, right on every device and dtype."""

from fastcurv.reference.adam import adam_

__all__ = ["adam_"]
