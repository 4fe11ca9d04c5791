"""Compile every Triton kernel for every target, without a GPU, and write what each one uses.

python bench/resources.py [--arch sm90] [--out bench/results] [--quick first]

A file names the compiler and lists a line per launch that compiles another kernel or another
specialization: registers of a thread, bytes that it spills, bytes of shared memory of a program;
on NVIDIA how many groups of copies are in flight while a loop waits for one, and instructions /
barriers of each innermost loop. With --quick first only the first launch of each kernel is compiled
and its loops are read, with --quick ends the last one is compiled as well; "?" stands for the rest.
Exits 1 if anything spills that is not known to, if a program uses more shared memory than the
architecture has, if a launch does not compile, or if no case launches a kernel.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import triton
from aot_cases import CASES, KNOWN_SPILLS
from rich.progress import track

import peftkern.kernels
from peftkern.kernels.aot import TARGETS, Launch, Resources, compile_launch, record
from peftkern.kernels.configs import shared_memory

RESULTS = Path(__file__).resolve().parent / "results"
LAUNCHES: dict[tuple[str, str], Launch] = {}  # by architecture and name, for forked workers


def launches(arch: str) -> dict[str, Launch]:
    """Return the launches of all cases by name, those that share a compiled kernel once."""
    found: dict[str, Launch] = {}
    known: set[str] = set()
    for case in CASES:
        if arch not in case.targets:
            continue
        new = {launch.key: launch for launch in record(case.call, arch)}
        new = [launch for key, launch in new.items() if key not in known]
        known.update(launch.key for launch in new)
        for launch in new:
            name = "/".join([launch.kernel, case.name, *_told_apart(launch, new)])
            assert name not in found, name
            found[name] = launch
    return found


def _told_apart(launch: Launch, others: list[Launch]) -> list[str]:
    """Constants in which a launch differs from others of its kernel in one case."""
    own = launch.constants()
    same = [other.constants() for other in others if other.kernel == launch.kernel]
    return [f"{k}={v}" for k, v in own.items() if any(other.get(k) != v for other in same)]


def without_a_case() -> list[str]:
    """Return the kernels of the package that no recorded launch compiles."""
    kernels = set()
    for folder in peftkern.kernels.__path__:
        for path in Path(folder).glob("*.py"):
            module = importlib.import_module(f"peftkern.kernels.{path.stem}")
            kernels |= {name for name in vars(module) if name.endswith("_kernel")}
    return sorted(kernels - {launch.source.fn.__name__ for launch in LAUNCHES.values()})


def first_launches(backwards: bool = False) -> set[tuple[str, str]]:
    """Return the first launch of each kernel for each architecture, or the last."""
    launches = LAUNCHES.items() if backwards else reversed(LAUNCHES.items())
    return set({(arch, one.kernel): (arch, name) for (arch, name), one in launches}.values())


def measure(task: tuple[str, str], loops: bool) -> Resources | str:
    try:
        return compile_launch(LAUNCHES[task], task[0], loops)
    except Exception as error:  # the compiler's own; every other launch is still worth knowing
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def report(arch: str, rows: dict[str, Resources | str]) -> str:
    width = max(map(len, rows))
    lines = [
        f"# {arch}, Triton {triton.__version__}: `make aot` writes this file.",
        f"{'launch':<{width}}  regs spills  shared  ahead loops",
    ]
    lines += [f"{name:<{width}}  {resources}" for name, resources in rows.items()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def complaint(task: tuple[str, str], used: Resources | str) -> str | None:
    """Return what makes a launch fail the run, None if nothing does."""
    if isinstance(used, str):
        return used
    if used.spills > KNOWN_SPILLS.get(task, 0):
        return f"spills {used.spills}"
    most = shared_memory(task[0])
    if used.shared > most:
        return f"{used.shared} bytes of shared memory, at most {most}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="resources.py")
    parser.add_argument("--arch", choices=sorted(TARGETS), nargs="*", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", choices=("first", "ends"))
    args = parser.parse_args(argv)
    for arch in args.arch:
        LAUNCHES.update({(arch, name): launch for name, launch in launches(arch).items()})
    read = first_launches() if args.quick else LAUNCHES
    wanted = read | first_launches(backwards=True) if args.quick == "ends" else read
    tasks = [task for task in LAUNCHES if task in wanted]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        results = pool.map(measure, tasks, [task in read for task in tasks])
        show = track(results, "compiling", len(tasks), disable=not sys.stderr.isatty())
        found = dict(zip(tasks, show, strict=True))
    for arch in args.arch:
        path = args.out / f"resources_{arch}.txt"
        rows = {name: found.get((of, name), "?") for of, name in LAUNCHES if of == arch}
        path.write_text(report(arch, rows), encoding="utf-8")
        print(f"written: {path}")
    reasons = {" ".join(task): complaint(task, used) for task, used in found.items()}
    complaints = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    complaints += [f"no case launches {name}" for name in without_a_case()]
    for line in complaints:
        print(line)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
