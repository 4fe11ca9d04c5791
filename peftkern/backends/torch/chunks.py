"""Chunks of rows, which bound the scratch of what is converted or drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_ON_CPU = 1 << 20  # values: 4 MB in float32
_ELSEWHERE = 1 << 22  # fewer launches, and still only tens of MB


def chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows [rows, columns] in order."""
    size = max(1, (_ON_CPU if device.type == "cpu" else _ELSEWHERE) // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
