"""The CUDA kernels on the CPU: a host emulator, for tests only. See `emulator.py` and `cuda_host.h`."""
