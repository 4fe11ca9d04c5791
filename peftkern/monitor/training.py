"""Counter and timer of the steps of a training loop."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
import warnings
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftkern.backends import counts
from peftkern.backends.device import device_info
from peftkern.monitor.clocks import CudaClock, WallClock
from peftkern.monitor.memory import nvml_figures, process_memory
from peftkern.monitor.records import (
    FORMAT,
    JSONLines,
    Number,
    Summary,
    came,
    check_values,
    kernel_counts,
    line_of,
    live_line,
    moved_triplets,
    plain,
)

__all__ = ["TrainingMonitor"]


class TrainingMonitor:
    """Counter and timer of a loop's steps; a context manager, or `start` and `close` by hand.

    Args: device, what trains: the current GPU by default, the CPU without one; on other devices
        times are those of the host. jsonl, a file that gets a line per record, appended as one
        write, so that it is valid whenever the process is killed. every, steps per record; 0: only
        `record()` makes one. live, a line on stderr that follows the records, if it is a terminal.
    On a GPU torch's peak counters are reset when it starts. NVML's figures need the package
    nvidia-ml-py and are left out without it.
    Raises: ValueError or TypeError naming the argument; OSError from `start` if the file cannot be
        opened. A file that cannot be written later is a warning, not the end of a training.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        jsonl: str | os.PathLike[str] | None = None,
        every: int = 10,
        live: bool = False,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if type(every) is not int or every < 0:
            raise ValueError(f"every: expected a number of steps, or 0, got {every!r}")
        self.every = every
        self.last: dict[str, Any] | None = None  # the last record
        self._jsonl = None if jsonl is None else Path(jsonl)
        self._lines: JSONLines | None = None
        self._live = live_line() if live else None
        self._clock: WallClock | CudaClock | None = None
        self._nvml_reason: str | None = "not started"

    @property
    def running(self) -> bool:
        """True between `start` and `close`."""
        return self._clock is not None

    def __enter__(self) -> TrainingMonitor:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(wait=kind is None)

    def start(self) -> TrainingMonitor:
        """Open the file and begin to count; again after `close`, from zero."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        nvml = nvml_figures(self.device)
        self._nvml_reason = nvml if isinstance(nvml, str) else None
        self.steps = 0
        self._ranks: dict[str, int] = {}  # as they were last written
        self._masks: dict[str, list[bool]] = {}
        self._finished = self._tokens = 0
        self._seconds = array("d")  # of every finished step
        self._since = [0, 0, 0.0]  # steps, tokens and seconds of the coming record
        self._first = self._before = counts.stats()
        self._pending: deque[tuple[Any, Any, int]] = deque()
        if self._jsonl is not None:
            self._lines = JSONLines(self._jsonl)
            about = {
                "type": "start",
                "format": FORMAT,
                "time": time.time(),
                "device": str(self.device),
                "device_name": device_info(self.device).name,
                "torch": torch.__version__,
                "process": os.getpid(),
            }
            self._write({**about, "nvml": self._nvml_reason or "read"})
        if self._live is not None:
            self._live.start()
        self._clock = CudaClock(self.device) if cuda else WallClock()
        self._begin = self._clock.mark()
        return self

    def step(self, tokens: int = 0, **values: Number) -> None:
        """Count a step that has ended, and make a record if one is due.

        Args: tokens of the step, as shapes tell them; values, numbers for the record (loss=...),
            dropped where none is due. A tensor is refused: the host would wait for its value.
        """
        clock = self._started()
        if type(tokens) is not int or tokens < 0:
            raise TypeError(f"tokens: expected a number of tokens, got {came(tokens)}")
        if values:
            check_values(values)
        end = clock.mark()
        self._pending.append((self._begin, end, tokens))
        self._begin = end
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.record(**values)

    def skip(self) -> None:
        """Leave out the time since the last step: an evaluation, a checkpoint. Its calls count."""
        self._begin = self._started().mark()

    def record(self, **values: Number) -> dict[str, Any] | None:
        """Record the steps since the last record that the device has finished.

        Returns: FIELDS and values, also written to the file and kept in `last`; None if no further
            step has finished. Without dicts: `scalars`.
        """
        self._started()
        check_values(values)
        self._drain()
        steps, tokens, seconds = self._since
        if not steps:
            return None
        self._since = [0, 0, 0.0]
        now = counts.stats()
        record = {
            "type": "step",
            "time": time.time(),
            "step": self._finished,
            "steps": steps,
            "tokens": tokens,
            "seconds": seconds,
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens / seconds if seconds > 0 else math.nan,
            **self.memory(),
            **kernel_counts(self._before, now),
            **values,
        }
        self._before = now
        self.last = record
        self._write(record)
        if self._live is not None:
            self._live.update(line_of(record), refresh=True)
        return record

    def ranks(
        self,
        pattern: Mapping[str, int | Sequence[bool]],
        *,
        importance: Mapping[str, float] | None = None,
        **values: Number,
    ) -> dict[str, int]:
        """Write the rank of each layer, where a budget moves them, if anything has changed.

        Args: pattern, ranks, or masks of triplets as `methods.adalora.RankAllocator.rank_pattern`
            returns them: on a GPU that waits, so ask for it where a mask was drawn. Of masks the
            record also has which triplets were pruned and which revived since the one before.
            importance, of each layer, as `layer_importance` there, of this mask; values, numbers
            for the record (budget=...).
        Returns: kept, pruned, revived: numbers of triplets.
        """
        self._started()
        check_values(values)
        ranks = {k: v if isinstance(v, int) else sum(v) for k, v in pattern.items()}
        first = not self.steps and not self._masks
        moved = moved_triplets(self._masks, {} if first else pattern)
        if ranks != self._ranks or any(moved.values()) or importance is not None:
            record = {"type": "ranks", "time": time.time(), "step": self.steps, "ranks": ranks}
            if importance is not None:
                finite = {k: v if math.isfinite(v) else None for k, v in importance.items()}
                record["importance"] = finite
            self._write({**record, **{k: v for k, v in moved.items() if v}, **values})
        self._ranks = ranks
        self._masks = {k: list(v) for k, v in pattern.items() if not isinstance(v, int)}
        counts = {kind: sum(map(len, layers.values())) for kind, layers in moved.items()}
        return {"kept": sum(ranks.values()), **counts}

    def memory(self) -> dict[str, int]:
        """Return bytes now and NVML's utilization in percent: what this device has of FIELDS."""
        found = process_memory()
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)  # empty before the first tensor
            for book in ("allocated", "reserved"):
                for name, when in ((book, "current"), (f"peak_{book}", "peak")):
                    found[f"cuda_{name}_bytes"] = stats.get(f"{book}_bytes.all.{when}", 0)
            nvml = nvml_figures(self.device) if self._nvml_reason is None else self._nvml_reason
            if isinstance(nvml, str):
                self._nvml_reason = nvml
            else:
                found |= nvml
        return found

    def summary(self) -> Summary:
        """Summarize all steps that the device has finished since `start`; stays after `close`."""
        if self._clock is not None:
            self._drain()
            self._ended = counts.stats(), self.memory()
        elif not hasattr(self, "_ended"):
            raise RuntimeError("TrainingMonitor: summary() before start() or the with block")
        stats, memory = self._ended
        times = self._seconds
        total = math.fsum(times)
        cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else None
        median = statistics.median(times) if times else math.nan
        return Summary(
            steps=len(times),
            tokens=self._tokens,
            seconds=total,
            tokens_per_second=self._tokens / total if total > 0 else math.nan,
            step_seconds=median,
            step_seconds_p20=cuts[1] if cuts else median,
            step_seconds_p80=cuts[7] if cuts else median,
            memory={key: value for key, value in memory.items() if key.endswith("_bytes")},
            **kernel_counts(self._first, stats),
        )

    def close(self, wait: bool = True) -> None:
        """Make the last record, write the summary and close the file.

        wait: for the device to finish the last step: the only time that the host waits at all.
        """
        if self._clock is None:
            return
        self._ended = counts.stats(), {}
        try:
            # After an error nothing is waited for, and the device may refuse to answer.
            with contextlib.nullcontext() if wait else contextlib.suppress(RuntimeError):
                if wait and self._pending:
                    self._clock.wait(self._pending[-1][1])
                self.record()
                self._write({"type": "summary", "time": time.time()} | plain(self.summary()))
        finally:
            self._pending.clear()
            self._clock = None
            if self._live is not None:
                self._live.stop()
            if self._lines is not None:
                self._lines.close()
                self._lines = None

    def _started(self) -> WallClock | CudaClock:
        if self._clock is None:
            raise RuntimeError("TrainingMonitor: expected start() or the with block first")
        return self._clock

    def _drain(self) -> None:
        """Take in the steps whose end has passed on the device."""
        clock = self._started()
        while self._pending and clock.passed(self._pending[0][1]):
            begin, end, tokens = self._pending.popleft()
            seconds = clock.seconds(begin, end)
            self._seconds.append(seconds)
            self._finished += 1
            self._tokens += tokens
            self._since = [
                have + more for have, more in zip(self._since, (1, tokens, seconds), strict=True)
            ]

    def _write(self, record: dict[str, Any]) -> None:
        if self._lines is None:
            return
        try:
            self._lines.write(record)
        except OSError as error:
            warnings.warn(f"{self._jsonl}: no further records ({error})", stacklevel=3)
            self._lines.close()
            self._lines = None
