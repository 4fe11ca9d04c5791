"""Timers for a GPU: single calls between events, and replays of a graph of calls.

Between events a call takes the device's time, or the host's launch time if that is longer, as for a
user. In a replayed graph the launches are free, so that the kernels alone count. Both take turns
among the variants, and each call gets a running number to pick inputs that have left the L2 cache.
Also: the kernels that a call launches, and its peak memory.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Mapping

import torch

from peftkern.tools.bench.timer import MIN_SAMPLES, Timing

TURN_SECONDS = 0.02
CALLS_IN_GRAPH = 32  # inputs that one replay walks through; a quarter of it if a call is slow
SLOW_SECONDS = 2e-3
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

    least = {name: FEW if estimate[name] > PATIENCE else MIN_SAMPLES for name in variants}
    return _in_turns(list(variants), samples, seconds, tick, least=least)


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


def measure_graphs(
    variants: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    calls: Mapping[str, float],
    slow: float = SLOW_SECONDS,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time replays, and return which variants cannot be captured; `calls`: seconds of one call
    each, of which more than `slow` make a shorter graph.

    A sample is a replay over its number of calls.
    """
    graphs, lengths, refused = {}, {}, {}
    for name, call in variants.items():
        lengths[name] = CALLS_IN_GRAPH if calls[name] < slow else CALLS_IN_GRAPH // 4
        try:
            graphs[name] = captured(call, lengths[name])
        except Exception as error:  # of any type: peers run operations that a graph cannot hold
            torch.cuda.synchronize()
            refused[name] = first_line(error)
            end_capture()

    def turn(name: str) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        for mark in marks:
            mark.record()
            if mark is not marks[-1]:
                graphs[name].replay()
        torch.cuda.synchronize()
        pairs = list(itertools.pairwise(marks))[1:]  # the first waited for the host
        return [s.elapsed_time(e) / 1e3 / lengths[name] for s, e in pairs]

    return _in_turns(list(graphs), turn, seconds, lambda share: None, lengths), refused


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def captured(call: Callable[[int], object], length: int) -> torch.cuda.CUDAGraph:
    """Capture a graph of calls number 0 to length - 1."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # scratch and cuBLAS's workspace of that stream
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.disable()  # freeing memory during a capture may break it
    try:
        # torch.cuda.graph would collect garbage and empty the allocator's cache at every capture.
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for i in range(length):
                    call(i)
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph


def end_capture() -> None:
    """Reset torch after a failed capture: some failures leave its random generator in the capture,
    and it would refuse every number and every replay. A successful capture puts it right."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        one = torch.ones(1, device="cuda")
        captured(lambda i: one.add_(1), 1)


def launches(call: Callable[[int], object]) -> list[str]:
    """Return the names of the kernels of one call, without the driver's copies and fills."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call(0)
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def peak_bytes(call: Callable[[int], object]) -> int:
    """Return the peak of bytes that one call adds to those allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _in_turns(
    names: list[str],
    turn: Callable[[str], list[float]],
    seconds: float,
    tick: Callable[[float], None],
    weights: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Take turns in shuffled order until each has its time and its `least` samples; a `least` of
    FEW is exact. A sample stands for `weights` calls."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0)

    def spent(name: str) -> float:
        return sum(samples[name]) * (weights[name] if weights else 1)

    def enough(name: str) -> bool:
        fewest = least[name] if least else MIN_SAMPLES
        return len(samples[name]) >= fewest and (fewest == FEW or spent(name) >= seconds)

    while not all(enough(name) for name in order):
        shuffle.shuffle(order)
        for name in order:
            if not enough(name):
                samples[name] += turn(name)
        tick(min(1.0, min(spent(n) for n in order) / seconds if seconds else 1.0))
    return {name: Timing(tuple(values)) for name, values in samples.items()}
