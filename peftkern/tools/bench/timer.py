"""Timer for CPU code that runs for 0.1 ms to a few seconds.

Variants take short turns in a shuffled order, so that a machine that slows down for a second slows
all of them; each call gets a running number to pick inputs that no cache still holds; ratios are
taken between medians of one run only.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SAMPLES = 7
TURN_SECONDS = 0.03  # short calls run in bursts of this length; the first of a burst is not counted


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

    def __str__(self) -> str:
        return f"{number(self.median * 1e3)} [{self.quantile(0.2) * 1e3:.3g}-{self.p80_ms:.3g}] ms"

    @property
    def p80_ms(self) -> float:
        return self.quantile(0.8) * 1e3


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
) -> dict[str, Timing]:
    """Time every variant for about `seconds`, in turns.

    Each is called as `variant(i)` with i = 0, 1, 2, ...; `tick` is called with the share of time
    spent.
    """
    numbers = dict.fromkeys(variants, 0)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)

    def call(name: str) -> float:
        number = numbers[name]
        numbers[name] += 1
        start = time.perf_counter()
        variants[name](number)
        return time.perf_counter() - start

    estimate = {}
    for name in variants:
        call(name)
        estimate[name] = call(name)  # the first call pays for set-up: libraries, JIT, workspaces
    order, shuffle = list(variants), random.Random(0)
    while any(len(samples[n]) < MIN_SAMPLES or spent[n] < seconds for n in order):
        shuffle.shuffle(order)
        for name in order:
            if len(samples[name]) >= MIN_SAMPLES and spent[name] >= seconds:
                continue
            burst = max(1, min(20, round(TURN_SECONDS / estimate[name])))
            if burst > 1:
                spent[name] += call(name)
            for _ in range(burst):
                samples[name].append(call(name))
                spent[name] += samples[name][-1]
        tick(min(1.0, min(spent.values()) / seconds if seconds else 1.0))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
