"""What the compilers make of the device code, for every architecture of the default build: no GPU needed.

`pytest -s tests/test_compile_gates.py` prints the table of registers.
"""

import functools
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90, 100, 120)
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0;10.0;12.0"  # those of setup.py where there is no GPU
REGISTERS_PER_MULTIPROCESSOR = 65536  # on all of them

pytestmark = pytest.mark.compile


def nvidia_tool(name: str) -> str | None:
    """A binary utility from the CUDA toolkit, or from the Triton wheel, which brings some."""
    if found := shutil.which(name):
        return found
    try:
        import triton.backends.nvidia
    except ImportError:
        return None
    bundled = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return str(bundled) if bundled.exists() else None


def registers_allowed(threads: int, blocks: int) -> int:
    """Per thread, with `blocks` blocks on a multiprocessor; registers are handed out by eights."""
    return REGISTERS_PER_MULTIPROCESSOR // (threads * blocks) // 8 * 8


# What an element of each rule loads and stores, by list: P is stored as the parameter, S as state, E as the type of the
# arithmetic. A list that comes from shared memory was loaded into it. A new rule adds its own line.
SIZES = {"float": 4, "double": 8, "fastcurv::bfloat16": 2, "fastcurv::float16": 2}
ACCESSES = {
    ("Adam", "0"): ("PPSS", "PSS"),
    ("Adam", "1"): ("PPSSS", "PSSS"),
    ("Adam", "2"): ("PPSS", "PSS"),
    ("Adam", "3"): ("PPSS", "PSS"),
    ("Adam", "4"): ("PPSS", "PSS"),
    ("Sgd", "0"): ("PP", "P"),
    ("Sgd", "1"): ("PPS", "PS"),
    ("Lookahead", "0"): ("PE", "PE"),
    ("Ranger", "0"): ("PPSS", "PSS"),
    ("Nero", "0"): ("PP", "P"),
    ("Lars", "0"): ("PPS", "PS"),
    ("Lamb", "0"): ("PPSS", "PSS"),
}
WITH_SUMS = {"Ranger", "Nero", "Lars", "Lamb"}
DTYPE_PAIRS = 5
# Kernels on matrices, and for how many dtypes there are instances. Their dot products contract.
ON_MATRICES = {
    "newton_schulz": 4, "gram_schmidt": 2, "kron_apply": 2, "kron_factor": 14, "kron_inverse": 2, "kron_root": 2,
}  # fmt: skip


def wide_accesses(instance: "Instance") -> tuple[int, int]:
    """How many 16-byte loads and stores a pack of an instance takes at the least."""
    if instance.kernel != "update":
        return 0, 0
    param, state = SIZES[instance.param], SIZES[instance.state]
    size = {"P": param, "S": state, "E": 8 if param == 8 else 4}
    loads, stores = ACCESSES[instance.rule, instance.variant]
    width = 16 // min(size[kind] for kind in loads)
    return sum(size[kind] for kind in loads) * width // 16, sum(size[kind] for kind in stores) * width // 16


class Instance(NamedTuple):
    """A kernel by its template arguments."""

    kernel: str
    rule: str  # empty, as is variant, of a kernel on matrices, whose state is all its other arguments
    param: str
    state: str
    variant: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.rule}<{self.param}, {self.state}, {self.variant}>".replace("fastcurv::", "")


def all_instances() -> Counter[tuple[str, str, str]]:
    kernels = {rule: ["update", *(["partials", "rows"] if rule in WITH_SUMS else [])] for rule, _ in ACCESSES}
    instances = Counter({(k, rule, variant): DTYPE_PAIRS for rule, variant in ACCESSES for k in kernels[rule]})
    return instances + Counter({(kernel, "", ""): dtypes for kernel, dtypes in ON_MATRICES.items()})


@dataclass
class Kernel:
    """One instance of a kernel for one architecture."""

    symbol: str
    instance: Instance
    architecture: int
    registers: int
    stack: int
    local: int
    threads: int
    blocks: int
    accesses: Counter[str]

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.instance}"


# ---- nvcc ----


def dump(module: Path, what: str) -> str:
    """Output of cuobjdump for a module."""
    tool = nvidia_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor in the Triton wheel")
    command = [tool, f"--dump-{what}", str(module)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def digest_of_sources() -> str:
    """A hash of the sources and of the compiler of the device code."""
    found = hashlib.sha256(subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout)
    paths = [*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir(), CSRC / "CMakeLists.txt", ROOT / "setup.py", Path(__file__)]
    for path in sorted(paths):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def instance(symbol: str) -> Instance | None:
    """What a mangled name stands for; None for what is no op's kernel."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    pattern = r"void fastcurv::(\w+)_kernel<fastcurv::(\w+)Rule<([\w:]+), ([\w:]+), (\d)> ?>\(fastcurv::Args\)"
    if found := re.fullmatch(pattern, name):
        return Instance(*found.groups())
    found = re.fullmatch(r"void fastcurv::(\w+)_kernel<([\w:]+)(.*)>\(fastcurv::\w+Args\)", name)
    return Instance(found[1], "", found[2], found[3].removeprefix(", "), "") if found else None


def launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Threads, and blocks per multiprocessor, that each kernel is compiled for."""
    pattern = r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)[^{]*?\.minnctapersm (\d+)"
    return {symbol: (int(threads), int(blocks)) for symbol, threads, blocks in re.findall(pattern, ptx)}


def by_architecture(text: str, kind: str) -> dict[int, str]:
    """The parts of what cuobjdump prints; several of one architecture are joined."""
    parts = re.split(rf"^Fatbin {kind} code:\n=+\narch = sm_(\d+)$", text, flags=re.MULTILINE)
    found: dict[int, str] = {}
    for architecture, part in zip(parts[1::2], parts[2::2], strict=True):
        found[int(architecture)] = found.get(int(architecture), "") + part
    return found


def accesses(sass: str) -> dict[str, Counter[str]]:
    """Counts the memory instructions of each function."""
    parts = re.split(r"^\s*Function : (\w+)$", sass, flags=re.MULTILINE)
    pattern = r"\b(?:LDG|STG|LD|ST|LDL|STL)\.[\w.]+"
    return {name: Counter(re.findall(pattern, body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def inspect(module: Path) -> tuple[list[Kernel], str]:
    """All kernels of a module, and its PTX."""
    (ptx,) = by_architecture(dump(module, "ptx"), "ptx").values()
    bounds, kernels = launch_bounds(ptx), []
    found = {a: accesses(text) for a, text in by_architecture(dump(module, "sass"), "elf").items()}
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    for architecture, text in by_architecture(dump(module, "resource-usage"), "elf").items():
        for symbol, *numbers in re.findall(pattern, text):
            if name := instance(symbol):
                usage = map(int, numbers)
                kernels.append(Kernel(symbol, name, architecture, *usage, *bounds[symbol], found[architecture][symbol]))
    return kernels, ptx


@pytest.fixture(scope="module")
def compiled() -> tuple[list[Kernel], str]:
    """All kernels of the default build, and the PTX in it; compiled once for one state of the sources."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    kept = ROOT / "build" / "gates" / f"{digest_of_sources()}.pickle"
    if not kept.exists():
        environment = {**os.environ, "FASTCURV_CUDA": "1", "FASTCURV_CUDA_ARCHS": DEFAULT_ARCHITECTURES}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(kept.parent)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        (module,) = (kept.parent / "fastcurv").glob("_C*.so")
        kept.write_bytes(pickle.dumps(inspect(module)))
    kernels, ptx = pickle.loads(kept.read_bytes())
    print(f"\n{'kernel':60} registers (of) stack local")
    for k in kernels:
        print(f"{k!s:60} {k.registers:9} ({registers_allowed(k.threads, k.blocks):2}) {k.stack:5} {k.local:5}")
    return kernels, ptx


@pytest.fixture
def kernels(compiled) -> list[Kernel]:
    return compiled[0]


@pytest.fixture
def ptx(compiled) -> str:
    return compiled[1]


def test_every_instance_is_there(kernels):
    for architecture in ARCHITECTURES:
        there = [k.instance for k in kernels if k.architecture == architecture]
        assert Counter((i.kernel, i.rule, i.variant) for i in there) == all_instances()
        assert len(set(there)) == len(there)


def test_every_rule_has_a_line_here():
    rules = {p.stem.removesuffix("_rule").capitalize() for p in CSRC.glob("*_rule.h")}
    assert rules == {rule for rule, _ in ACCESSES}


def test_nothing_spills(kernels):
    assert [(str(k), k.stack, k.local) for k in kernels if k.stack or k.local] == []


def test_registers_leave_room_for_the_blocks_of_the_launch(kernels):
    too_many = [(str(k), k.registers) for k in kernels if k.registers > registers_allowed(k.threads, k.blocks)]
    assert too_many == []


def test_memory_is_accessed_by_16_bytes(kernels):
    for k in kernels:
        loads, stores = wide_accesses(k.instance)
        counts = {
            op: sum(n for i, n in k.accesses.items() if i.startswith(op) and ".128" in i) for op in ("LDG", "STG")
        }
        assert counts["LDG"] >= loads and counts["STG"] >= stores, (k, k.accesses)
        # Generic accesses: the compiler would not know that the lists are in global memory. Local ones: spills.
        assert [i for i in k.accesses if i[:3] not in ("LDG", "STG")] == [], k


def test_ptx_has_no_contraction_and_vector_accesses(ptx):
    """What the driver makes code from on a GPU newer than the build; and the gate where there is no disassembler."""
    bodies = {
        symbol: body for symbol, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL) if instance(symbol)
    }
    assert len(bodies) == all_instances().total()
    for symbol, body in bodies.items():
        assert ("fma." in body) == (instance(symbol).kernel in ON_MATRICES), symbol
        for instruction, count in zip(("ld", "st"), wide_accesses(instance(symbol)), strict=True):
            found = re.findall(rf"\b{instruction}\.global(?:\.v4\.\w32|\.v2\.\w64)\b", body)
            assert len(found) >= count, (symbol, instruction)
