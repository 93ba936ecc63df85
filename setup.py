"""Starts CMake with the Ninja generator; everything else is in pyproject.toml and csrc/CMakeLists.txt."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHITECTURES = "80;90-real;100-real;120-real"  # the compute_80 PTX serves every later GPU


def cuda_architectures() -> str:
    """CMAKE_CUDA_ARCHITECTURES from FASTCURV_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST, or what this machine has.

    Accepts `9.0`, `90`, `9.0a`, `9.0+PTX` and `native`, separated by `;`, `,` or spaces.
    """
    wanted = os.environ.get("FASTCURV_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        return "native" if Path("/dev/nvidiactl").exists() else DEFAULT_ARCHITECTURES
    if wanted.strip() == "native":
        return "native"
    architectures = []
    for item in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX|-real|-virtual)?", item)
        if not match:
            raise SystemExit(
                f"FASTCURV_CUDA_ARCHS: cannot read {item!r}; write compute capabilities such as '9.0;12.0', or 'native'"
            )
        major, minor, suffix = match.groups()
        architectures.append(f"{major}{minor}" + {"+PTX": "", None: "-real"}.get(suffix, suffix or ""))
    return ";".join(architectures)


def stale(cache: Path) -> bool:
    """Whether a CMake cache names a tool that is gone (a finished build isolation took it along)."""
    if not cache.exists():
        return False
    names = ("CMAKE_MAKE_PROGRAM", "CMAKE_COMMAND", "pybind11_DIR", "CMAKE_CUDA_COMPILER")
    found = re.findall(rf"^({'|'.join(names)}):\w+=(.+)$", cache.read_text(), re.MULTILINE)
    return any(not Path(path).exists() for _, path in found if path and not path.endswith("NOTFOUND"))


class CMakeBuild(build_ext):
    """One fixed build directory per Python and sanitizer, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        tools = Path(sysconfig.get_path("scripts"))
        path = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if not cmake or not ninja:
            raise SystemExit("fastcurv needs cmake and ninja: pip install cmake ninja pybind11, then build again")
        sanitize = os.environ.get("FASTCURV_SANITIZE", "")
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" + ("-sanitize" if sanitize else "")
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        command = [cmake, "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build)]
        if stale(build / "CMakeCache.txt"):
            command.append("--fresh")
        command += [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTCURV_CUDA={os.environ.get('FASTCURV_CUDA', 'auto')}",
            f"-DFASTCURV_CUDA_ARCHS={cuda_architectures()}",
            f"-DFASTCURV_SANITIZE={sanitize}",
        ]
        subprocess.run(command, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


setup(ext_modules=[Extension("fastcurv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
