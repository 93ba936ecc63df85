"""Triton kernels, imported as `fastcurv.kernels`. They import nothing of fastcurv: `ops` passes in all they need."""

if __name__ != "fastcurv.kernels":
    raise ImportError("import fastcurv.kernels: pyproject.toml maps this directory there")
