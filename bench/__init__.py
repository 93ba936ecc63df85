"""Benchmarks, imported as `fastcurv.bench`: one harness, real parameter lists, and the figures that must hold.

`fastcurv bench` runs them, `python -m fastcurv.bench.report` draws what was measured, and `python -m
fastcurv.bench.gpu` does on a GPU machine what the tests and benchmarks without one cannot.
"""
