"""Counts of what dispatch did: who served each op, and why anything fell back."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass

import torch

_lock = threading.Lock()
_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Stats:
    """Calls since the last reset: per (op, back end), and per (op, reason) of a fallback."""

    calls: dict[tuple[str, str], int]
    fallbacks: dict[tuple[str, str], int]

    def as_dict(self) -> dict[str, list[dict[str, str | int]]]:
        """Return the same for JSON, a record per count, sorted: scripts parse no text.

        {"calls": [{"op": "nf4_lora_linear_forward", "backend": "cpu", "count": 14}, ...],
         "fallbacks": [{"op": "lora_linear", "reason": "small dense product", "count": 2}, ...]}
        """
        return {
            name: [
                {"op": op, key: value, "count": count}
                for (op, value), count in sorted(counts.items())
            ]
            for name, key, counts in (
                ("calls", "backend", self.calls),
                ("fallbacks", "reason", self.fallbacks),
            )
        }

    def __str__(self) -> str:
        if not self.calls and not self.fallbacks:
            return "peftkern: no calls"
        calls = [[op, name, str(count)] for (op, name), count in sorted(self.calls.items())]
        text = table_text(["op", "back end", "calls"], calls)
        if self.fallbacks:
            rows = [[op, why, str(count)] for (op, why), count in sorted(self.fallbacks.items())]
            text += "\n\n" + table_text(["op", "fell back because", "times"], rows)
        return text


def stats() -> Stats:
    """Return how often each back end served each op, and why anything fell back."""
    with _lock:
        return Stats(dict(_calls), dict(_fallbacks))


def reset_stats() -> None:
    """Forget what `stats` has counted."""
    with _lock:
        _calls.clear()
        _fallbacks.clear()


def record_call(op: str, backend: str) -> None:
    """Count one call that a back end serves."""
    with _lock:
        _calls[op, backend] += 1


def record_fallback(op: str, reason: str) -> None:
    """Count one call that did not take the fast way, with the reason in words."""
    if torch.compiler.is_compiling():
        return  # counting is no part of a compiled graph
    with _lock:
        _fallbacks[op, reason] += 1


def table_text(header: list[str], rows: list[list[str]]) -> str:
    """Align columns under their names."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _new_lock_in_child() -> None:
    """Renew the lock, which a child forked while another thread held it would wait for forever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_in_child)
