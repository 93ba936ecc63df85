"""What a user sees of setup.py: settings it does not understand are refused, and trees that moved are built."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
VARIABLES = (
    *("FASTCURV_CUDA", "FASTCURV_CUDA_ARCHS", "FASTCURV_SANITIZE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
    *("CMAKE_BUILD_PARALLEL_LEVEL", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX"),
)
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the checkout")
needs_cmake = pytest.mark.skipif(
    shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH')}") is None
    or importlib.util.find_spec("pybind11") is None,
    reason="needs cmake, ninja and pybind11",
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path):
    """A source tree of its own: these tests configure it, and compile nothing."""
    root = tmp_path / "fastcurv"
    root.mkdir()
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    return root


def load(root):
    """setup.py as a module, which sets nothing up."""
    spec = importlib.util.spec_from_file_location("fastcurv_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(module)
    return module


def configure(root, monkeypatch, only_commands=False):
    """Runs CMake as an installation does, and returns its commands; the one that compiles is not run."""
    module, commands = load(root), []

    def run(command, **options):
        commands.append(command)
        if only_commands or "--build" in command:
            return subprocess.CompletedProcess(command, 0)
        return real(command, capture_output=True, text=True, **options)

    real = subprocess.run
    build = module.CMakeBuild(setuptools.Distribution())
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr(build, "get_ext_fullpath", lambda name: str(root / "fastcurv" / "_C.so"))
        build.build_extension(setuptools.Extension("fastcurv._C", sources=[]))
    return commands


def cache_of(root):
    (found,) = (root / "build").glob("*/CMakeCache.txt")
    return found


def refused(root, **environment):
    """What `python setup.py build_ext` says of a setting that it refuses."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return " ".join(done.stderr.split())


@needs_cmake
@pytest.mark.parametrize("value", ["off", "no", "false", "yes", "ON", "TRUE", "2", "auto;0"])
def test_fastcurv_cuda_other_than_auto_0_1_is_refused(tree, value):
    said = refused(tree, FASTCURV_CUDA=value)
    assert f"FASTCURV_CUDA={value}: expected auto, 0 or 1" in said and "without nvcc" in said


@needs_cmake
def test_fastcurv_cuda_1_without_nvcc_says_what_to_do(tree, tmp_path):
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    said = refused(tree, FASTCURV_CUDA="1", CUDACXX=str(tmp_path / "nvcc"))
    assert "no CUDA compiler works" in said and "CUDACXX" in said and "FASTCURV_CUDA=0 builds without CUDA" in said


@needs_cmake
@pytest.mark.parametrize("value", ["1", "on", "off", "0", "no", "Address", "address;undefined", "address undefined"])
def test_sanitizers_that_the_compiler_lacks_are_refused(tree, value):
    said = refused(tree, FASTCURV_CUDA="0", FASTCURV_SANITIZE=value)
    assert f"FASTCURV_SANITIZE={value}:" in said and "address,undefined" in said


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("name", "value"), [("FASTCURV_CUDA_ARCHS", "2.0"), ("TORCH_CUDA_ARCH_LIST", "9.0;2.0+PTX")])
def test_architectures_that_nvcc_lacks_are_named(tree, name, value):
    said = refused(tree, FASTCURV_CUDA="1", **{name: value})
    assert f"{name}=" in said and "not for 20." in said and "another nvcc on PATH" in said


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None or Path("/dev/nvidiactl").exists(), reason="needs nvcc, and no GPU")
def test_native_without_a_gpu_says_what_to_do(tree):
    said = refused(tree, FASTCURV_CUDA="1", FASTCURV_CUDA_ARCHS="native")
    assert "FASTCURV_CUDA_ARCHS=native: nvcc's test program finds no GPU here" in said and "ARCHS=9.0" in said
    assert not list((tree / "build").glob("*/CMakeFiles/*/CMakeCUDACompiler.cmake")), "it would remember that"


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_that_was_installed_later_is_found(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCURV_CUDA_ARCHS", "9.0")
    rest = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join(rest))
        configure(tree, patch)
    if re.search("^CMAKE_CUDA_COMPILER:.*nvcc$", cache_of(tree).read_text(), re.MULTILINE):
        pytest.skip("CMake finds nvcc without PATH")
    monkeypatch.setenv("FASTCURV_CUDA", "1")
    assert "--fresh" not in configure(tree, monkeypatch)[0]
    assert re.search("^CMAKE_CUDA_COMPILER:.*nvcc$", cache_of(tree).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["FASTCURV_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
@pytest.mark.parametrize(
    "value", ["9", "900", "sm90a0", "9.0+PTX+PTX", "Common", "native;9.0", "9,0", "compute_90", ";"]
)
def test_architectures_that_cannot_be_read_are_refused_by_the_name_of_the_variable(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^{name}={value!r}: ".replace("+", r"\+")):
        load(ROOT).cuda_architectures()


def test_architectures_are_read_as_pytorch_and_nvcc_write_them(monkeypatch):
    module = load(ROOT)
    for value, expected in {
        "9.0": "90-real",
        "90": "90-real",
        "sm_90a": "90a-real",
        "9.0+PTX": "90",
        " 8.0, 9.0;10.0a 120-virtual;": "80-real;90-real;100a-real;120-virtual",
        "9.0 9.0": "90-real",
        "Hopper": "90",
        "Ampere;Hopper": "80-real;86;90",
        "blackwell": "100-real;103-real;120-real;121",
        "Ampere+Tegra": "87-real",
        "native": "native",
        "all-major": "all-major",
    }.items():
        monkeypatch.setenv("FASTCURV_CUDA_ARCHS", value)
        assert module.cuda_architectures() == (expected, "FASTCURV_CUDA_ARCHS"), value


def test_a_list_for_pytorch_counts_only_where_ours_is_unset_and_cuda_is_built(monkeypatch):
    module = load(ROOT)
    default = module.cuda_architectures()[0]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    for ours in ("", " "):
        monkeypatch.setenv("FASTCURV_CUDA_ARCHS", ours)
        assert module.cuda_architectures() == ("90", "TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Fermi")
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    assert module.cuda_architectures()[0] == default


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", "4 4", "٤", "99999"])
def test_max_jobs_that_is_no_number_of_jobs_is_refused(value, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(SystemExit, match=f"^MAX_JOBS='{value}': expected how many compilers"):
        load(ROOT).parallel()


@needs_cmake
@pytest.mark.parametrize(("value", "expected"), [(" 3 ", ["--parallel", "3"]), ("", []), (None, [])])
def test_max_jobs_is_honored(tree, monkeypatch, value, expected):
    monkeypatch.setenv("FASTCURV_CUDA", " 0 ")
    if value is not None:
        monkeypatch.setenv("MAX_JOBS", value)
    assert configure(tree, monkeypatch, only_commands=True)[-1][3:] == expected


@needs_cmake
def test_a_setting_of_nothing_counts_as_unset(tree, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    command = configure(tree, monkeypatch, only_commands=True)[0]
    assert "-DFASTCURV_CUDA=auto" in command and "-DFASTCURV_SANITIZE=" in command


@needs_cmake
def test_a_tree_that_was_moved_or_copied_configures(tree, monkeypatch):
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    assert "--fresh" not in configure(tree, monkeypatch)[0]
    assert "--fresh" not in configure(tree, monkeypatch)[0], "an unchanged tree compiles nothing again"
    link = tree.with_name("link")
    link.symlink_to(tree)
    assert "--fresh" not in configure(link, monkeypatch)[0], "nor does another path to it"
    copy = tree.with_name("copy")
    shutil.copytree(tree, copy, symlinks=True)
    assert "--fresh" in configure(copy, monkeypatch)[0]
    assert "--fresh" not in configure(copy, monkeypatch)[0]
    link.unlink()
    moved = tree.rename(tree.with_name("moved"))
    assert "--fresh" in configure(moved, monkeypatch)[0]
    assert f"CMAKE_HOME_DIRECTORY:INTERNAL={moved}/csrc\n" in cache_of(moved).read_text()


@needs_cmake
def test_a_refused_setting_costs_no_compilation(tree, monkeypatch):
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    configure(tree, monkeypatch)
    monkeypatch.setenv("FASTCURV_CUDA", "off")
    with pytest.raises(SystemExit, match="not built: CMake's message is above"):
        configure(tree, monkeypatch)
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    assert "--fresh" not in configure(tree, monkeypatch)[0]


@needs_cmake
def test_a_configuration_that_was_interrupted_is_no_obstacle(tree, monkeypatch):
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    configure(tree, monkeypatch)
    text = cache_of(tree).read_bytes()
    for left in (0, len(text) // 10, len(text) // 2):
        cache_of(tree).write_bytes(text[:left])
        assert load(tree).stale(cache_of(tree))
    assert "--fresh" in configure(tree, monkeypatch)[0]


@needs_cmake
def test_another_compiler_is_not_ignored(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    configure(tree, monkeypatch)
    other = tmp_path / "other-c++"
    other.symlink_to(shutil.which("c++"))
    monkeypatch.setenv("CXX", str(other))
    assert "--fresh" in configure(tree, monkeypatch)[0]
    assert f"={other}\n" in cache_of(tree).read_text()
    assert "--fresh" not in configure(tree, monkeypatch)[0]
    monkeypatch.setenv("CXXFLAGS", "-g")
    assert "--fresh" in configure(tree, monkeypatch)[0]
    monkeypatch.delenv("CXX")
    monkeypatch.delenv("CXXFLAGS")
    assert "--fresh" in configure(tree, monkeypatch)[0]
    assert f"={other}\n" not in cache_of(tree).read_text()


@needs_cmake
@pytest.mark.parametrize("name", ["CMAKE_CXX_COMPILER", "CMAKE_MAKE_PROGRAM", "_Python_INCLUDE_DIR"])
def test_a_tool_that_is_gone_is_no_obstacle(tree, monkeypatch, name):
    monkeypatch.setenv("FASTCURV_CUDA", "0")
    configure(tree, monkeypatch)
    text = cache_of(tree).read_text()
    cache_of(tree).write_text(re.sub(rf"^({name}:\w+)=.*$", r"\1=/gone", text, flags=re.MULTILINE))
    assert "--fresh" in configure(tree, monkeypatch)[0]


def test_the_version_is_written_in_one_place(tree):
    (tree / "fastcurv").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    text = (ROOT / "fastcurv" / "__init__.py").read_text()
    (tree / "fastcurv" / "__init__.py").write_text(re.sub('__version__ = ".*"', '__version__ = "7.8.9"', text))
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "7.8.9"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("given", "expected"), [("", "0 1 python3"), ("auto", "auto 1 python3")])
def test_make_takes_a_variable_of_nothing_as_unset(given, expected):
    show = "show:; @echo $$FASTCURV_CUDA $$OMP_NUM_THREADS $(BOOTSTRAP)"
    environment = {**os.environ, "FASTCURV_CUDA": given, "OMP_NUM_THREADS": "", "BOOTSTRAP": ""}
    command = ["make", "--no-print-directory", "--eval", show, "show"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    if Path("/dev/nvidiactl").exists():
        expected = expected.replace("0 1", "auto 1")
    assert done.stdout.strip() == expected


def test_a_seed_of_the_tests_that_is_no_number_is_refused():
    def collect(seed):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(ROOT / "tests" / "test_setup.py")]
        environment = {**os.environ, "FASTCURV_TEST_SEED": seed}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert collect("").returncode == 0
    done = collect("abc")
    assert done.returncode and "Traceback" not in done.stderr
    assert "FASTCURV_TEST_SEED='abc': expected a whole number" in done.stderr
