"""Tests and benches of a GPU machine within a time limit: `make gpu PART=nf4` runs this.

It needs no network, no virtual environment and no git history: the Python that runs it has torch
and Triton, and finds peftkern through PYTHONPATH, which make sets. It builds the native libraries
in place (CUDA's for this GPU alone, where nvcc is), runs the GPU's tests, then the benches, each in
a process of its own, so that one that fails or hangs costs the others nothing. A part gets its
share of the remaining time; every bench writes its record after each case, and pytest its log line
by line. `--archive` packs the results folder into one file after every part.

python bench/gpu.py [--part all | test,nf4,...] [--out bench/results] [--budget 510]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
from folders import RESULTS, slug

from peftkern.tools.bench import machine

TUNED = machine.ROOT / "kernels" / "tuned"
# Shares of the remaining time, relative to the parts after it; `all` runs them in order.
BENCHES = {
    "nf4": 3,
    "nf4_lora_linear": 8,
    "lora_linear": 8,
    "grouped_linear": 8,
    "adalora": 3,
    "low_rank_svd": 4,
    "dora": 3,
    "rosa": 3,
    "formulations": 5,
    "e2e": 20,
}
SHARES = {"test": 12, **BENCHES}
ASIDE = {"sanitize": 40, "tune": 30}  # shares of the parts that `all` leaves out
PARTS = ("all", *SHARES, "sanitize", "tune")
GRACE = 10.0  # seconds between the interrupt and the kill
START_UP = 25.0  # of a bench: imports, the ceilings, a case that began just in time
TEST_SECONDS = 150  # of one test, where pytest-timeout is


def run(command: list[str], seconds: float, log: Path | None = None, **defaults: str) -> int:
    """Run a command and return its exit status, 124 if it and its children had to be stopped.

    defaults: environment variables for those that are not set.
    """
    print("+ " + " ".join(command), flush=True)
    environment = {**defaults, **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with contextlib.ExitStack() as stack:
        output = None
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("w", encoding="utf-8"))
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            stop(process)
            status = 124
        except BaseException:  # else it would keep running on a GPU that others measure
            stop(process)
            raise
    if log:
        text = log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(text.splitlines()[-15:]), flush=True)
    return status


def interruptible() -> None:
    """Restore SIGINT in a new process: a shell's background jobs ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen) -> None:
    """Interrupt a command, so that pytest still reports failures; kill it if it does not end."""
    for kind, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait)


def cuda_build(device: torch.device) -> dict[str, str]:
    """Return the environment for setup.py: kernels for this GPU alone, if there is an nvcc."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {"PEFTKERN_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"  # wgmma is of 90a alone
    return {"PEFTKERN_CUDA": "auto", "PEFTKERN_CUDA_ARCHS": arch}


def gpu_test_files() -> list[str]:
    """List the GPU tests: others may import peers that this machine does not have."""
    tests = machine.ROOT / "tests"
    others = (p for p in tests.rglob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))
    found = {*(tests / "gpu").glob("test_*.py"), *others}
    return sorted(str(path.relative_to(machine.ROOT)) for path in found)


def command(part: str, args: argparse.Namespace, rest: list[str], seconds: float) -> list[str]:
    """Return the command that runs one part within these seconds."""
    python, budget = sys.executable, f"{max(seconds / 2, seconds - START_UP):.0f}"
    if part in ("test", "sanitize"):
        wanted = "gpu and slow" if part == "sanitize" else "gpu and not slow"
        options = ["-v", "--tb=short", "-m", wanted, "--continue-on-collection-errors"]
        if part == "test" and importlib.util.find_spec("xdist"):
            options += ["-n", str(max(1, min(12, len(os.sched_getaffinity(0)) - 2)))]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", str(TEST_SECONDS if part == "test" else int(seconds))]
        return [python, "-m", "pytest", *options, *gpu_test_files()]
    if part == "tune":
        folder = TUNED if args.out == RESULTS else args.out / "tuned"
        common = ["--out", str(folder), "--budget", budget, "--commit", args.commit]
        return [python, "bench/tune.py", "--device", args.device, *common, *rest]
    common = ["--out", str(args.out), "--budget", budget, "--commit", args.commit]
    return [python, f"bench/bench_{part}.py", "--device", args.device, *common, *rest]


def parts(text: str) -> list[str]:
    names = []
    for name in text.split(","):
        names += list(SHARES) if name == "all" else [name]
    if unknown := [name for name in names if name not in PARTS[1:]]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


def pack(folder: Path, archive: Path) -> None:
    """Pack all results and tables into one file, replaced atomically."""
    archive = archive.resolve()
    new = archive.with_name(archive.name + ".new")
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = {path: f"{folder.name}/{path.relative_to(folder)}" for path in folder.rglob("*")}
    files |= {path: f"tuned/{path.name}" for path in TUNED.glob("*.json")}
    with tarfile.open(new, "w:gz") as file:
        for path, name in sorted(files.items()):
            if path.is_file() and path.resolve() not in (archive, new):
                file.add(path, arcname=name)
    os.replace(new, archive)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description="Options of the benches may follow")
    add = parser.add_argument
    add("--part", type=parts, default=list(SHARES), help=f"of {', '.join(PARTS)}; several: a,b")
    add("--out", type=Path, default=RESULTS, help="results folder")
    add("--budget", type=float, default=510.0, help="seconds for everything (510)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--commit", default="", help="what to record where the tree carries no history")
    add("--archive", type=Path, help="pack the results folder into this .tgz after every part")
    args, rest = parser.parse_known_args(argv)
    args.out = args.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also stops the running part
    deadline = time.monotonic() + args.budget
    try:
        device = machine.device_named(args.device)
    except machine.DeviceError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status = run(build, args.budget / 3, **cuda_build(device))
    failed = [] if status == 0 else ["build"]  # Triton's kernels need none of it
    weights = [(SHARES | ASIDE)[part] for part in args.part]
    for i, part in enumerate(args.part):
        left = deadline - time.monotonic()
        share = weights[i] / sum(weights[i:])
        seconds = left * share
        if seconds < 1:
            failed.append(f"{part} (no time left)")
            continue
        log = args.out / slug(machine.describe(0, device)) / f"{part}.txt"
        log = log if part in ("test", "sanitize") else None
        threads = {"OMP_NUM_THREADS": "2"} if log else {}  # of each of pytest's processes
        started = time.monotonic()
        status = run(command(part, args, rest, seconds), seconds, log, **threads)
        if part == "tune" and (args.out / "tuned").is_dir():  # the parts after it measure with it
            shutil.copytree(args.out / "tuned", TUNED, dirs_exist_ok=True)
        if args.archive:
            pack(args.out, args.archive)
        print(f"{part}: exit status {status} after {time.monotonic() - started:.0f} s", flush=True)
        if status:
            failed.append(f"{part} ({'stopped' if status == 124 else status})")
    print("all parts ended well" if not failed else f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
