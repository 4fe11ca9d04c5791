"""Peak memory of one call, beyond the memory allocated before it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak: on a GPU by the allocator; on a CPU the tensors that torch allocates, as its
    profiler sees them, without the workspace of native code."""
    if device.type == "cuda":
        from peftkern.tools.bench import gpu_timer

        return gpu_timer.peak_bytes(lambda i: call())
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(trace)
        with open(trace, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
