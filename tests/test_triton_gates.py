"""The Triton kernels compiled ahead of time for every architecture of the default build: no GPU needed.

`pytest -s tests/test_triton_gates.py` prints the table of registers.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

# The suite may run in Triton's interpreter, which is decided at import: a process of its own compiles.
COMPILE = r"""
import importlib, json, pathlib, re, subprocess, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget

adam = importlib.import_module("fastcurv.kernels.adam")
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
PAIRS = {"float32": (tl.float32, tl.float32), "float64": (tl.float64, tl.float64), "bfloat16": (tl.bfloat16, tl.float32),
         "float16": (tl.float16, tl.float32), "float32-bfloat16": (tl.float32, tl.bfloat16)}

def compile(pair, architecture, amsgrad):
    param, state = PAIRS[pair]
    kernel = adam._adam_kernel
    constants = dict(grad_scale_ptr=None, PARAM=param, STATE=state, DECOUPLED=True, AMSGRAD=amsgrad, MAXIMIZE=False,
                     COMPUTE=tl.float64 if pair == "float64" else tl.float32, BLOCK=adam.BLOCK)
    types = {"table_ptr": "*i64", "found_inf_ptr": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32),
                           options={"num_warps": 4, "enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"]); file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], check=True,
                               capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    ptx = built.asm["ptx"]
    wide = {i: len(re.findall(rf"\b{i}\.global(?:\.\w+)*?\.(?:v4\.b32|v2\.b64)", ptx)) for i in ("ld", "st")}
    return dict(pair=pair, architecture=architecture, amsgrad=amsgrad, registers=registers, stack=stack, local=local,
                contractions=len(re.findall(r"\bfma\.rn\.f", ptx)), **wide)

rows = [compile(p, a, False) for p in PAIRS for a in (80, 90, 100, 120)] + [compile(p, 90, True) for p in PAIRS]
print(json.dumps(rows))
"""
SIZES = {"float32": (4, 4), "float64": (8, 8), "bfloat16": (2, 4), "float16": (2, 4), "float32-bfloat16": (4, 2)}
ELEMENTS = 1024 // 128  # of a block, for each thread


@pytest.fixture(scope="module")
def kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    for row in rows:
        print(row)
    return rows


def test_nothing_spills(kernels):
    assert [k for k in kernels if k["local"] or k["stack"]] == []


def loaded(kernel):
    """Bytes that a thread loads before it uses the first."""
    param, state = SIZES[kernel["pair"]]
    return (2 * param + (3 if kernel["amsgrad"] else 2) * state) * ELEMENTS


def test_registers_leave_room_for_enough_loads(kernels):
    """The warps that fit by their registers keep as many bytes on their way as an H200 needs: latency times bandwidth.

    That is 29 KB a multiprocessor: 0.8 us times 4.8 TB/s over 132 of them.
    """
    for k in kernels:
        warps = 65536 // (32 * -(-k["registers"] // 8) * 8) // 4 * 4
        assert warps * 32 * loaded(k) >= 29_000, k


def test_memory_is_accessed_by_16_bytes(kernels):
    for k in kernels:
        param, _ = SIZES[k["pair"]]
        assert k["ld"] >= loaded(k) // 16, k
        assert k["st"] >= (loaded(k) - param * ELEMENTS) // 16, k


def test_no_contraction(kernels):
    assert [k for k in kernels if k["contractions"]] == []
