"""Machine of a measurement: device, versions, commit, bandwidth and FLOP ceilings."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern.backends.cpu.module import cpu_isa, cpu_isas
from peftkern.backends.device import device_info, has_products, triton_interpreted
from peftkern.integrations.packages import installed_version
from peftkern.tools.bench.gpu_timer import measure_events
from peftkern.tools.bench.timer import measure

ROOT = Path(peftkern.__file__).resolve().parents[1]  # the repository, where it is one
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "peftkern")
COPY_BYTES, GEMM = 256 << 20, 2048  # at least, see roof
SLOWER = 4  # times smaller is the product in a dtype that torch has no fast one for
GPU_COPY_BYTES, GPU_GEMM = 2 << 30, 8192  # far longer than a launch, far larger than the L2 cache


class DeviceError(Exception):
    """Absence of the requested device; the message is the line to print."""


def device_named(name: str) -> torch.device:
    """Return the device of that name. Raises: DeviceError if it is a GPU and torch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device cuda: torch {torch.__version__} sees no GPU on this machine")
    return torch.device(name)


def cache_bytes() -> int:
    """Return the size of the last-level cache; 32 MiB where the system does not say."""
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
    """Return the commit measured, with + if tracked files other than results differ from it; None
    for an installed package, which may lie within another repository."""
    if not (ROOT / "csrc").is_dir():
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return f"{head}+" if head and changed else head


def version(package: str) -> str | None:
    # This one is not installed where the tree is a bare copy.
    return peftkern.__version__ if package == "peftkern" else installed_version(package)


def describe(threads: int, device: torch.device | None = None, given_commit: str = "") -> dict:
    """Describe the machine; `given_commit` stands in where the tree carries no history."""
    return {
        "cpu": device_info("cpu").name,
        "isa": cpu_isa() if cpu_isas() else None,
        "isas": list(cpu_isas()),
        "gpu": gpu(device) if device is not None and device.type == "cuda" else None,
        "interpreter": triton_interpreted(),
        "threads": threads,
        "last_level_cache": cache_bytes(),
        "commit": commit() or given_commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "load_average": os.getloadavg(),
    }


def gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def write_json(path: Path, record: object, **how: Any) -> None:
    """Write JSON atomically; how: as for `json.dumps`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, **how) + "\n")


def check_target(option: str, path: Path) -> None:
    """Check that a file can be written there, before a minute is spent.

    Raises: ValueError naming the option.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option}: {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, expected a file")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        # /dev/stdout, say, which the new file would replace.
        raise ValueError(f"{option}: {path} is a link or a device, expected a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: {path}: the folder {path.parent} cannot be written to")


def write_text(path: Path, text: str) -> None:
    """Write text atomically; the folder has to exist."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def roof(
    seconds: float,
    device: torch.device,
    small: bool,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
) -> dict[str, float]:
    """Measure ceilings: copied bytes (read and written) and dense FLOPs per second.

    The copy has `copy_bytes`. Source and target exceed the last-level cache, as far as `rotation`
    does, except with `small`, which is for shapes that fit into it.
    """
    copy_bytes, gemm = GPU_COPY_BYTES, GPU_GEMM
    if device.type == "cpu":
        copy_bytes, gemm = max(COPY_BYTES, rotation(None, device) // 2), GEMM
    if small:
        copy_bytes, gemm = 1 << 20, 256
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    variants = {"copy": lambda i: target.copy_(source)}
    sizes = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        sizes[name] = size = gemm if has_products(dtype, device) else max(256, gemm // SLOWER)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        variants[name] = lambda i, a=a, b=b: torch.nn.functional.linear(a, b)
    timings = (measure_events if device.type == "cuda" else measure)(variants, seconds=seconds)
    # The best of many: a disturbed run must not lower a ceiling.
    best = {name: timing.quantile(0.05) for name, timing in timings.items()}
    rates = {name: 2 * sizes[name] ** 3 / best[name] for name in dtypes}
    return {"copy": 2 * copy_bytes / best["copy"], "copy_bytes": copy_bytes, **rates}


def rotation(given_mb: int | None, device: torch.device) -> int:
    """Return bytes beyond the last-level cache, but at most 640 MB per variant: a virtual machine
    reports the size of a cache that it shares."""
    if given_mb is not None:
        return given_mb << 20
    if device.type == "cuda":
        return max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return min(cache_bytes() * 5 // 4, 640 << 20)
