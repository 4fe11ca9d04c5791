"""Contests: contenders timed in turn on the user's machine, within a budget.

Two clocks on a GPU. *host*: the time until a call has been issued, what a launch-bound model feels.
*device*: the time between events around it while the queue is filled, so that the host cannot show.
A CPU has one clock. Turns alternate their order; what is compared is the median over the rounds of
each round's own ratio, so that a drift of the machine falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

SLOWER = 1.02  # a ratio beyond which a contender loses to the first
BUDGET = 0.4  # seconds for all the rounds of a contest
ROUNDS = (3, 15)  # least and most
CLEAR = 0.3  # a ratio so far from 1 in every round needs no more than the least rounds
_PLAIN = 4.0  # a ratio beyond it, or below its inverse, needs no second round after a long one
_QUEUE_CYCLES = 400_000  # about 0.2 ms, longer than the host takes to issue a layer's pass

Clock = Callable[[Callable[[], Any]], dict[str, float]]


def clock_of(device: torch.device) -> Clock:
    """Return what times one call on a device: {name of the clock: seconds}."""
    return _gpu_clock if device.type == "cuda" else _wall_clock


def _wall_clock(call: Callable[[], Any]) -> dict[str, float]:
    begin = time.perf_counter()
    call()
    return {"wall": time.perf_counter() - begin}


def _gpu_clock(call: Callable[[], Any]) -> dict[str, float]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(_QUEUE_CYCLES)
    events[0].record()
    call()
    events[1].record()
    events[1].synchronize()
    return {"host": host, "device": events[0].elapsed_time(events[1]) * 1e-3}


class Outcome(NamedTuple):
    """Ratios of one contender to the first: {clock: median over the rounds}.

    unanimous: whether every round and clock was on the same side of SLOWER. A busy machine's are
    not, and such an outcome should not outlive the process.
    """

    ratios: dict[str, float]
    unanimous: bool

    @property
    def not_slower(self) -> bool:
        """Whether the contender is no slower than the first, on every clock."""
        return max(self.ratios.values()) <= SLOWER


def outcomes(
    contenders: Mapping[str, Callable[[], Any]], clock: Clock, budget: float = BUDGET
) -> dict[str, Outcome]:
    """Time each contender against the first.

    Each is called once before it is timed. The rounds end when the budget is spent, or when the
    first ones are all clear. One is enough where it took longer than the budget and the times are
    far apart: seconds, where torch has no matrix products of a dtype on this CPU.
    """
    first, *others = contenders
    for call in contenders.values():
        call()
    rounds: list[dict[str, dict[str, float]]] = []
    begin = time.perf_counter()
    while len(rounds) < ROUNDS[1]:
        order = list(contenders)[:: 1 if len(rounds) % 2 else -1]
        times = {name: clock(contenders[name]) for name in order}
        rounds.append(
            {
                name: {kind: times[name][kind] / max(t, 1e-9) for kind, t in times[first].items()}
                for name in others
            }
        )
        seen = [ratio for turn in rounds for kinds in turn.values() for ratio in kinds.values()]
        elapsed = time.perf_counter() - begin
        if elapsed > budget and all(not 1 / _PLAIN < ratio < _PLAIN for ratio in seen):
            break
        if len(rounds) >= ROUNDS[0]:
            if all(abs(ratio - 1) > CLEAR for ratio in seen):
                break
            if elapsed > budget * (1 - 1 / len(rounds)):
                break
    return {name: _outcome([turn[name] for turn in rounds]) for name in others}


def _outcome(rounds: list[dict[str, float]]) -> Outcome:
    medians = {kind: statistics.median(turn[kind] for turn in rounds) for kind in rounds[0]}
    slower = {max(turn.values()) > SLOWER for turn in rounds}
    return Outcome(medians, len(slower) == 1)
