"""Pure-torch references: one module per op, written to be read beside the paper, right on every device and dtype."""
