"""Which back end serves which op: one table, asked inside the op at every call.

`_CANDIDATES` lists, per op, the implementations from the most to the least preferred. Each says in
words why it cannot take a call, or None when it can; the first that can runs. What it raises goes
to the caller: an exception in a kernel never turns into a fallback.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from peftkern import cpu, native, reference
from peftkern.device import BackendUnavailableError


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op; `supports` and `run` take the op's positional arguments."""

    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]


def _always(*args: Any) -> None:
    return None


def _candidates(op: str, supports_cpu: Callable[..., str | None]) -> tuple[Candidate, ...]:
    return (
        Candidate("cpu", supports_cpu, getattr(cpu, op)),
        Candidate("reference", _always, getattr(reference, op)),
    )


_CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "nf4_quantize": _candidates("nf4_quantize", cpu.supports_dense),
    "nf4_quantize_absmax": _candidates("nf4_quantize_absmax", cpu.supports_device),
    "nf4_dequantize": _candidates("nf4_dequantize", cpu.supports_dequantize),
    "nf4_dequantize_out": _candidates("nf4_dequantize_out", cpu.supports_dequantize),
    "lora_linear_forward": _candidates("lora_linear_forward", cpu.supports_dense),
    "lora_linear_backward": _candidates("lora_linear_backward", cpu.supports_dense),
    "nf4_lora_linear_forward": _candidates("nf4_lora_linear_forward", cpu.supports_nf4_forward),
    "nf4_lora_linear_backward": _candidates("nf4_lora_linear_backward", cpu.supports_nf4_backward),
    "adalora_importance_": _candidates("adalora_importance_", cpu.supports_adalora_importance),
    "adalora_allocate_": _candidates("adalora_allocate_", cpu.supports_adalora_allocate),
    "adalora_orthogonality_forward": _candidates(
        "adalora_orthogonality_forward", cpu.supports_adalora_orthogonality_forward
    ),
    "adalora_orthogonality_backward": _candidates(
        "adalora_orthogonality_backward", cpu.supports_adalora_orthogonality_backward
    ),
}
_BACKENDS = ("cpu", "reference")

_override: ContextVar[str | None] = ContextVar("peftkern_backend", default=None)
_lock = threading.Lock()
_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()


def call(op: str, *args: Any) -> Any:
    """Run `op` on the first candidate that takes these arguments."""
    forced = forced_backend()
    for candidate in _CANDIDATES[op]:
        if forced is not None and candidate.name != forced:
            continue
        reason = candidate.supports(*args)
        if reason is None:
            with _lock:
                _calls[op, candidate.name] += 1
            return candidate.run(*args)
        if forced is not None:
            raise BackendUnavailableError(f"back end {forced!r} cannot run {op}: {reason}")
        record_fallback(op, f"{candidate.name}: {reason}")
    raise BackendUnavailableError(
        f"no back end for {op}" if forced is None else f"{op} has no back end {forced!r}"
    )


def forced_backend() -> str | None:
    """The back end that `use_backend` or PEFTKERN_BACKEND asks for, or None.

    Raises: ValueError listing the back ends if there is none of that name.
    """
    name = _override.get()
    if name is None:
        name = os.environ.get("PEFTKERN_BACKEND") or None
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"back end: expected one of {_BACKENDS}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the `with` block on one back end; None gives the choice back.

    It belongs to the current context (thread, task), and a backward pass obeys the block that
    surrounds `backward()`. An op that the back end cannot run raises BackendUnavailableError.

    Raises: ValueError listing the back ends if there is none of that name.
    """
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"back end: expected one of {_BACKENDS}, got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


@dataclass(frozen=True)
class Stats:
    """Calls since the last reset: per (op, back end), and per (op, reason) of a fallback."""

    calls: dict[tuple[str, str], int]
    fallbacks: dict[tuple[str, str], int]

    def __str__(self) -> str:
        if not self.calls and not self.fallbacks:
            return "peftkern: no calls"
        calls = [[op, name, str(count)] for (op, name), count in sorted(self.calls.items())]
        text = _table(["op", "back end", "calls"], calls)
        if self.fallbacks:
            rows = [[op, why, str(count)] for (op, why), count in sorted(self.fallbacks.items())]
            text += "\n\n" + _table(["op", "fell back because", "times"], rows)
        return text


def stats() -> Stats:
    """Which back end served which op how often, and why anything fell back."""
    with _lock:
        return Stats(dict(_calls), dict(_fallbacks))


def reset_stats() -> None:
    """Forget what `stats` has counted."""
    with _lock:
        _calls.clear()
        _fallbacks.clear()


def record_fallback(op: str, reason: str) -> None:
    """Count one call that did not take the fast way, with the reason in words."""
    with _lock:
        _fallbacks[op, reason] += 1


@dataclass(frozen=True)
class Explanation:
    """What dispatch would do with one call: rows of (op, back end, verdict), and the machine."""

    rows: tuple[tuple[str, str, str], ...]
    machine: str

    def chosen(self, op: str) -> str | None:
        """The back end that would run `op`; None if none can."""
        return next((row[1] for row in self.rows if row[0] == op and row[2] == "chosen"), None)

    def __str__(self) -> str:
        table = _table(["op", "back end", "verdict"], [list(row) for row in self.rows])
        return f"{table}\n{self.machine}"


def explain(calls: dict[str, tuple[Any, ...]]) -> Explanation:
    """Ask every candidate of each op about these arguments, without running anything."""
    rows = []
    forced = forced_backend()
    for op, args in calls.items():
        taken = False
        for candidate in _CANDIDATES[op]:
            reason = candidate.supports(*args)
            if forced is not None and candidate.name != forced:
                verdict = f"not asked: {forced!r} is forced"
            elif reason is not None:
                verdict = f"cannot: {reason}"
            else:
                verdict = "can" if taken else "chosen"
                taken = True
            rows.append((op, candidate.name, verdict))
    return Explanation(tuple(rows), native.describe())


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _new_lock_in_child() -> None:
    """A child forked while another thread held the lock would wait for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_in_child)
