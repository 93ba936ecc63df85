"""What the compilers make of the device code, for every architecture of the default build: no GPU needed.

`pytest -s tests/test_compile_gates.py` prints the table of registers.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 90, 100, 120)
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


# Which 16-byte loads and stores an instance makes at the least: (bytes per element loaded, stored) per instance, and
# how many elements it takes at a time. A new kernel adds its own function here.
SIZES = {"float": 4, "double": 8, "fastcurv::bfloat16": 2, "fastcurv::float16": 2}


def adam_accesses(arguments: list[str]) -> tuple[int, int]:
    param, state, rule = arguments
    param, state = SIZES[param], SIZES[state]
    width = 16 // min(param, state)
    moments = 3 if rule == "1" else 2
    return (2 * param + moments * state) * width // 16, (param + moments * state) * width // 16


WIDE_ACCESSES = {"adam": adam_accesses}
INSTANCES = {"adam": 10}


@dataclass
class Kernel:
    """One instance of a kernel for one architecture."""

    symbol: str
    op: str
    arguments: list[str]  # of the template
    architecture: int
    registers: int
    stack: int
    spills: int
    threads: int
    blocks: int
    sass: str

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.op}<{', '.join(self.arguments)}>"


# ---- nvcc ----


def nvcc(source: Path, output: Path, *options: str) -> str:
    """Compiles as CMakeLists.txt does, and returns what nvcc printed."""
    lists = (CSRC / "CMakeLists.txt").read_text()
    flags = re.search(r'set\(CMAKE_CUDA_FLAGS_RELEASE "([^"]*)"\)', lists)[1].split()
    flags += re.search(r"set\(cuda_flags ([^)]*)\)", lists)[1].split()
    command = ["nvcc", "-std=c++17", *flags, f"-I{CSRC}", *options, str(source), "-o", str(output)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def instance(symbol: str) -> tuple[str, list[str]] | None:
    """Op and template arguments of a kernel by its mangled name; None for what is no op's kernel."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    found = re.fullmatch(r"void fastcurv::(\w+)_kernel<(.*)>\(.*\)", name)
    if found is None:
        return None
    return found[1], [re.sub(r"\(fastcurv::\w+\)", "", argument) for argument in found[2].split(", ")]


def launch_bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Threads, and blocks per multiprocessor, that each kernel is compiled for."""
    pattern = r"\.entry (\w+)\(.*?\)\s*\.maxntid (\d+)[^{]*?\.minnctapersm (\d+)"
    return {symbol: (int(threads), int(blocks)) for symbol, threads, blocks in re.findall(pattern, ptx, re.DOTALL)}


def functions_of(sass: str) -> dict[str, str]:
    parts = re.split(r"^\.text\.(\w+):", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def ptx(tmp_path_factory) -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    output = tmp_path_factory.mktemp("ptx")
    texts = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        nvcc(source, output / f"{source.stem}.ptx", "-ptx", "-arch=compute_80")
        texts.append((output / f"{source.stem}.ptx").read_text())
    return "\n".join(texts)


@pytest.fixture(scope="module")
def kernels(ptx, tmp_path_factory) -> list[Kernel]:
    output = tmp_path_factory.mktemp("cubin")
    disassembler = nvidia_tool("nvdisasm")
    bounds = launch_bounds(ptx)

    def compile_one(job) -> Iterator[Kernel]:
        source, architecture = job
        cubin = output / f"{source.stem}_{architecture}.cubin"
        log = nvcc(source, cubin, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v")
        sass = {}
        if disassembler:
            text = subprocess.run([disassembler, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
            sass = functions_of(text)
        for report in log.split("Compiling entry function ")[1:]:
            symbol = re.match(r"'(\w+)'", report)[1]
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
            ).groups()
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            if found := instance(symbol):
                numbers = (registers, int(stack), int(stores) + int(loads))
                yield Kernel(symbol, *found, architecture, *numbers, *bounds[symbol], sass.get(symbol, ""))

    jobs = [(source, a) for a in ARCHITECTURES for source in sorted((CSRC / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        found = [kernel for batch in pool.map(lambda job: list(compile_one(job)), jobs) for kernel in batch]
    print(f"\n{'kernel':68} registers (of) stack spills")
    for k in found:
        print(f"{k!s:68} {k.registers:9} ({registers_allowed(k.threads, k.blocks):2}) {k.stack:5} {k.spills:6}")
    return found


def test_every_instance_is_there(kernels):
    counts = {
        op: {a: sum(k.op == op and k.architecture == a for k in kernels) for a in ARCHITECTURES} for op in INSTANCES
    }
    assert counts == {op: dict.fromkeys(ARCHITECTURES, count) for op, count in INSTANCES.items()}
    assert {k.op for k in kernels} == set(INSTANCES)


def test_nothing_spills(kernels):
    assert [(str(k), k.stack, k.spills) for k in kernels if k.stack or k.spills] == []


def test_registers_leave_room_for_the_blocks_of_the_launch(kernels):
    too_many = [(str(k), k.registers) for k in kernels if k.registers > registers_allowed(k.threads, k.blocks)]
    assert too_many == []


def test_memory_is_accessed_by_16_bytes(kernels):
    if not kernels[0].sass:
        pytest.skip("nvdisasm is neither on PATH nor in the Triton wheel")
    for k in kernels:
        loads, stores = WIDE_ACCESSES[k.op](k.arguments)
        assert len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", k.sass)) >= loads, k
        assert len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", k.sass)) >= stores, k
        # Generic accesses: the compiler would not know that the lists are in global memory. Local ones: spills.
        assert re.findall(r"\b(?:LD|ST|LDL|STL)\.[\w.]+", k.sass) == [], k


def test_ptx_has_no_contraction_and_vector_accesses(ptx):
    """What the driver makes code from on a GPU newer than the build; and the gate where there is no disassembler."""
    bodies = {
        symbol: body for symbol, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL) if instance(symbol)
    }
    assert len(bodies) == sum(INSTANCES.values())
    for symbol, body in bodies.items():
        op, arguments = instance(symbol)
        assert "fma." not in body, symbol
        for instruction, count in zip(("ld", "st"), WIDE_ACCESSES[op](arguments), strict=True):
            found = re.findall(rf"\b{instruction}\.global(?:\.v4\.\w32|\.v2\.\w64)\b", body)
            assert len(found) >= count, (symbol, instruction)
