"""The laws of the layout: one name per op in every tree, one-way imports, equal signatures, and what is shipped."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from fastcurv import _backend

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
pytestmark = pytest.mark.skipif(not TRACKED, reason="needs the git checkout")

# Where an op has its files. (op, tree): why it has none there.
TREES = {
    "csrc/cpu/{}.cpp", "csrc/cuda/{}.cuh", "csrc/cuda/{}.cu", "kernels/{}.py", "fastcurv/ops/{}.py",
    "fastcurv/reference/{}.py", "tests/test_{}.py", "bench/bench_{}.py",
}  # fmt: skip
ON_GPUS = "on GPUs polar is newton_schulz, with the schedule of ops/polar.py"
BENCH = "one table compares all ways to orthogonalise: bench_orthogonalize.py"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("polar", "csrc/cuda/{}.cuh"): ON_GPUS,
    ("polar", "csrc/cuda/{}.cu"): ON_GPUS,
    ("polar", "kernels/{}.py"): ON_GPUS,
    **{(op, "bench/bench_{}.py"): BENCH for op in _backend.MATRIX_OPS},
    ("kron_inverse", "kernels/{}.py"): "a factorisation is a chain of small panels",
}
ALL_OPS = _backend.OPS + _backend.MATRIX_OPS + _backend.KRON_OPS
# What is allocated by an op, most of it to be returned, and an argument of its implementations.
RETURNED = {
    "kron_apply": ("updates", "products", "info"),
    "kron_factor": ("traces", "info"),
    "kron_inverse": ("inverses", "info"),
    "kron_root": ("roots", "info"),
}
# A work space, what an op tells its implementation for parts of a matrix, and what it takes apart.
OWN = {"table", "floor", "workspace", "left_values", "right_values"}
# What the public calls it whose ways are ops (orthogonalize), or calls of torch (kron_eigh).
PUBLIC = {"orthogonalize", "kron_eigh"}


@pytest.mark.parametrize("op", ALL_OPS)
def test_an_op_has_its_file_in_every_tree(op):
    missing = {tree for tree in TREES if not (ROOT / tree.format(op)).exists()}
    assert missing == {tree for name, tree in EXCEPTIONS if name == op}


def test_every_file_of_the_trees_belongs_to_an_op():
    for folder in ("kernels", "fastcurv/ops", "fastcurv/reference"):
        names = {p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_")}
        assert names <= set(ALL_OPS) | PUBLIC, folder
    assert {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")} <= set(ALL_OPS) | PUBLIC


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)


# package: what of fastcurv it must not import, even inside a function.
FORBIDDEN = {
    "fastcurv/reference": r"fastcurv(?!\.reference)",
    "kernels": r"fastcurv",
    "fastcurv/ops": r"fastcurv\.(optim|cli|bench|demo|kernels|reference)",
    "fastcurv/optim": r"fastcurv\.(cli|bench|demo|kernels|reference|_C|_backend)",
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    for path in (ROOT / package).glob("*.py"):
        bad = [name for name in imports(path) if re.match(FORBIDDEN[package], name)]
        assert not bad, (path.name, bad)


def test_native_code_includes_no_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_device_code_includes_only_ours():
    ours = {p.name for p in (ROOT / "csrc").rglob("*.*")}
    names = ("numeric.h", "table.h", "rule.h", "schedule.h", "matrices.h", "kron.h", "kron_apply.h")
    shared = [ROOT / "csrc" / name for name in names]
    for path in [*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc").glob("*_rule.h"), *shared]:
        assert set(re.findall(r"#include\s*[<\"]([^>\"]+)", path.read_text())) <= ours, path


def name_of(op):
    return f"{op}_" if op in _backend.IN_PLACE else op


@pytest.mark.parametrize("op", ALL_OPS)
def test_implementations_share_one_signature(op):
    reference = inspect.signature(getattr(importlib.import_module(f"fastcurv.reference.{op}"), name_of(op)))
    stub = ast.parse((ROOT / "fastcurv/_C.pyi").read_text())
    stubs = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    keywords = [p.name for p in reference.parameters.values() if p.kind is p.KEYWORD_ONLY]
    names = [p.name for p in reference.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    stub = stubs[name_of(op)].args
    assert [a.arg for a in stub.args] == names and [a.arg for a in stub.kwonlyargs] == keywords
    assert (f"{op}_kernel" in stubs) is ((op, "csrc/cuda/{}.cuh") not in EXCEPTIONS)
    if _backend.native() is not None:
        line = getattr(_backend.native(), name_of(op)).__doc__.splitlines()[0]
        assert re.findall(r"(\w+):", line[line.index("(") :]) == [*names, *keywords]
        assert line.count("*, ") == bool(keywords)
        if keywords:
            assert line.index("*, ") < line.index(keywords[0]) and line.index("*, ") > line.index(names[-1])
    if (op, "kernels/{}.py") not in EXCEPTIONS:
        pytest.importorskip("triton")
        kernels = importlib.import_module(f"fastcurv.kernels.{op}")
        assert inspect.signature(getattr(kernels, name_of(op))) == reference


@pytest.mark.parametrize("op", ALL_OPS)
def test_the_op_takes_what_its_reference_takes_and_returns_the_rest(op):
    public = inspect.signature(getattr(importlib.import_module(f"fastcurv.ops.{op}"), name_of(op)))
    reference = inspect.signature(getattr(importlib.import_module(f"fastcurv.reference.{op}"), name_of(op)))
    # Which way, and by which implementation, is the public function's to decide.
    own = [name for name in public.parameters if name not in ("method", "backend")]
    theirs = [name for name in reference.parameters if name not in OWN.union(RETURNED.get(op, ()))]
    assert own == theirs or (op in RETURNED and sorted(own) == sorted(theirs))
    assert (public.return_annotation == "None") is (op not in RETURNED)


def test_package_list_matches_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {folder: package for package, folder in settings["package-dir"].items()}
    found = {str(p.parent.relative_to(ROOT)) for p in ROOT.glob("fastcurv/**/__init__.py")} | set(mapped)
    assert sorted(settings["packages"]) == sorted(mapped.get(name, name.replace("/", ".")) for name in found)


def test_files_stay_small():
    long = {}
    for name in TRACKED:
        if name.endswith((".py", ".cpp", ".cu", ".cuh", ".h", ".pyi")) and (ROOT / name).exists():
            lines = (ROOT / name).read_text().count("\n")
            if lines > 420:
                long[name] = lines
    assert not long


def test_top_level_is_fixed():
    allowed = {
        "pyproject.toml", "setup.py", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE",
        "MANIFEST.in", ".clang-format", ".pre-commit-config.yaml", ".gitignore", ".ci", ".github", "csrc", "kernels", "fastcurv", "tests", "bench", "docs",
    }  # fmt: skip
    assert {name.split("/")[0] for name in TRACKED} <= allowed


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist and a pure wheel of this checkout (compiling is tested by .ci/run)."""
    pytest.importorskip("setuptools")
    target = tmp_path_factory.mktemp("dist")
    source = target / "source"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(source)], check=True)
    for name in TRACKED:  # what stands in the tree, committed or not
        if (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b, sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "sdist", str(target)], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(target.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_sdist_holds_all_sources(distributions):
    wanted = [
        n for n in TRACKED if n.startswith(("csrc/", "kernels/", "fastcurv/", "setup.py", "pyproject.toml", "LICENSE"))
    ]
    wanted += [n for n in TRACKED if n.startswith("bench/") and n.endswith((".py", ".toml"))]
    assert set(wanted) <= distributions


def test_wheel_holds_the_package_and_nothing_else():
    """The wheel of the last build, when .ci/run made one."""
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        pytest.skip("no wheel was built; .ci/run builds one and runs this test on it")
    names = set(zipfile.ZipFile(wheels[-1]).namelist())
    assert any(re.fullmatch(r"fastcurv/_C\..*\.so", n) for n in names)
    assert {"fastcurv/py.typed", "fastcurv/_C.pyi", "fastcurv/bench/targets.toml"} <= names
    python = {n for n in TRACKED if n.startswith("fastcurv/") and n.endswith(".py")}
    python |= {"fastcurv/" + n for n in TRACKED if re.fullmatch(r"(kernels|bench)/\w+\.py", n)}
    assert python == {n for n in names if n.endswith(".py")}
    assert all(n.startswith("fastcurv") and not n.startswith("fastcurv/bench/results/") for n in names)


# Whose result is on the default device, unless they are told another.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def test_every_allocation_names_its_device():
    """The default device is the user's: a table or a workspace on it would be read where it is not."""
    nameless = []
    for path in sorted([*(ROOT / "fastcurv").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        if path.name == "demo.py":  # a program, not a part of the library
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "_alloc")
            names = [keyword.arg for keyword in node.keywords]
            if is_torch and node.func.attr in FACTORIES and not {"device", None} & set(names):
                nameless.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not nameless
