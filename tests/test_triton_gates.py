"""The Triton kernels compiled ahead of time for every architecture of the default build: no GPU needed.

`pytest -s tests/test_triton_gates.py` prints the table of registers.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from packaging.version import Version

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

# The suite may run in Triton's interpreter, which is decided at import: a process of its own compiles. It calls the
# ops' implementations; a stand-in for Triton's driver names the architecture, and every launch ends after compilation.
COMPILE = r"""
import importlib, inspect, json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from fastcurv import _check, ops

name, calls, PAIRS = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
built, launch = [], JITFunction.run

class Driver:
    def get_current_target(self): return GPUTarget("cuda", self.architecture, 32)
    def get_current_device(self): return self.architecture
    def get_current_stream(self, device): return 0

def compile_only(self, *arguments, grid, warmup, **keywords):
    built.append((self.__name__, launch(self, *arguments, grid=grid, warmup=True, **keywords)))

driver, JITFunction.run = Driver(), compile_only
triton.runtime.driver.set_active(driver)

def usage(code):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"]); file.flush()
        found = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], check=True,
                               capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", found).groups())
    return dict(registers=registers, stack=stack, local=local, shared=code.metadata.shared, hash=code.hash)
"""
OVER_LISTS = r"""
op = getattr(ops, name + "_")

def call(architecture, pair, options, present, scalars):
    driver.architecture = architecture
    dtypes = [getattr(torch, d) for d in PAIRS[pair]]
    param, lists = torch.empty(16, dtype=dtypes[0]), []
    for l in op.lists:
        kind = "param" if l == "grads" else _check.kind(l)
        shape, dtype = _check.template(kind, param, dtypes[1])
        lists.append([] if l in op.optional and l not in present else [torch.empty(shape, dtype=dtype)])
    arguments = {k: p.default for k, p in inspect.signature(op._check_arguments).parameters.items()
                 if p.kind is p.KEYWORD_ONLY and k != "backend"}
    arguments |= {**dict.fromkeys(op.scalars, scalars), **options, "found_inf": torch.zeros(4)}
    table = torch.zeros(64, dtype=torch.int64), 1, int(op.rows(arguments) > -2)
    built.clear()
    getattr(importlib.import_module("fastcurv.kernels." + name), name + "_")(*lists, table, **arguments)
    return list(built)

def row(kernel, code, architecture, pair, options, present):
    ptx = code.asm["ptx"]
    wide = {i: len(re.findall(rf"\b{i}\.global(?:\.\w+)*?\.(?:v4\.b32|v2\.b64)", ptx)) for i in ("ld", "st")}
    return dict(op=name, kernel=kernel, pair=pair, architecture=architecture, options=options, present=present,
                contractions=len(re.findall(r"\bfma\.rn\.f", ptx)), **usage(code), **wide)

print(json.dumps([row(*kernel, *c[:4]) for c in calls for kernel in call(*c)]))
"""
CALL_ON_MATRICES = r"""
def call(architecture, shape, dtype, options):
    driver.architecture = architecture
    matrix = torch.empty(shape, dtype=getattr(torch, dtype))
    if "dtype" in options: options = options | {"dtype": getattr(torch, options["dtype"])}
    built.clear()
    module, info = importlib.import_module("fastcurv.kernels." + name), torch.ones(1, dtype=torch.int32)
    if name == "kron_factor":
        wide = torch.promote_types(matrix.dtype, torch.float32)
        options = {"decay": 0.5, "scale": [0.5], "has_ones": False, "patches": [[]]} | options
        factor, empty = torch.empty(shape[1], shape[1], dtype=wide), torch.empty(0)
        module.kron_factor_([factor], [matrix], [], torch.zeros(1, dtype=torch.float64), info, empty, **options)
    elif name == "kron_root":
        module.kron_root([matrix], [matrix], [], info, torch.zeros(1, dtype=torch.float64), **options)
    else:
        getattr(module, name)([matrix], [matrix], info, **options)
    return {code.hash: (kernel, code) for kernel, code in built}.values()
"""
CALL_ON_LAYERS = r"""
def call(architecture, shape, dtype, options):
    driver.architecture = architecture
    (d, a), m, form = shape, 64, options["form"]
    def tensors(*shape): return [torch.empty(shape, dtype=getattr(torch, dtype))]
    lists = [tensors(m, d) if form == "samples" else tensors(d, a), tensors(d, d), tensors(a, a),
             tensors(m, a) if form == "samples" else [], *([tensors(d), tensors(a)] if form == "stein" else [[], []])]
    built.clear()
    implementation = getattr(importlib.import_module("fastcurv.kernels." + name), name)
    outs = tensors(d, a), torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int32), torch.zeros(0)
    implementation(*lists, *outs)
    return {code.hash: (kernel, code) for kernel, code in built}.values()
"""
REPORT = r"""
UNITS = {"mma": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
print(json.dumps([
    dict(kernel=kernel, architecture=c[0], shape=c[1], stored=c[2], options=c[3],
         products=[unit for unit, name in UNITS.items() if re.search(name, code.asm["ptx"])],
         tf32=".tf32" in code.asm["ptx"], **usage(code))
    for c in calls for kernel, code in call(*c)
]))
"""
ON_MATRICES, ON_LAYERS = CALL_ON_MATRICES + REPORT, CALL_ON_LAYERS + REPORT
PAIRS = {
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
    "bfloat16": ("bfloat16", "float32"),
    "float16": ("float16", "float32"),
    "float32-bfloat16": ("float32", "bfloat16"),
}
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
VARIANTS = {
    "adam": (
        [{"rule": "adam", "decoupled_weight_decay": True}, []],
        [{"rule": "amsgrad"}, ["max_exp_avg_sqs"]],
        [{"rule": "radam"}, []],
        [{"rule": "nadam"}, ["mu_products"]],
        [{"rule": "yogi"}, []],
    ),
    "sgd": ([{}, []], [{}, ["momentum_buffers"]]),
    "lookahead": ([{}, []],),
    "ranger": ([{}, []], [{"use_gc": False}, []]),
    "nero": ([{}, []],),
    "lars": ([{}, []],),
    "lamb": ([{}, []], [{"adaptive": False}, []]),
}
# Lists that an element needs, stored as the parameters, as the state, and in float32 or float64: read and written in
# the update, then in the first pass over rows.
LISTS = {
    "adam": ("ppss", "pss", "", ""),
    "sgd": ("pp", "p", "", ""),
    "lookahead": ("pt", "pt", "", ""),
    "ranger": ("ppsst", "psst", "p", ""),
    "nero": ("pp", "p", "pp", ""),
    "lars": ("pps", "ps", "pp", ""),
    "lamb": ("pss", "p", "ppss", "ss"),
}


def compiled(op, calls, how=OVER_LISTS):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE + how, op, json.dumps(calls), json.dumps(PAIRS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request):
    """Every dtype for one architecture, float32 for the others (a kernel with rows takes seconds)."""
    variants = VARIANTS[request.param]
    calls = [(90, pair, *variant, 0.1) for pair in PAIRS for variant in variants]
    calls += [(architecture, "float32", *variants[0], 0.1) for architecture in (80, 100, 120)]
    rows = compiled(request.param, calls)
    for row in rows:
        print({key: value for key, value in row.items() if key != "hash"})
    return rows


def sizes(kernel, letters):
    """Bytes of the elements that stand in lists."""
    param, state = (SIZES[d] for d in PAIRS[kernel["pair"]])
    return [{"p": param, "s": state, "t": 8 if param == 8 else 4}[letter] for letter in letters]


def has_rows(kernel):
    options = kernel["options"]
    return LISTS[kernel["op"]][2] and options.get("use_gc", True) and options.get("adaptive", True)


def wide_accesses(kernel, letters, first_letters):
    """The least 16-byte accesses of a thread, in the whole blocks of runs and in the two tiles of rows."""
    in_runs = sum(size * 8 // 16 for size in sizes(kernel, letters))
    if kernel["kernel"] == "partials_kernel":
        return sum(size * 8 // 16 for size in sizes(kernel, first_letters))
    if not has_rows(kernel):
        return in_runs
    tile = 8 if 2 in sizes(kernel, "".join(LISTS[kernel["op"]])) else 4
    update, first = (sum(size * tile // 16 for size in sizes(kernel, x)) for x in (letters, first_letters))
    return in_runs + 2 * update + 3 * first


def test_every_kernel_holds_the_gates(kernels):
    """No spills, no contraction, and 16-byte accesses.

    But for 8 bytes in kernels without rows: ptxas spills so much of Lookahead's for sm_120 to fit in one more block, and
    what forbids it that (`maxnreg`) costs the others registers.
    """
    for k in kernels:
        assert k["stack"] <= (0 if has_rows(k) else 8), k
        assert (k["local"], k["contractions"]) == (0, 0), k
        if k["kernel"] != "finish_kernel":
            read, written, first_read, first_written = LISTS[k["op"]]
            extra = "s" * (k["present"] in (["max_exp_avg_sqs"], ["momentum_buffers"]))
            assert k["ld"] >= wide_accesses(k, read + extra, first_read), k
            assert k["st"] >= wide_accesses(k, written + extra, first_written), k


def test_registers_leave_room_for_enough_loads(kernels):
    """The warps that fit by their registers keep as many bytes on their way as an H200 needs: latency times bandwidth.

    That is 29 KB a multiprocessor: 0.8 us times 4.8 TB/s over 132 of them. Kernels with rows have more code and fall
    short of it in some dtypes: theirs are only printed.
    """
    for k in kernels:
        if not has_rows(k):
            warps = 65536 // (32 * -(-k["registers"] // 8) * 8) // 4 * 4
            # Ranger's slow weights are loaded later, where they are; LAMB loads the gradient, too.
            loaded = 8 * sum(sizes(k, {"ranger": "ppss", "lamb": "ppss"}.get(k["op"], LISTS[k["op"]][0])))
            assert min(warps, 64) * 32 * loaded >= 29_000, k


@pytest.mark.parametrize("op", ["sgd", "ranger"])
def test_hyper_parameters_are_not_compiled_in(op):
    options = [{"k": k} for k in (1, 2, 16)] if op == "ranger" else [{}] * 3
    calls = [
        (90, "float32", {"use_gc": False, **o} if o else o, [], x)
        for o, x in zip(options, (0.0, 1.0, 0.1), strict=True)
    ]
    assert len({row["hash"] for row in compiled(op, calls)}) == 1


def triton_is(version):
    return Version(importlib.metadata.version("triton")) >= Version(version)


def spilled(architecture):
    """Bytes that ptxas may spill of a product to fit one more block into a multiprocessor: one float64 or two."""
    if architecture < 100:
        return 0
    return 16 if architecture == 120 and triton_is("3.8") else 8


# Shapes on both sides of where tiles grow and splits begin.
STEPS = {"coefficients": [[3.4445, -4.7750, 2.0315]], "spectral": 0, "eps": 0.0}
MATRIX_CALLS = {
    "kron_factor": [
        ((1000, features), dtype, {"dtype": sums})
        for features in (64, 785)
        for dtype, sums in (("float32", "float32"), ("bfloat16", "float64"), ("float64", "float64"))
    ],
    "gram_schmidt": [((64, 576), dtype, {"floor": 0.0}) for dtype in ("float32", "float64")],
    "kron_root": [((n, n), dtype, {"p": 4}) for n in (64, 576) for dtype in ("float32", "float64")],
    "newton_schulz": [
        ((64, 576), "float16", STEPS | {"dtype": "float32"}),
        *(
            (shape, dtype, STEPS | {"dtype": "float32", "spectral": spectral, "eps": 0.0})
            for shape in ((64, 576), (512, 4608))
            for dtype in ("float32", "float64")
            for spectral in (0, 300)
        ),
        *(
            (shape, dtype, STEPS | {"dtype": "bfloat16"})
            for shape in ((64, 576), (512, 4608), (2048, 4096))
            for dtype in ("float32", "bfloat16")
        ),
    ],
}


@pytest.mark.parametrize("op", MATRIX_CALLS)
def test_kernels_on_matrices_hold_the_gates(op):
    """No spills, shared memory that every GPU of the architecture has, tensor cores where they are exact enough.

    The exception is a few bytes from sm_100 on, where ptxas fits in one more block.
    """
    calls = [(architecture, *call) for architecture in (80, 90, 100, 120) for call in MATRIX_CALLS[op]]
    for k in compiled(op, calls, ON_MATRICES):
        print({key: value for key, value in k.items() if key != "hash"})
        assert k["stack"] <= spilled(k["architecture"]), k
        assert (k["local"], k["tf32"]) == (0, False), k
        assert k["shared"] <= (99 if k["architecture"] == 120 else 163) * 1024, k
        if k["options"].get("dtype") == "bfloat16" and k["kernel"] in ("symmetric_kernel", "product_kernel"):
            assert k["products"] == [{90: "wgmma", 100: "tcgen05"}.get(k["architecture"], "mma")], k


def test_kernels_on_layers_hold_the_gates():
    """No spills, and no TF32.

    The exception is a few bytes in float64, where ptxas fits in one more block: from sm_100 on, and on sm_90 from Triton 3.9 on.
    """
    calls = [
        (architecture, shape, dtype, {"form": form})
        for architecture in (80, 90, 100, 120)
        for shape in ((64, 100), (500, 1001))
        for dtype in ("float32", "float64")
        for form in ("plain", "samples", "stein")
        if architecture == 90 or form == "plain"
    ]
    for k in compiled("kron_apply", calls, ON_LAYERS):
        print({key: value for key, value in k.items() if key != "hash"})
        allowed = 8 if k["architecture"] == 90 and triton_is("3.9") else spilled(k["architecture"])
        assert k["stack"] <= (allowed if k["stored"] == "float64" else 0), k
        assert (k["local"], k["tf32"]) == (0, False), k
        assert k["shared"] <= (99 if k["architecture"] == 120 else 163) * 1024, k
