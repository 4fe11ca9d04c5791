"""Counts of what dispatch did: who served each op, and why anything fell back."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["Stats", "on_fallback", "reset_stats", "stats"]
logger = logging.getLogger("peftkern")  # the one logger of the package


class _Tally:
    """Count without a lock, which takes three times as long: a step of a C iterator is atomic.

    What is read is a step, too, and taken off again.
    """

    __slots__ = ("_reads", "add")

    def __init__(self) -> None:
        self.add, self._reads = itertools.count(1).__next__, 0

    def read(self) -> int:
        self._reads += 1
        return self.add() - self._reads


_Tallies = dict[tuple[str, str], _Tally]

_lock = threading.Lock()  # of new tallies, and of reading
_calls: _Tallies = {}
_fallbacks: _Tallies = {}
_forgotten = 0  # calls and fallbacks of before the last reset


@dataclass(frozen=True)
class _Listener:
    function: Callable[[str, str], object]
    told: set[tuple[str, str]] = field(default_factory=set)


_listeners: OrderedDict[int, _Listener] = OrderedDict()


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

    def _cures(self) -> dict[str, str]:
        """Return what helps against the reasons that something helps against."""
        from peftkern.backends.reasons import NOTHING, cure

        found = {reason: cure(reason) for reason in sorted({why for _, why in self.fallbacks})}
        return {reason: does for reason, does in found.items() if does and NOTHING not in does}

    def __str__(self) -> str:
        if not self.calls and not self.fallbacks:
            return "peftkern: no calls"
        calls = [[op, name, str(count)] for (op, name), count in sorted(self.calls.items())]
        text = table_text(["op", "back end", "calls"], calls)
        if self.fallbacks:
            rows = [[op, str(count), why] for (op, why), count in sorted(self.fallbacks.items())]
            text += "\n\n" + table_text(["op", "times", "fell back because"], rows)
            text += "".join(f"\n\n{reason}:\n  {cure}" for reason, cure in self._cures().items())
        return text


def stats() -> Stats:
    """Return how often each back end served each op, and why anything fell back."""
    with _lock:
        return Stats(_read(_calls), _read(_fallbacks))


def reset_stats() -> None:
    """Forget what `stats` has counted."""
    global _forgotten
    with _lock:
        _forgotten += _total()
        _calls.clear()
        _fallbacks.clear()


def recorded() -> int:
    """Return how much was counted in this process, whatever was reset."""
    with _lock:
        return _forgotten + _total()


def _read(tallies: _Tallies) -> dict[tuple[str, str], int]:
    return {key: tally.read() for key, tally in tallies.items()}


def _total() -> int:
    return sum(tally.read() for tallies in (_calls, _fallbacks) for tally in tallies.values())


def _begin(tallies: _Tallies, key: tuple[str, str]) -> bool:
    """Count what may be new; returns whether it is."""
    with _lock:
        first = key not in tallies
        tallies.setdefault(key, _Tally()).add()
    return first


def on_fallback(function: Callable[[str, str], object]) -> RemovableHandle:
    """Call a function at the first fallback of each op for each reason, from now on.

    function(op, reason) gets both as `stats` lists them: op is "lora_linear", "nf4_lora_linear" or
    "lora_experts" for a patched layer that the forward from before `patch` answers, the name of an
    op where one of its back ends refuses a call; reason is in words, the same for all layers and
    shapes but where it tells a measurement. The same pair does not come again, after `reset_stats`
    neither. It is called in the thread that falls back, in the middle of a forward or backward
    pass; inside a compiled graph nothing is counted, and nothing is told. What it raises is logged
    as an error of the logger "peftkern" and goes no further. That logger is told of each pair, too,
    at level INFO.

    Args: function, called with two strings; what it returns is not read.
    Returns: a handle: its `remove()` ends the calls, and so does the end of a `with` block over it.
    Raises: TypeError if `function` cannot be called.
    """
    if not callable(function):
        raise TypeError(f"function: expected a callable, got a {type(function).__name__}")
    handle = RemovableHandle(_listeners)
    _listeners[handle.id] = _Listener(function)
    return handle


def record_call(op: str, backend: str) -> None:
    """Count one call that a back end serves."""
    try:
        _calls[op, backend].add()
    except KeyError:
        _begin(_calls, (op, backend))


def record_fallback(op: str, reason: str) -> None:
    """Count one call that did not take the fast way, with the reason in words."""
    if not torch.compiler.is_compiling():  # counting is no part of a compiled graph
        record_eager_fallback(op, reason)


def record_eager_fallback(op: str, reason: str) -> None:
    """Count a fallback of a call that is known to be in no graph."""
    try:
        _fallbacks[op, reason].add()
    except KeyError:
        if _begin(_fallbacks, (op, reason)):
            logger.info("%s falls back: %s", op, reason)
    if _listeners:
        _tell(op, reason)


def _tell(op: str, reason: str) -> None:
    for listener in list(_listeners.values()):
        with _lock:
            known = (op, reason) in listener.told
            listener.told.add((op, reason))
        if known:
            continue
        try:
            listener.function(op, reason)
        except Exception:
            logger.exception("a function given to on_fallback raised at %s: %s", op, reason)


def table_text(header: list[str], rows: list[list[str]]) -> str:
    """Align columns under their names; the last one may be as long as it likes."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    widths[-1] = len(header[-1])
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
