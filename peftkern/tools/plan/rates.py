"""Rates of the device that is here, at which a plan's work takes its time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from peftkern.tools.bench import machine

__all__ = ["Rates", "measured"]


class Rates(NamedTuple):
    """FLOPs, and bytes read and written in memory and in a cache of `cache_bytes`, per second."""

    flops: float
    memory: float
    cache: float
    cache_bytes: int

    def seconds(self, flops: int, nbytes: int) -> float:
        """Return the time of one op: that of its arithmetic or of its traffic."""
        rate = self.cache if nbytes <= self.cache_bytes else self.memory
        return max(flops / self.flops, nbytes / rate)

    def __str__(self) -> str:
        text = f"{self.flops / 1e9:.4g} GFLOP/s or {self.memory / 1e9:.3g} GB/s"
        return text + f", {self.cache / 1e9:.3g} in a cache of {self.cache_bytes / 2**20:.3g} MiB"


def measured(device: str, dtype: str, seconds: float = 0.5) -> Rates | None:
    """Measure the rates of a device in bf16 or fp32; return None if it is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    where = torch.device(device)
    far = machine.roof(seconds, where, small=False, dtypes=(name,))
    near = machine.roof(seconds / 2, where, small=True, dtypes=())
    cache = machine.cache_bytes()
    if device == "cuda":
        cache = torch.cuda.get_device_properties(where).L2_cache_size
    return Rates(far[name], far["copy"], max(near["copy"], far["copy"]), cache)
