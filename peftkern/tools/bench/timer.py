"""Timer for CPU code that runs for 0.1 ms to a few seconds.

Variants take short turns in a shuffled order, so that a machine that slows down for a second slows
all of them; each call gets a running number to pick inputs that no cache still holds; ratios are
taken between medians of one run only.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SAMPLES = 7
MOST_SAMPLES = 200  # in a record; medians and percentiles are of all
TURN_SECONDS, MOST_CALLS = 0.03, 20  # of a turn; the first call of several is not counted


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted call."""

    samples: tuple[float, ...]

    def quantile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def in_milliseconds(self) -> dict:
        """Return the fields of a record, with at most MOST_SAMPLES, spread evenly over the run."""
        stride = -(-len(self.samples) // MOST_SAMPLES)
        return {
            "median_ms": self.median * 1e3,
            "p20_ms": self.quantile(0.2) * 1e3,
            "p80_ms": self.quantile(0.8) * 1e3,
            "samples_ms": [round(s * 1e3, 5) for s in self.samples[::stride]],
        }


def number(value: float) -> str:
    """Format three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.6f}"


def turn(
    call: Callable[[object], object], setup: Callable[[], object], seconds: float, most: int
) -> list[float]:
    """Return seconds of each call, `call(setup())`, of a turn of about `seconds` and at most `most`
    calls. `setup` is not counted, nor is the first of several, on cold caches."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or (time.perf_counter() < end and len(samples) < most):
        given = setup()
        start = time.perf_counter()
        call(given)
        samples.append(time.perf_counter() - start)
    return samples[1:] or samples


def pin_threads(threads: int | None) -> int:
    """Use this many threads on as many fixed cores (None: all that the process may use)."""
    allowed = sorted(os.sched_getaffinity(0))
    threads = len(allowed) if threads is None else threads
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"--threads: expected 1 to {len(allowed)}, got {threads}")
    os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)
    return threads


def measure(
    variants: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    tick: Callable[[float], None] = lambda share: None,
    few: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time every variant for about `seconds`, in turns; those in `few` are as in `in_turns`.

    Each is called as `variant(i)` with i = 0, 1, 2, ...; `tick` is called with the share of time
    spent.
    """
    counters, few = {name: itertools.count() for name in variants}, few or {}
    for name, call in variants.items():
        if name not in few:
            call(next(counters[name]))  # pays for set-up: libraries, JIT, workspaces
    turns = {
        name: functools.partial(turn, call, counters[name].__next__, TURN_SECONDS, MOST_CALLS)
        for name, call in variants.items()
    }
    return in_turns(turns, seconds=seconds, tick=tick, few=few)


def in_turns(
    turns: Mapping[str, Callable[[], list[float] | None]],
    *,
    seconds: float,
    tick: Callable[[float], None] = lambda share: None,
    weights: Mapping[str, int] | None = None,
    few: Mapping[str, int] | None = None,
    over: Callable[[bool], bool] = lambda short: False,
    shuffle: random.Random | None = None,
) -> dict[str, Timing]:
    """Let all take turns in shuffled order until each has its seconds and MIN_SAMPLES.

    A turn returns the seconds of its calls, None if it can have no other; a sample stands for
    `weights` calls. Those in `few` are so slow that they have so many samples and no more.
    `over(short)` ends it early; short: some have fewer than MIN_SAMPLES.
    """
    samples: dict[str, list[float]] = {name: [] for name in turns}
    weights, few, shuffle = weights or {}, few or {}, shuffle or random.Random(0)

    def spent(name: str) -> float:
        return sum(samples[name]) * weights.get(name, 1)

    def short(name: str) -> bool:
        return len(samples[name]) < few.get(name, MIN_SAMPLES)

    def wants(name: str) -> bool:
        return short(name) or (name not in few and spent(name) < seconds)

    order = list(turns)
    while any(map(wants, order)) and not over(any(map(short, order))):
        shuffle.shuffle(order)
        for name in list(order):
            if name in few and not wants(name):
                continue
            if (more := turns[name]()) is None:
                order.remove(name)
            else:
                samples[name] += more
        tick(min(1.0, min(map(spent, order), default=0.0) / seconds if seconds else 1.0))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
