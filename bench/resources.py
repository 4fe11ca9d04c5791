"""Resources of every Triton kernel on every target, compiled without a GPU.

python bench/resources.py [--arch sm90] [--out bench/results]

A file names the compiler and lists a line per case: registers of a thread, bytes that it spills
(AMD: registers), bytes of shared memory of a program. Exits 1 if anything spills, if a program uses
more shared memory than every architecture has, or if a case does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import triton
from rich.progress import track

from peftkern.kernels.aot import TARGETS, Resources, compile_case
from peftkern.kernels.configs import SHARED_MEMORY

RESULTS = Path(__file__).resolve().parent / "results"
STEMS = ("nf4", "lora_linear", "nf4_lora_linear", "low_rank_svd", "adalora", "dora", "rosa")


def names(arch: str) -> list[tuple[str, int]]:
    """Return (stem, index) of every case of an architecture, which a worker can look up."""
    cases = {stem: importlib.import_module(f"peftkern.kernels.{stem}").AOT_CASES for stem in STEMS}
    return [(stem, i) for stem in STEMS for i, c in enumerate(cases[stem]) if arch in c.targets]


def measure(task: tuple[str, int, str]) -> tuple[str, Resources | str]:
    stem, index, arch = task
    case = importlib.import_module(f"peftkern.kernels.{stem}").AOT_CASES[index]
    try:
        return case.name, compile_case(case, arch)
    except Exception as error:  # the compiler's own; every other case is still worth knowing
        return case.name, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def report(arch: str, rows: list[tuple[str, Resources | str]]) -> str:
    width = max(len(name) for name, _ in rows)
    lines = [
        f"# {arch}, Triton {triton.__version__}: `make aot` writes this file.",
        f"{'case':<{width}}  regs spills  shared",
    ]
    lines += [f"{name:<{width}}  {resources}" for name, resources in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="resources.py")
    parser.add_argument("--arch", choices=sorted(TARGETS), nargs="*", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    tasks = [(stem, i, arch) for arch in args.arch for stem, i in names(arch)]
    with ProcessPoolExecutor(args.workers) as pool:
        results = pool.map(measure, tasks)
        rows = list(track(results, "compiling", len(tasks), disable=not sys.stderr.isatty()))
    bad = 0
    for arch in args.arch:
        mine = [row for row, task in zip(rows, tasks, strict=True) if task[2] == arch]
        path = args.out / f"resources_{arch}.txt"
        path.write_text(report(arch, mine), encoding="utf-8")
        print(f"written: {path}")
        for name, found in mine:
            if isinstance(found, str):
                problem = found
            elif found.spills:
                problem = f"spills {found.spills}"
            elif found.shared > SHARED_MEMORY:
                problem = f"{found.shared} bytes of shared memory, at most {SHARED_MEMORY}"
            else:
                continue
            bad += 1
            print(f"{arch} {name}: {problem}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
