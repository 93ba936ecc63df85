"""The command `fastcurv`: info, bench and demo."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastcurv import __version__, _backend

Main = Callable[[Sequence[str] | None], int]


def program(main: Main) -> Callable[..., int]:
    """Decorates a main function: a reader that closes the pipe, and Ctrl-C, end the program without a traceback.

    Args:
        main: Takes arguments, and returns an exit code.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, because at exit a closed pipe can no longer be caught
        except BrokenPipeError:
            _discard_output()
            return 141  # as a shell reports SIGPIPE
        except KeyboardInterrupt:
            return 130  # as a shell reports SIGINT

    return run


def _discard_output() -> None:
    """Leads the streams whose pipes are closed to nowhere, because the interpreter flushes them again at exit."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="fastcurv", description="Compiled kernels for PyTorch optimizers.")
    parser.add_argument("--version", action="version", version=f"fastcurv {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="versions, devices, and which back ends can run and why not")
    _add_bench(commands.add_parser("bench", help="measure the optimizers beside torch"))
    _add_demo(commands.add_parser("demo", help="train a small model on real data beside torch, and time the steps"))
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if options.command != "info" and (fault := _backend.simd_fault()):
        parser.error(fault)
    return {"info": _info, "bench": _bench, "demo": _demo}[options.command](options)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from fastcurv.bench import BENCHMARKS

    parser.add_argument("op", nargs="?", choices=BENCHMARKS, help="an op; all of them without it")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case (may be repeated)")
    parser.add_argument("--check", action="store_true", help="say for every row of targets.toml whether it holds")
    parser.add_argument("--peers", action="store_true", help="measure other libraries too, where installed")
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile too, where torch has nothing fused (minutes)"
    )
    parser.add_argument("--quick", action="store_true", help="make every case small, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <op>-<device>.json there")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("fastcurv-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of model and data order; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one epoch and small lists, to see that it runs")


def _info(_: argparse.Namespace) -> int:
    import torch

    import fastcurv
    from fastcurv.bench import machine

    for name, version in machine.versions().items():
        print(f"{name:18} {version}")
    print(f"{'processor':18} {machine.processor()}")
    print(f"{'threads':18} {torch.get_num_threads()}")
    print(f"{'GPU':18} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    native = _backend.native()
    if native is None:
        print(f"{'native extension':18} {_backend.unusable('adam', 'cpp', torch.device('cpu'))}")
    else:
        print(f"{'SIMD level':18} {_backend.simd_fault() or native.simd_level()}")
        nothing = "nothing; to build the CUDA kernels too: FASTCURV_CUDA=1 pip install . (docs/building.md)"
        print(f"{'CUDA built for':18} {native.cuda_architectures() or nothing}")
        views = (
            "the DLPack C exchange API" if native.exchange_api() else "attributes (slower: this torch offers no API)"
        )
        print(f"{'tensors through':18} {views}")
    print()
    for row in fastcurv.backends():
        print(f"{row.op:18} {row.backend:10} {'available' if row.available else row.reason}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    import torch

    from fastcurv.bench import BENCHMARKS, clocks, harness, results, targets

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = "gpu" if device == "cuda" else "cpu"
    if options.out and (options.quick or options.case):
        raise SystemExit("--out keeps complete runs: leave out --quick and --case")
    choice = harness.Options(device, peers=options.peers, compile=options.compile, quick=options.quick)
    start_load = os.getloadavg()[0]  # that after an op would be our own
    for op in [options.op] if options.op else BENCHMARKS:
        cases = importlib.import_module(f"fastcurv.bench.bench_{op}").CASES
        if options.case:
            _known("--case", options.case, [case.name for case in cases])
            cases = [case for case in cases if case.name in options.case]
        measured = []
        for result in harness.run_all(cases, choice, clocks.clock(device), start_load):
            measured.append(result)
            print(results.table(result), end="\n\n", flush=True)
        if options.check:
            rows = [row for row in targets.load() if row.op == op]
            print(targets.table(targets.judge(rows, {place: measured})))
        if options.out:
            path = options.out / f"{op}-{place}.json"
            results.store(path, op, device, measured)
            print(f"written to {path}")
    return 0


def _known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise SystemExit(f"{option} {name}: unknown; expected one of {', '.join(known)}")


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"fastcurv demo needs {', '.join(missing)}: pip install 'fastcurv[demo]'")
    from fastcurv import demo

    return demo.run(options.out, options.seed, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
