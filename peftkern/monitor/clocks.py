"""Clocks that the host never waits for: of the host, and of a stream of a GPU."""

from __future__ import annotations

import time

import torch


class WallClock:
    """Clock of the host: right where computing blocks the host."""

    mark = staticmethod(time.perf_counter)

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self, mark: float) -> None:
        pass


class CudaClock:
    """Events in the current stream: when the GPU got there, whatever the host is ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()
