"""Folders of results: bench/results has one for each device."""

from __future__ import annotations

import re

from peftkern.tools.bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"


def slug(machine: dict) -> str:
    """Return a folder name for the device: "h200", "intel-xeon-processor-amx-bf16-2-threads"."""
    if machine.get("gpu"):
        text = re.sub(r"^(NVIDIA|AMD)\s+", "", machine["gpu"]["name"])
    else:
        name = re.sub(r"\((R|TM|C)\)", "", machine["cpu"], flags=re.IGNORECASE)
        text = f"{name} {machine['isa'] or 'no native'} {machine['threads']} threads"
        text += " interpreter" if machine.get("interpreter") else ""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
