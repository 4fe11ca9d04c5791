"""Replays of a CUDA graph of calls: without launches, so that the kernels alone count; and the
kernels that a call launches."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Mapping

import torch

from peftkern.tools.bench import gpu_timer
from peftkern.tools.bench.timer import Timing, in_turns

CALLS_IN_GRAPH = 32  # inputs that one replay walks through; a quarter of it if a call is slow
SLOW_SECONDS = 2e-3


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
            refused[name] = gpu_timer.first_line(error)
            end_capture()

    def turn(name: str) -> list[float]:
        replays = gpu_timer.turn(lambda _: graphs[name].replay(), 3)
        return [seconds / lengths[name] for seconds in replays[1:]]  # the first waited for the host

    turns = {name: functools.partial(turn, name) for name in graphs}
    return in_turns(turns, seconds=seconds, weights=lengths), refused


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
