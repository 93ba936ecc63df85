"""Runs pytest as another processor would compute.

    python tests/other_processors.py {compatible,avx2,avx512} [arguments of pytest]

MKL, OpenBLAS, torch and our C++ kernels choose their code by the processor, so tests see other inputs, references and
orders of summation on each. Variables make them choose as an older processor or another vendor's would.
FASTCURV_TEST_SEED draws other inputs besides.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Vendor libraries fall back to what the processor has, our kernels too.
LEVELS = {
    "compatible": {
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "ATEN_CPU_CAPABILITY": "default",
        "FASTCURV_SIMD": "default",
    },
    "avx2": {
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FASTCURV_SIMD": "x86-64-v3",
    },
    "avx512": {
        "MKL_CBWR": "AVX512",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "ATEN_CPU_CAPABILITY": "avx512",
        "FASTCURV_SIMD": "x86-64-v4",
    },
}
# MKL has one path for all processors that are not Intel's, unless this function says that it runs on one of those.
INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }"


def intel_library() -> Path | None:
    """Compiles the function into a library to be loaded first; None without a compiler, or on another architecture."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        return None
    library = ROOT / "build" / "intel_cpu.so"
    library.parent.mkdir(exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", library], input=INTEL, text=True, check=True)
    return library


def main(arguments: list[str]) -> int:
    """Starts pytest in an environment of its own, and returns its exit code."""
    if not arguments or arguments[0] not in LEVELS:
        print(__doc__, file=sys.stderr)
        return 2
    # Inductor would take the vector code of another level for its own.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor" / arguments[0])}
    environment = {**os.environ, **cache, **LEVELS[arguments[0]]}
    if library := intel_library():
        environment["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
    return subprocess.run([sys.executable, "-m", "pytest", *arguments[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
