"""Throughput, memory and kernel telemetry of a training loop, without waiting for the GPU.

    with TrainingMonitor(jsonl="run.jsonl", live=True) as monitor:
        for batch in batches:
            ...
            optimizer.step()
            monitor.step(tokens=batch["input_ids"].numel())
    print(monitor.summary())

A step costs a clock mark: on a GPU an event in the current stream, which is asked later whether it
has passed and is never waited for. Everything else is read once per record.

Memory stands in three books, which are not added up: `cuda_allocated` is what torch's live tensors
occupy, `cuda_reserved` what torch's allocator holds of the GPU for them, and `nvml_used` what all
processes together hold, contexts and libraries included.
"""

from peftkern.monitor.records import FIELDS, Summary, scalars
from peftkern.monitor.training import TrainingMonitor

__all__ = ["FIELDS", "Summary", "TrainingMonitor", "scalars"]
