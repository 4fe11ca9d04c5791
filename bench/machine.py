"""What a measurement ran on: processor, versions, commit, and what the memory and cores can do."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from timer import measure

from peftkern import native

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "peftkern")
COPY_BYTES = 256 << 20


def cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cache_bytes() -> int:
    """The last level's size; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.match(r"(\d+)([KM]?)", path.read_text()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20}[unit])
    return max(sizes)


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit measured, with + if tracked files other than results differ from it."""
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return f"{head}+" if head and changed else head


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(threads: int) -> dict:
    return {
        "cpu": cpu_name(),
        "isa": native.cpu_isa() if native.cpu_isas() else None,
        "isas": list(native.cpu_isas()),
        "threads": threads,
        "last_level_cache": cache_bytes(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "load_average": os.getloadavg(),
    }


def slug(machine: dict) -> str:
    """A folder name for the device: "intel-xeon-processor-amx-bf16-2-threads"."""
    name = re.sub(r"\((R|TM|C)\)", "", machine["cpu"], flags=re.IGNORECASE)
    text = f"{name} {machine['isa'] or 'no native'} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def roof(seconds: float, copy_bytes: int = COPY_BYTES, gemm: int = 2048) -> dict[str, float]:
    """Measured ceilings: copied bytes (read and written) and dense FLOPs per second."""
    source = torch.ones(copy_bytes, dtype=torch.uint8)
    target = torch.ones(copy_bytes, dtype=torch.uint8)
    variants = {"copy": lambda i: target.copy_(source)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(gemm, gemm, dtype=dtype), torch.randn(gemm, gemm, dtype=dtype)
        variants[name] = lambda i, a=a, b=b: torch.nn.functional.linear(a, b)
    timings = measure(variants, seconds=seconds)
    # The best of many: a ceiling that a disturbed run must not lower.
    best = {name: timing.quantile(0.05) for name, timing in timings.items()}
    return {
        "copy": 2 * copy_bytes / best["copy"],
        "bfloat16": 2 * gemm**3 / best["bfloat16"],
        "float32": 2 * gemm**3 / best["float32"],
    }
