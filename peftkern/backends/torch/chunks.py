"""Chunks of rows, which bound the scratch of what is converted or drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_ON_CPU = 1 << 18  # values: a chunk in float32 stays in the caches
_ELSEWHERE = 1 << 22  # few launches, and still only tens of MB


def chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows [rows, columns] in order."""
    size = max(1, (_ON_CPU if device.type == "cpu" else _ELSEWHERE) // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
