"""Resources of every CUDA kernel on every architecture, compiled without a GPU.

python bench/cuda_resources.py [--archs "80;90a"] [--out bench/results/cuda_resources.txt]

A line per kernel: registers of a thread, bytes that it spills and bytes of its stack, bytes of
static shared memory of a block (what a launch asks for comes on top). Exits 1 if anything spills or
has a stack, if ptxas warns of lost performance, or if a file does not compile. A report of some
architectures is printed, not written, unless --out names a file. The compiler's output is cached in
build/, keyed by the content of all sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
REPORT = ROOT / "bench" / "results" / "cuda_resources.txt"
CACHE = ROOT / "build" / "cuda_resources"
USUAL = ("80", "86", "89", "90a", "100", "120")  # as in CMakeLists.txt
# Warnings are for the build: here only the device's half is compiled.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DPEFTKERN_CUDA_SM90A=1", "-Xptxas=-v")
PROPERTIES = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\s+ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*))?"
)
# For example wgmma that ptxas serializes.
WARNING = re.compile(r"Potential Performance Loss.*")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture."""

    registers: int
    spills: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers:4d} {self.spills:6d} {self.stack:5d} {self.shared:7d}"


class CompileError(Exception):
    """Failure of the compiler; the message is its first error."""


def find_nvcc() -> str | None:
    """Find nvcc where CMakeLists.txt looks, too."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    in_home = shutil.which("nvcc", path=f"{home}/bin")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or in_home


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def known_archs(nvcc: str) -> list[str]:
    """Return the usual architectures that this nvcc compiles for."""
    known = set(re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch")))
    return [arch for arch in USUAL if arch.rstrip("a") in known]


def version(nvcc: str) -> str:
    return re.search(r"V([\d.]+)", output(nvcc, "--version"))[1]


def tasks(archs: list[str]) -> list[tuple[Path, str]]:
    """Pair every file with each architecture that it is for."""
    files = sorted(CUDA.glob("*.cu"))
    return [(p, a) for a in archs for p in files if a == "90a" or not p.stem.endswith("_sm90a")]


def table_header() -> Path:
    """Generate the headers and return their folder."""
    folder = CACHE / "generated"
    generator, source = (
        ROOT / "csrc" / "generate_nf4_table.py",
        ROOT / "peftkern" / "formats" / "table.py",
    )
    output(sys.executable, str(generator), str(source), str(folder / "peftkern" / "nf4_table.h"))
    return folder


def fingerprint(compiler: str, generated: Path) -> str:
    """Hash the compiler and every file that a kernel may include."""
    folders = (CUDA, ROOT / "csrc" / "include", generated)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256(repr((compiler, FLAGS)).encode())
    for path in files:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_kernels(nvcc: str, generated: Path, mark: str, path: Path, arch: str) -> str:
    """Return the output of ptxas for a file, cached while nothing has changed."""
    kept = CACHE / f"{path.stem}.sm_{arch}.{mark}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    cubin = CACHE / f"{path.stem}.sm_{arch}.{os.getpid()}.cubin"
    command = [nvcc, "-cubin", f"-arch=sm_{arch}", *FLAGS, f"-I{ROOT / 'csrc' / 'include'}"]
    command += [f"-I{generated}", str(path), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    cubin.unlink(missing_ok=True)
    said = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
        raise CompileError(f"{path.name} for sm_{arch}: {lines[0] if lines else 'no output'}")
    for old in CACHE.glob(f"{path.stem}.sm_{arch}.*.txt"):
        old.unlink(missing_ok=True)
    staged = kept.with_suffix(f".{os.getpid()}")
    staged.write_text(said, encoding="utf-8")
    os.replace(staged, kept)
    return said


def short_name(demangled: str) -> str:
    """Shorten to kernel and template arguments: no result, namespaces, parameters or spaces."""
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    if name.endswith(")"):
        depth = 0
        for i in reversed(range(len(name))):
            depth += {")": 1, "(": -1}.get(name[i], 0)
            if depth == 0:
                name = name[:i]
                break
    return re.sub(r"peftkern::|\s", "", name)


def parse(said: str) -> dict[str, Usage]:
    """Return the usage by mangled name, of kernels and of functions not inlined (no registers).

    Raises: ValueError if the output of ptxas is not as expected.
    """
    found = {
        match["name"]: Usage(
            int(match["registers"] or 0),
            max(int(match["stores"]), int(match["loads"])),
            int(match["stack"]),
            sum(map(int, re.findall(r"(\d+) bytes smem", match["rest"] or ""))),
        )
        for match in PROPERTIES.finditer(said)
    }
    for name in re.findall(r"Compiling entry function '([^']+)'", said):
        if name not in found or not found[name].registers:
            raise ValueError(f"{name}: ptxas reports registers in a form that is not known here")
    return found


def demangled(names: list[str]) -> dict[str, str]:
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(names, said.splitlines(), strict=True))


Rows = list[tuple[str, str, str, Usage]]


def measure(nvcc: str, archs: list[str], workers: int) -> tuple[Rows, list[str], list[str]]:
    """Return (architecture, file, kernel, usage) in report order; errors; warnings of ptxas."""
    generated = table_header()
    mark = fingerprint(version(nvcc), generated)
    rows, errors, warnings, work = [], [], [], tasks(archs)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(compile_kernels, nvcc, generated, mark, *task) for task in work]
        for job, (path, arch) in track(
            list(zip(jobs, work, strict=True)), "compiling", disable=not sys.stderr.isatty()
        ):
            try:
                said = job.result()
            except CompileError as error:
                errors.append(str(error))
                continue
            warnings += [f"{path.name} for sm_{arch}: {line}" for line in WARNING.findall(said)]
            found = parse(said)
            names = demangled(sorted(found))
            rows += [(arch, path.stem, short_name(names[k]), found[k]) for k in found]
    order = {arch: i for i, arch in enumerate(archs)}
    return sorted(rows, key=lambda row: (order[row[0]], *row[1:3])), errors, warnings


def report(compiler: str, rows: Rows) -> str:
    names = [f"sm_{arch}/{stem}/{kernel}" for arch, stem, kernel, _ in rows]
    width = max(map(len, names), default=6)
    lines = [
        f"# nvcc {compiler}: `make cuda` writes this file.",
        f"{'kernel':<{width}}  regs spills stack  shared",
    ]
    lines += [f"{name:<{width}}  {row[3]}" for name, row in zip(names, rows, strict=True)]
    return "\n".join(lines) + "\n"


def problems(rows: Rows) -> list[str]:
    """List every spill and stack: memory traffic where registers were meant."""
    found = []
    for arch, stem, kernel, usage in rows:
        if usage.spills or usage.stack:
            what = f"spills {usage.spills} bytes, stack of {usage.stack} bytes"
            found.append(f"sm_{arch}/{stem}/{kernel}: {what}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cuda_resources.py")
    parser.add_argument("--archs", help='"80;90a" (all that are built by default)')
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))))
    args = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_resources.py: error: found no nvcc", file=sys.stderr)
        return 2
    archs = args.archs.split(";") if args.archs else known_archs(nvcc)
    rows, errors, warnings = measure(nvcc, archs, args.workers)
    text = report(version(nvcc), rows)
    out = args.out or (None if args.archs else REPORT)
    if out is None:
        print(text, end="")
    elif not errors:
        staged = out.with_name(f".{out.name}.{os.getpid()}")
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, out)
        print(f"written: {out}")
    bad = errors + warnings + problems(rows)
    print(*bad, sep="\n", end="\n" if bad else "")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
