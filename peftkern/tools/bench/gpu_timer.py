"""Timer for a GPU: single calls between events.

A call takes the device's time, or the host's launch time if that is longer, as for a user. Variants
take turns, and each call gets a running number to pick inputs that have left the L2 cache. Also:
the peak memory of a call.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Mapping

import torch

from peftkern.tools.bench.timer import Timing, in_turns

TURN_SECONDS = 0.02
PATIENCE = 0.1  # seconds of a call from which it is repeated FEW times only
FEW = 3  # samples of such a call
UNCOUNTED = 2  # calls at the start of a turn, which still wait for the host


def measure_events(
    variants: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, Timing]:
    """Time every variant for about `seconds`, as `timer.measure` does on a CPU; those slower than
    PATIENCE only FEW times."""
    counters = {name: itertools.count() for name in variants}

    def some(name: str, calls: int) -> list[float]:
        return turn(variants[name], calls, lambda: next(counters[name]))

    estimate = {}
    for name in variants:
        some(name, 1)  # may compile, or initialize a library
        (warm,) = some(name, 1)
        estimate[name] = warm if warm > PATIENCE else max(1e-6, min(some(name, 5)))
    bursts = {name: max(1, min(200, round(TURN_SECONDS / estimate[name]))) for name in variants}

    def samples(name: str) -> list[float]:
        uncounted = 0 if estimate[name] > PATIENCE else UNCOUNTED
        return some(name, uncounted + bursts[name])[uncounted:]

    few = {name: FEW for name in variants if estimate[name] > PATIENCE}
    turns = {name: functools.partial(samples, name) for name in variants}
    return in_turns(turns, seconds=seconds, tick=tick, few=few)


def turn(
    call: Callable[[object], object],
    calls: int,
    setup: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return seconds of each of some calls in a row, `call(setup())`, issued without waiting; the
    work of `setup` on the stream is not counted."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        given = setup()
        start.record()
        call(given)
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) / 1e3 for s, e in zip(marks[::2], marks[1::2], strict=True)]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def peak_bytes(call: Callable[[int], object]) -> int:
    """Return the peak of bytes that one call adds to those allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
