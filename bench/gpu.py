"""Everything that a GPU machine is asked for, within a time limit: `make gpu PART=nf4` runs this.

It needs no network, no virtual environment and no git history: the Python that runs it has torch
and Triton, and finds peftkern through PYTHONPATH, which make sets. It builds the native libraries
in place (CUDA's for this GPU alone, where nvcc is), runs the GPU's tests, then the benches, each in
a process of its own, so that one that fails or hangs costs the others nothing. A part gets its
share of the time that is left; every bench writes what it has measured after each case.

python bench/gpu.py [--part all|test|nf4|...] [--out bench/results] [--budget 510]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from peftkern.benchmark import machine

RESULTS = machine.ROOT / "bench" / "results"
# The share of the time that is left, against the parts after it; `all` goes through them in order.
BENCHES = {
    "nf4": 3,
    "nf4_lora_linear": 8,
    "lora_linear": 8,
    "adalora": 3,
    "low_rank_svd": 4,
    "dora": 3,
    "rosa": 3,
    "formulations": 3,
    "e2e": 10,
}
SHARES = {"test": 12, **BENCHES}
PARTS = ("all", *SHARES, "tune")
GRACE = 5.0  # seconds between the polite signal and the other one
START_UP = 15.0  # of a bench: imports, the ceilings, the table at the end


def run(command: list[str], seconds: float, log: Path | None = None, **defaults: str) -> int:
    """The exit status of a command and its children, 124 if they had to be stopped.

    defaults: variables of the environment, unless it has them.
    """
    print("+ " + " ".join(command), flush=True)
    environment = {**defaults, **os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=machine.ROOT,
        env=environment,
        stdout=subprocess.PIPE if log else None,
        stderr=subprocess.STDOUT if log else None,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        status = process.returncode
    except subprocess.TimeoutExpired:
        output, status = stopped(process), 124
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output or "", encoding="utf-8")
        print("\n".join((output or "").splitlines()[-15:]), flush=True)
    return status


def stopped(process: subprocess.Popen) -> str:
    for kind, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        os.killpg(process.pid, kind)
        try:
            return process.communicate(timeout=wait)[0] or ""
        except subprocess.TimeoutExpired:
            continue
    return ""


def cuda_build(device: torch.device) -> dict[str, str]:
    """What setup.py is told: kernels for this GPU alone, if there is an nvcc."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {"PEFTKERN_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"  # wgmma is of 90a alone
    return {"PEFTKERN_CUDA": "auto", "PEFTKERN_CUDA_ARCHS": arch}


def gpu_test_files() -> list[str]:
    """Only those: others may import peers that this machine does not have."""
    files = sorted((machine.ROOT / "tests").glob("test_*.py"))
    marked = [p for p in files if "mark.gpu" in p.read_text(encoding="utf-8")]
    return [str(path.relative_to(machine.ROOT)) for path in marked]


def command(part: str, args: argparse.Namespace, rest: list[str], seconds: float) -> list[str]:
    """What runs one part within these seconds."""
    python, budget = sys.executable, f"{max(1.0, seconds - START_UP):.0f}"
    if part == "test":
        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        options = ["-q", "-m", "gpu", "--continue-on-collection-errors", *parallel]
        return [python, "-m", "pytest", *options, *gpu_test_files()]
    if part == "tune":
        folder = machine.ROOT / "kernels" / "tuned" if args.out == RESULTS else args.out / "tuned"
        common = ["--out", str(folder), "--budget", budget]
        return [python, "bench/tune.py", "--device", args.device, *common, *rest]
    common = ["--out", str(args.out), "--budget", budget, "--commit", args.commit]
    return [python, f"bench/bench_{part}.py", "--device", args.device, *common, *rest]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description="Options of the benches may follow")
    add = parser.add_argument
    add("--part", choices=PARTS, default="all")
    add("--out", type=Path, default=RESULTS, help="results folder")
    add("--budget", type=float, default=510.0, help="seconds for everything (510)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--commit", default="", help="what to record where the tree carries no history")
    args, rest = parser.parse_known_args(argv)
    args.out = args.out.resolve()
    deadline = time.monotonic() + args.budget
    try:
        device = machine.device_named(args.device)
    except machine.DeviceError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status = run(build, args.budget / 3, **cuda_build(device))
    failed = [] if status == 0 else ["build"]  # Triton's kernels need none of it
    parts = list(SHARES) if args.part == "all" else [args.part]
    for i, part in enumerate(parts):
        left = deadline - time.monotonic()
        later = sum(SHARES.get(name, 0) for name in parts[i + 1 :])
        share = SHARES.get(part, 1) / (SHARES.get(part, 1) + later)
        seconds = left * share
        if seconds < 1:
            failed.append(f"{part} (no time left)")
            continue
        log = args.out / machine.slug(machine.describe(0, device)) / "tests.txt"
        started = time.monotonic()
        status = run(command(part, args, rest, seconds), seconds, log if part == "test" else None)
        print(f"{part}: exit status {status} after {time.monotonic() - started:.0f} s", flush=True)
        if status:
            failed.append(f"{part} ({'stopped' if status == 124 else status})")
    print("all parts ended well" if not failed else f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
