"""Facts about the native extension: one OpenMP runtime, the GIL, the fallback, the clones, no torch in the binary."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cases
import pytest
import torch
from cases import assert_same_bits, make_case

import fastcurv
from fastcurv import _backend, ops

native = _backend.native()
pytestmark = pytest.mark.skipif(native is None, reason="fastcurv._C is not built")

# A child has to settle the same things as conftest.py does, and as little as possible beyond.
CASE = """
import sys, torch
sys.path.insert(0, {tests!r})
from cases import *
torch.save([run(make_case(op, dtype=d, device=CPU, **options_of(op, name, CPU)), "cpp").arguments
            for op in OPTIONS for name in OPTIONS[op] for d in DTYPES], sys.argv[1])
"""


def child(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment}, check=True, capture_output=True, text=True, cwd="/",
    ).stdout  # fmt: skip


@pytest.mark.parametrize("order", ["import torch, fastcurv", "import fastcurv._C, torch, fastcurv"])
def test_one_openmp_runtime(order):
    pytest.importorskip("threadpoolctl")
    run = "fastcurv.ops.adam_([torch.ones(99999)], [torch.ones(99999)], [torch.zeros(99999)], [torch.zeros(99999)], [], [], [torch.zeros(())])"
    count = "print(sum(p['user_api'] == 'openmp' for p in threadpoolctl.threadpool_info()))"
    assert child(f"{order}; import threadpoolctl; torch.ones(99999).add_(1); {run}; {count}").strip() == "1"


def test_thread_count_follows_torch():
    """Measured by CPU time per wall time: one thread cannot use more than one core."""
    case = make_case("adam", [(1 << 22,)], device=torch.device("cpu"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            ops.adam_(*case.arguments, **case.options, backend="cpp")
        assert time.process_time() - cpu <= 1.1 * (time.perf_counter() - wall) + 0.01
    finally:
        torch.set_num_threads(before)


def test_gil_is_released_while_computing():
    case = make_case("adam", [(1 << 24,)], device=torch.device("cpu"))
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    worker = threading.Thread(target=tick)
    worker.start()
    try:
        start = time.perf_counter()
        ops.adam_(*case.arguments, **case.options, backend="cpp")
        end = time.perf_counter()
    finally:
        stop.set()
        worker.join()
    during = sum(start < t < end for t in ticks)
    assert during >= min(5, (end - start) / 0.01), (during, end - start)


def test_fallback_without_the_exchange_api(generator):
    case = make_case("adam", generator=generator, device=torch.device("cpu"))
    expected = cases.run(case, "cpp")
    assert native.exchange_api(), "torch 2.11 and later offer it"
    try:
        native.set_exchange_api(False)
        assert not native.exchange_api()
        assert_same_bits(cases.run(case, "cpp"), expected)
        with pytest.raises(ValueError, match="expected a dense tensor"):
            ops.adam_(
                [torch.ones(3)], [torch.ones(3).to_sparse()], [torch.ones(3)], [torch.ones(3)], [], [], [torch.ones(())]
            )
    finally:
        native.set_exchange_api(True)


def test_baseline_clone_gives_the_same_bits(tmp_path):
    """FASTCURV_SIMD=default against what this processor runs otherwise: every op, its options, and dtypes."""
    code = CASE.format(tests=str(Path(__file__).parent))
    files = [str(tmp_path / name) for name in ("default", "best")]
    child(code, files[0], FASTCURV_SIMD="default")
    child(code, files[1], FASTCURV_SIMD="")
    print_level = "import fastcurv; print(fastcurv._backend.native().simd_level())"
    assert child(print_level, FASTCURV_SIMD="default").strip() == "default"
    for default, best in zip(*(torch.load(f) for f in files), strict=True):
        for a_list, b_list in zip(default, best, strict=True):
            for a, b in zip(a_list, b_list, strict=True):
                assert torch.equal(cases.bits(a), cases.bits(b))


@pytest.mark.parametrize("value", ["x86-64-v5", "0", " "])
def test_simd_level_that_does_not_exist_is_refused_at_first_use(value):
    code = (
        "import fastcurv, torch\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "for call in (fastcurv.AdamW([p], lr=0.1).step, lambda: fastcurv.ops.orthogonalize([torch.eye(3)])):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error, p.tolist())\n"
        "print({row.reason for row in fastcurv.backends() if row.backend == 'cpp'})\n"
        "from fastcurv import cli; cli.main(['info'])"
    )
    told = f"FASTCURV_SIMD='{value}': expected default, x86-64-v3 or x86-64-v4"
    out = child(code, FASTCURV_SIMD=value).splitlines()
    assert out[0].startswith(told) and out[0].endswith("[1.0, 1.0, 1.0]") and out[1].startswith(told)
    assert told in out[2] and any(line.startswith(f"SIMD level         {told}") for line in out)
    done = subprocess.run(
        [sys.executable, "-m", "fastcurv", "bench"], env={**os.environ, "FASTCURV_SIMD": value},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("value", ["true", "2", "yes", "maybe"])
def test_triton_interpret_other_than_0_or_1_is_refused(value, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    reason = _backend.unusable("adam", "triton", torch.device("cuda", 0))
    assert reason == f"TRITON_INTERPRET='{value}': expected 0 or 1"


def test_binary_is_tied_to_no_torch():
    listed = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]  # an address may contain anything
    assert names and not any(part in name for name in names for part in ("torch", "c10", "cudart"))


def test_float16_and_bfloat16_conversions_are_exact():
    """Every 16-bit value in, and every rounding of a float near it, through a step that changes nothing."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        p, zeros = every.clone(), torch.zeros(1 << 16)
        ops.adam_(
            [p], [torch.zeros_like(p)], [zeros], [zeros.clone()], [], [], [torch.zeros(())], lr=0.0, backend="cpp"
        )
        finite = ~every.isnan()
        assert torch.equal(p[finite], every[finite]) and p[~finite].isnan().all()
        # p <- decay p with decay = 1 - 2^-9: the product is not representable, and must be rounded to nearest even.
        p = every.clone()
        ops.adam_([p], [torch.zeros_like(p)], [zeros], [zeros.clone()], [], [], [torch.zeros(())], lr=2.0**-9,
                  weight_decay=1.0, decoupled_weight_decay=True, backend="cpp")  # fmt: skip
        assert torch.equal(p[finite], (every.float() * (1 - 2.0**-9)).to(dtype)[finite])


def test_workspace_notices_every_change(generator):
    """The cache-key trap: the same address with another size, dtype or stride is another tensor."""
    space = ops.adam_.workspace()
    base = torch.randn(64, device="cpu")

    def lists(param):
        like = torch.zeros_like(param)
        return [[param], [torch.ones_like(param)], [like], [like.clone()], [], [], [torch.zeros(())]]

    variants = [base, base[:32], base.view(8, 8), base.view(8, 8).t(), base.view(torch.float64), base[1:33], base]
    for param in variants:
        chosen = lists(param)
        assert not space.current(chosen)
        prepared = space.prepare(chosen)
        assert space.current(prepared)
        table = space.table(1 << 40, torch.device("cpu"))
        # table.h: eight words, then for each tensor numel, rows, inner, scratch and one pointer per list
        assert table.words[8] == param.numel() and table.words[12] == param.data_ptr()
        assert space.table(1 << 40, torch.device("cpu")) is table
        moved = [prepared[0], [torch.ones_like(param)], *prepared[2:]]
        assert space.current(moved)  # another address is no other metadata, but another table
        assert space.table(1 << 40, torch.device("cpu")).words[13] == moved[1][0].data_ptr()


def test_import_needs_no_native_extension():
    code = (
        "import sys; sys.modules['fastcurv._C'] = None; import fastcurv, torch, warnings; warnings.simplefilter('error')\n"
        "rows = {r.backend: r for r in fastcurv.backends()}; assert 'pip install' in rows['cpp'].reason, rows\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); o = fastcurv.Adam([p], lr=0.1)\n"
        "try: o.step()\nexcept UserWarning as w: print('warned', 'slow pure-torch reference' in str(w))\n"
        "o.backend = 'reference'; o.step(); print(round(p[0].item(), 4))"
    )
    assert child(code).split() == ["warned", "True", "0.9"]


def test_backends_table():
    rows = fastcurv.backends()
    assert {(r.op, r.backend) for r in rows} == {
        (op, b) for op in _backend.OPS + _backend.MATRIX_OPS + _backend.KRON_OPS for b in _backend.BACKENDS
    }
    assert all(bool(r.reason) != r.available for r in rows)


FORK = """
import os, time, torch, fastcurv
from fastcurv.ops import kron_factor_, orthogonalize

def results():
    x = torch.linspace(-1, 1, 400_000).view(2000, 200)
    factor, p = torch.zeros(200, 200), torch.nn.Parameter(x.clone())
    kron_factor_([factor], [x], backend="cpp")
    p.grad = x.clone()
    fastcurv.Adam([p], backend="cpp").step()
    return [factor, p.detach(), *orthogonalize([x[:100], x[100:300]], backend="cpp")]

torch.set_num_threads(1)
before = results()
torch.set_num_threads(2)
results()
if not (pid := os.fork()):
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, results(), before)) else 1)
deadline = time.monotonic() + 60
while not (done := os.waitpid(pid, os.WNOHANG))[0]:
    if time.monotonic() > deadline:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise SystemExit("the child hangs")
    time.sleep(0.01)
print(os.waitstatus_to_exitcode(done[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kernels_run_in_a_forked_child_with_one_thread():
    """Threads do not survive fork: without set_num_threads(1), torch's own parallel kernels hang there too."""
    assert child(FORK, OMP_NUM_THREADS="2") == "0\n"
