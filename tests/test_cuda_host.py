"""The host emulator itself: it computes what a GPU would, and it can fail."""

import functools
import struct

import pytest
import torch
from cuda_host import emulator

run = functools.partial(emulator.run, source="selftest.cpp")

# Every order, the random one several times.
ORDERS = [("ascending", 0), ("descending", 0), *(("random", seed) for seed in range(4))]


def block_sums(barrier, order, seed):
    values = torch.arange(7 * 1000, dtype=torch.float32).reshape(7, 1000).remainder(97)  # sums are exact
    out = torch.full((7,), float("nan"))
    args = struct.pack("PPi4x", values.data_ptr(), out.data_ptr(), values.shape[1])
    run(f"selftest::block_sum<{str(barrier).lower()}>", 7, 256, args, order=order, seed=seed)
    return torch.equal(out, values.sum(1))


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_block_reduction(order, seed):
    assert block_sums(True, order, seed)


def test_missing_barrier_of_a_reduction_shows():
    assert not all(block_sums(False, order, seed) for order, seed in ORDERS)


def rotates(first, second, order, seed):
    values = torch.arange(256, dtype=torch.float32)
    wanted = values.roll(-9)
    args = struct.pack("Pi4x", values.data_ptr(), 9)
    run(f"selftest::rotate<{first}, {second}>", 1, 256, args, order=order, seed=seed)
    return torch.equal(values, wanted)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_exchange_through_shared_memory(order, seed):
    assert rotates("true", "true", order, seed)


@pytest.mark.parametrize("present", [("false", "true"), ("true", "false")])
def test_each_missing_barrier_of_an_exchange_shows(present):
    assert not all(rotates(*present, order, seed) for order, seed in ORDERS)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize(("operand", "width"), [(1, 32), (3, 32), (5, 16), (9, 8), (0, 4), (31, 32)])
def test_shuffles(operand, width, order, seed):
    threads = 96
    out = torch.full((5, threads), -1, dtype=torch.int32)
    run("selftest::shuffles", 1, threads, struct.pack("Pii", out.data_ptr(), operand, width), order=order, seed=seed)
    for thread in range(threads):
        lane, warp = thread % 32, thread // 32 * 32
        group = lane // width * width
        up = lane - operand if lane - operand >= group else lane
        down = lane + operand if lane + operand < group + width else lane
        xor = lane ^ operand if (lane ^ operand) < group + width else lane
        half = range(warp, warp + 16) if lane < 16 else range(warp + 16, warp + 32)
        wanted = [
            warp + group + operand % width,
            warp + up,
            warp + down,
            warp + xor,
            sum(half) * (1 if lane < 16 else -1),
        ]
        assert out[:, thread].tolist() == wanted, thread


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_exactly_one_block_is_last_and_sees_all(blocks, order, seed):
    ticket = torch.zeros(1, dtype=torch.int64)
    counts = torch.zeros(3, dtype=torch.int32)
    args = struct.pack("PPPP", ticket.data_ptr(), *(counts[i:].data_ptr() for i in range(3)))
    for launch in (1, 2):
        run("selftest::count", blocks, 48, args, order=order, seed=seed)
        assert ticket.item() == 0
        assert counts.tolist() == [launch * blocks * 48, launch, launch * blocks * 48]


@pytest.mark.parametrize(
    ("at_block_barriers", "text"), [(1, "barrier of line"), (0, "lanes of its warp that do not come")]
)
def test_threads_that_wait_for_ever_are_reported(at_block_barriers, text):
    for threads in (64, 33):
        with pytest.raises(RuntimeError, match=text):
            run("selftest::stuck", 2, threads, struct.pack("i", at_block_barriers))
    assert block_sums(True, "ascending", 0)  # and the emulator is in order afterwards


def test_dynamic_shared_memory_begins_as_nan_and_has_an_end():
    for _ in range(2):
        out = torch.zeros(2, dtype=torch.float64)
        run("selftest::use_shared", 3, 64, struct.pack("Pi4x", out.data_ptr(), 100), shared=800)
        assert out[0].isnan() and out[1] == 99
    with pytest.raises(RuntimeError, match="wrote behind its shared memory"):
        run("selftest::use_shared", 3, 64, struct.pack("Pi4x", out.data_ptr(), 101), shared=800)


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("target", [0, 2])
def test_misaligned_accesses_are_reported(source, target):
    values, out = torch.arange(16.0), torch.zeros(16)
    args = struct.pack("PP", values[source:].data_ptr(), out[target:].data_ptr())
    if source or target:
        with pytest.raises(RuntimeError, match=r"misaligned .* at .*common\.cuh:\d+"):
            run("selftest::copy_pack", 1, 32, args)
    run("selftest::copy_pack", 1, 32, struct.pack("PP", values.data_ptr(), out.data_ptr()))
    assert out[:4].tolist() == [0, 1, 2, 3]


def test_unknown_kernel_and_wrong_argument_are_reported():
    with pytest.raises(RuntimeError, match="not among"):
        run("selftest::nothing", 1, 32, b"")
    with pytest.raises(RuntimeError, match="another size"):
        run("selftest::stuck", 1, 32, bytes(8))
