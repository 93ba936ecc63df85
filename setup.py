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


# The names that PyTorch knows in TORCH_CUDA_ARCH_LIST, without those that nvcc 12.8 and later know no more.
GENERATIONS = {
    "maxwell": "5.0;5.2+ptx", "maxwell+tegra": "5.3", "pascal": "6.0;6.1+ptx", "volta": "7.0+ptx",
    "volta+tegra": "7.2", "turing": "7.5+ptx", "ampere": "8.0;8.6+ptx", "ampere+tegra": "8.7", "ada": "8.9+ptx",
    "hopper": "9.0+ptx", "blackwell": "10.0;10.3;12.0;12.1+ptx", "blackwell+tegra": "11.0",
}  # fmt: skip
# CMake reads these when it first configures a build directory, and never again.
COMPILERS = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX")


def setting(name: str) -> str:
    """An environment variable; one that holds nothing but spaces counts as unset."""
    return os.environ.get(name, "").strip()


def cuda_architectures() -> tuple[str, str]:
    """CMAKE_CUDA_ARCHITECTURES from FASTCURV_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST, or what this machine has.

    Accepts `9.0`, `90`, `sm_90`, `9.0a`, `9.0+PTX` and names such as `Hopper`, separated by `;`, `,` or spaces, or one
    of `native`, `all` and `all-major`. CMakeLists.txt asks nvcc whether it knows them.

    Returns:
        The architectures, and the variable that named them.
    """
    name = "FASTCURV_CUDA_ARCHS"
    # A list that was set for PyTorch does not matter where nothing is compiled for GPUs.
    if not setting(name) and setting("TORCH_CUDA_ARCH_LIST") and setting("FASTCURV_CUDA") != "0":
        name = "TORCH_CUDA_ARCH_LIST"
    wanted = setting(name)
    if not wanted:
        return ("native" if Path("/dev/nvidiactl").exists() else DEFAULT_ARCHITECTURES), name
    if wanted.lower() in ("native", "all", "all-major"):
        return wanted.lower(), name
    architectures = []
    for word in re.findall(r"[^;,\s]+", wanted):
        for item in GENERATIONS.get(word.lower(), word.lower()).split(";"):
            match = re.fullmatch(
                r"(?:sm_)?([0-9]{1,2}\.[0-9]|[1-9][0-9]|1[0-9]{2})([af]?)(\+ptx|-real|-virtual)?", item
            )
            if not match:
                raise SystemExit(
                    f"{name}={wanted!r}: cannot read {word!r}. Expected compute capabilities such as '9.0;12.0' or "
                    "'9.0+PTX', names such as 'Hopper', or one of 'native', 'all' and 'all-major' alone"
                )
            number, variant, kind = match.groups()
            kind = {"+ptx": "", None: "-real"}.get(kind, kind)
            architectures.append(f"{number.replace('.', '')}{variant}{kind}")
    if not architectures:
        raise SystemExit(f"{name}={wanted!r}: names no architecture. Expected compute capabilities such as '9.0;12.0'")
    return ";".join(dict.fromkeys(architectures)), name


def parallel() -> list[str]:
    """Options of `cmake --build` that keep to MAX_JOBS."""
    jobs = setting("MAX_JOBS")
    if jobs and not re.fullmatch(r"[1-9][0-9]{0,3}", jobs):
        raise SystemExit(
            f"MAX_JOBS={jobs!r}: expected how many compilers may run at a time, 1 to 9999; unset, Ninja decides"
        )
    return ["--parallel", jobs] if jobs else []


def compilers() -> str:
    """The compilers that the environment names, to be kept in CMake's cache."""
    return " ".join(f"{name}={setting(name)}" for name in COMPILERS if setting(name))


def stale(cache: Path) -> bool:
    """Whether CMake would refuse to go on from a cache, or would build with other tools than asked for.

    That is so when the tree was moved or copied, when a tool is gone (a finished build isolation took it along), when
    other compilers are asked for, and when nothing of a cache is left but a part.
    """
    if not cache.exists():
        return False
    entries = dict(re.findall(r"^([\w-]+):\w+=(.*)$", cache.read_text(errors="replace"), re.MULTILINE))
    places = {"CMAKE_HOME_DIRECTORY": ROOT / "csrc", "CMAKE_CACHEFILE_DIR": cache.parent}
    if any(Path(entries.get(name, "")).resolve() != place.resolve() for name, place in places.items()):
        return True
    tools = ("CMAKE_MAKE_PROGRAM", "CMAKE_COMMAND", "CMAKE_CXX_COMPILER", "CMAKE_CUDA_COMPILER", "pybind11_DIR")
    tools += ("_Python_INCLUDE_DIR",)  # CMake keeps the headers of another Python of the same version
    found = [entries[name] for name in tools if entries.get(name) and not entries[name].endswith("NOTFOUND")]
    return not all(Path(path).exists() for path in found) or entries.get("FASTCURV_COMPILERS", "") != compilers()


def run(command: list[str]) -> None:
    """Runs CMake, which says itself what is wrong: a traceback would only bury it."""
    if subprocess.run(command).returncode:
        raise SystemExit(f"fastcurv was not built: CMake's message is above ({' '.join(command[:3])} ...)")


class CMakeBuild(build_ext):
    """One build directory per Python, list of GPU architectures and sanitizer: a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        tools = Path(sysconfig.get_path("scripts"))
        path = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        try:
            import pybind11
        except ImportError:
            pybind11 = None
        if not cmake or not ninja or not pybind11:
            raise SystemExit(
                "fastcurv needs cmake, ninja and pybind11: pip install cmake ninja pybind11, then build again"
            )
        sanitize = setting("FASTCURV_SANITIZE")
        architectures, source = cuda_architectures()
        jobs = parallel()
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        tag += "" if setting("FASTCURV_CUDA") == "0" else "-" + architectures.replace(";", "-")
        tag += "-sanitize" if sanitize else ""
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
            f"-DFASTCURV_CUDA={setting('FASTCURV_CUDA') or 'auto'}",
            f"-DFASTCURV_CUDA_ARCHS={architectures}",
            f"-DFASTCURV_CUDA_ARCHS_FROM={source}",
            f"-DFASTCURV_COMPILERS={compilers()}",
            f"-DFASTCURV_SANITIZE={sanitize}",
        ]
        run(command)
        run([cmake, "--build", str(build), *jobs])


setup(ext_modules=[Extension("fastcurv._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
