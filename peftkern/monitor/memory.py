"""Memory of this process and of a GPU."""

from __future__ import annotations

import contextlib
import os
import sys

import torch


def process_memory() -> dict[str, int]:
    """Return this process's resident memory now, where /proc tells it, and at its largest."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        found["process_rss_bytes"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found | {"process_peak_rss_bytes": max(peak, found.get("process_rss_bytes", 0))}


def nvml_figures(device: torch.device) -> dict[str, int] | str:
    """Return NVML's figures of a GPU, by torch, which knows its number there; or the reason."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is not an NVIDIA GPU"
    try:
        return {
            "nvml_used_bytes": torch.cuda.device_memory_used(device),
            "nvml_utilization_percent": torch.cuda.utilization(device),
        }
    except Exception as error:  # NVML's own class of errors comes with the package that may miss
        return " ".join(str(error).split())
