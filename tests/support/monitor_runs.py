"""Runs that a monitor has recorded, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkern.tools.monitor.run import Run

STEPS = 12
LAYERS = 14


def record_adalora(path: Path) -> Path:
    """Train a tiny Llama whose ranks a budget moves, with the Trainer, and record it."""
    from adalora_models import adalora_llama
    from trainers import trainer

    from peftkern.integrations.transformers import (
        AdaLoraCallback,
        MonitorCallback,
        PeftKernCallback,
    )

    model = adalora_llama(total_step=STEPS, tinit=2, tfinal=4, deltaT=2)
    callbacks = [PeftKernCallback(), AdaLoraCallback()]
    run = trainer(model, path.parent, callbacks, max_steps=STEPS)
    MonitorCallback.attach(run, jsonl=path)
    run.train()
    return path


def step(number: int, **changed: Any) -> dict[str, Any]:
    """Return a record as a CPU's monitor writes it after each step."""
    counts = {"kernel_calls": 2, "reference_calls": 0, "fallbacks": 1}
    kinds = {"calls": {"nf4_linear on cpu": 2}, "fallback_reasons": {"lora_linear: small": 1}}
    times = {"seconds": 0.5, "step_seconds": 0.5, "tokens_per_second": 20.0}
    record = {"type": "step", "time": 0.0, "step": number, "steps": 1, "tokens": 10, **times}
    memory = {"process_rss_bytes": 1000, "process_peak_rss_bytes": 2000}
    return {**record, **memory, **counts, **kinds, "loss": 4.0 / number, **changed}


def start(**changed: Any) -> dict[str, Any]:
    facts = {"device": "cpu", "device_name": "a CPU", "torch": "2.13.0"}
    return {"type": "start", "format": "peftkern monitor 1", "time": 0.0, **facts, **changed}


def write(path: Path, *records: dict[str, Any], rest: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    return path


def read(path: Path) -> Run:
    run = Run(path)
    run.read()
    return run
