"""What a training loop makes of its time, its memory and our kernels, without waiting for the GPU.

    with TrainingMonitor(jsonl="run.jsonl", live=True) as monitor:
        for batch in batches:
            ...
            optimizer.step()
            monitor.step(tokens=batch["input_ids"].numel())
    print(monitor.summary())

A step costs a clock mark: on a GPU an event in the current stream, which is asked later whether it
has passed and is never waited for. Everything else is read once per record.

Memory stands in three books, which are not added up: `cuda_allocated` is what torch's live tensors
occupy, `cuda_reserved` what torch's allocator holds of the GPU for them, and `nvml_used` what all
processes together hold, contexts and libraries included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import warnings
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from peftkern.backends import dispatch
from peftkern.backends.device import device_info

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

Number = int | float
# What a record may say of itself; `values` of the caller have other names.
FIELDS = frozenset(
    {
        *("type", "time", "step", "steps", "tokens", "seconds", "step_seconds"),
        *("tokens_per_second", "process_rss_bytes", "process_peak_rss_bytes"),
        *("cuda_allocated_bytes", "cuda_reserved_bytes"),
        *("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes"),
        *("nvml_used_bytes", "nvml_utilization_percent"),
        *("kernel_calls", "reference_calls", "fallbacks", "calls", "fallback_reasons"),
    }
)


@dataclass(frozen=True)
class Summary:
    """All steps so far. Seconds of a step: median and the quantiles around it; NaN without steps.

    kernel_calls were served by kernels of ours, reference_calls by plain torch, and fallbacks are
    calls that did not take the way they could have; `calls` and `fallback_reasons` count each kind.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    step_seconds: float
    step_seconds_p20: float
    step_seconds_p80: float
    memory: dict[str, int]
    kernel_calls: int
    reference_calls: int
    fallbacks: int
    calls: dict[str, int]
    fallback_reasons: dict[str, int]

    def __str__(self) -> str:
        if not self.steps:
            return "no steps"
        lines = [
            f"{self.steps:,} steps in {self.seconds:.4g} s, {_ms(self.step_seconds)} each "
            f"[{_ms(self.step_seconds_p20)} - {_ms(self.step_seconds_p80)}]"
        ]
        if self.tokens:
            lines.append(f"{self.tokens:,} tokens, {self.tokens_per_second:,.0f} a second")
        lines += [f"{_name(key)} {_bytes(value)}" for key, value in self.memory.items()]
        lines.append(
            f"{self.kernel_calls:,} calls of kernels, {self.reference_calls:,} of plain torch, "
            f"{self.fallbacks:,} fallbacks"
        )
        lines += [f"  {count:,} x {why}" for why, count in self.fallback_reasons.items()]
        return "\n".join(lines)


class TrainingMonitor:
    """Counts and times the steps of a loop; a context manager, or `start` and `close` by hand.

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
        self._lines: _Lines | None = None
        self._live = _live() if live else None
        self._clock: _WallClock | _CudaClock | None = None
        self._nvml_reason: str | None = "not started"

    @property
    def running(self) -> bool:
        """Between `start` and `close`."""
        return self._clock is not None

    def __enter__(self) -> TrainingMonitor:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(wait=kind is None)

    def start(self) -> TrainingMonitor:
        """Open the file and begin to count; again after `close`, from zero."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        nvml = _nvml(self.device)
        self._nvml_reason = nvml if isinstance(nvml, str) else None
        self.steps = 0
        self._finished = self._tokens = 0
        self._seconds = array("d")  # of every finished step
        self._since = [0, 0, 0.0]  # steps, tokens and seconds of the coming record
        self._first = self._before = dispatch.stats()
        self._pending: deque[tuple[Any, Any, int]] = deque()
        if self._jsonl is not None:
            self._lines = _Lines(self._jsonl)
            about = {
                "type": "start",
                "time": time.time(),
                "device": str(self.device),
                "device_name": device_info(self.device).name,
                "torch": torch.__version__,
                "process": os.getpid(),
            }
            self._write({**about, "nvml": self._nvml_reason or "read"})
        if self._live is not None:
            self._live.start()
        self._clock = _CudaClock(self.device) if cuda else _WallClock()
        self._begin = self._clock.mark()
        return self

    def step(self, tokens: int = 0, **values: Number) -> None:
        """A step has ended: count it, and make a record if one is due.

        Args: tokens of the step, as shapes tell them; values, numbers for the record (loss=...),
            dropped where none is due. A tensor is refused: the host would wait for its value.
        """
        clock = self._started()
        if type(tokens) is not int or tokens < 0:
            raise TypeError(f"tokens: expected a number of tokens, got {_came(tokens)}")
        if values:
            _check_values(values)
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
        """What the steps since the last record did, of those that the device has finished.

        Returns: FIELDS and values, also written to the file and kept in `last`; None if no further
            step has finished. Without dicts: `scalars`.
        """
        self._started()
        _check_values(values)
        self._drain()
        steps, tokens, seconds = self._since
        if not steps:
            return None
        self._since = [0, 0, 0.0]
        now = dispatch.stats()
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
            **_kernel_counts(self._before, now),
            **values,
        }
        self._before = now
        self.last = record
        self._write(record)
        if self._live is not None:
            self._live.update(_line(record), refresh=True)
        return record

    def memory(self) -> dict[str, int]:
        """Bytes now, and NVML's utilisation in percent: what this device has of FIELDS."""
        found = _process_memory()
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)  # empty before the first tensor
            for book in ("allocated", "reserved"):
                for name, when in ((book, "current"), (f"peak_{book}", "peak")):
                    found[f"cuda_{name}_bytes"] = stats.get(f"{book}_bytes.all.{when}", 0)
            nvml = _nvml(self.device) if self._nvml_reason is None else self._nvml_reason
            if isinstance(nvml, str):
                self._nvml_reason = nvml
            else:
                found |= nvml
        return found

    def summary(self) -> Summary:
        """All steps that the device has finished, since `start`; stays after `close`."""
        if self._clock is not None:
            self._drain()
            self._ended = dispatch.stats(), self.memory()
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
            **_kernel_counts(self._first, stats),
        )

    def close(self, wait: bool = True) -> None:
        """Make the last record, write the summary and close the file.

        wait: for the device to finish the last step: the only time that the host waits at all.
        """
        if self._clock is None:
            return
        self._ended = dispatch.stats(), {}
        try:
            # After an error nothing is waited for, and the device may refuse to answer.
            with contextlib.nullcontext() if wait else contextlib.suppress(RuntimeError):
                if wait and self._pending:
                    self._clock.wait(self._pending[-1][1])
                self.record()
                self._write({"type": "summary", "time": time.time()} | _plain(self.summary()))
        finally:
            self._pending.clear()
            self._clock = None
            if self._live is not None:
                self._live.stop()
            if self._lines is not None:
                self._lines.close()
                self._lines = None

    def _started(self) -> _WallClock | _CudaClock:
        if self._clock is None:
            raise RuntimeError("TrainingMonitor: expected start() or the with block first")
        return self._clock

    def _drain(self) -> None:
        """Take in the steps whose end has passed on the device."""
        while self._pending and self._clock.passed(self._pending[0][1]):
            begin, end, tokens = self._pending.popleft()
            seconds = self._clock.seconds(begin, end)
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


def scalars(record: dict[str, Any]) -> dict[str, Number]:
    """The numbers of a record that a plot over steps wants."""
    left_out = ("time", "step")
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in left_out}


class _WallClock:
    """The host's clock: right where computing blocks the host."""

    mark = staticmethod(time.perf_counter)

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self, mark: float) -> None:
        pass


class _CudaClock:
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


class _Lines:
    """A JSONL file to append to, a line at a time and each with one write."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # another program was cut off in its line

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(_json_numbers(record), allow_nan=False) + "\n").encode()
        written = os.write(self._file, line)
        if written < len(line):
            raise OSError(f"{written} of {len(line)} bytes written")

    def close(self) -> None:
        os.close(self._file)


def _json_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a number that is not finite becomes null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }


def _plain(summary: Summary) -> dict[str, Any]:
    fields = dataclasses.asdict(summary)
    return fields.pop("memory") | fields


def _kernel_counts(before: dispatch.Stats, now: dispatch.Stats) -> dict[str, Any]:
    """What `dispatch.stats` counted in between, in numbers and by name."""
    calls = dict(_more(before.calls, now.calls))
    fallbacks = dict(_more(before.fallbacks, now.fallbacks))
    reference = sum(count for (_, backend), count in calls.items() if backend == "reference")
    return {
        "kernel_calls": sum(calls.values()) - reference,
        "reference_calls": reference,
        "fallbacks": sum(fallbacks.values()),
        "calls": {f"{op} on {backend}": count for (op, backend), count in calls.items()},
        "fallback_reasons": {f"{op}: {why}": count for (op, why), count in fallbacks.items()},
    }


def _more(before: dict[Any, int], now: dict[Any, int]) -> Iterator[tuple[Any, int]]:
    """What has grown; a count that has shrunk was reset in between and began at zero."""
    for key, count in sorted(now.items()):
        old = before.get(key, 0)
        grown = count - old if count >= old else count
        if grown:
            yield key, grown


def _process_memory() -> dict[str, int]:
    """Resident memory of this process now, where /proc tells it, and at its largest."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        found["process_rss_bytes"] = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found | {"process_peak_rss_bytes": max(peak, found.get("process_rss_bytes", 0))}


def _nvml(device: torch.device) -> dict[str, int] | str:
    """What NVML tells of a GPU, through torch, which knows its number there; or why it does not."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is not an NVIDIA GPU"
    try:
        return {
            "nvml_used_bytes": torch.cuda.device_memory_used(device),
            "nvml_utilization_percent": torch.cuda.utilization(device),
        }
    except Exception as error:  # NVML's own class of errors comes with the package that may miss
        return " ".join(str(error).split())


def _check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in FIELDS:
            raise ValueError(f"{name}: a record has a field of that name")
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {_came(value)}")


def _came(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor: the host would wait for its value"
    return repr(value)


def _live() -> Live | None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    return Live(console=console, auto_refresh=False) if console.is_terminal else None


def _line(record: dict[str, Any]) -> Text:
    """A record in one line of a terminal, what matters most first."""
    from rich.text import Text

    parts = [f"step {record['step']:,}", f"{_ms(record['step_seconds'])}/step"]
    if record["tokens"]:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts += [f"{key} {value:.4g}" for key, value in record.items() if key not in FIELDS]
    shown = ("cuda_allocated", "cuda_reserved", "cuda_peak_allocated", "nvml_used")
    if "cuda_allocated_bytes" not in record:
        shown = ("process_rss",)
    for key in shown:
        if f"{key}_bytes" in record:
            parts.append(f"{_name(key)} {_bytes(record[f'{key}_bytes'])}")
    if "nvml_utilization_percent" in record:
        parts.append(f"busy {record['nvml_utilization_percent']}%")
    steps = record["steps"]
    parts.append(f"{record['kernel_calls'] / steps:.4g} kernels/step")
    if record["fallbacks"]:
        parts.append(f"{record['fallbacks'] / steps:.4g} fallbacks/step")
    return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


def _name(key: str) -> str:
    """ "peak allocated" of cuda_peak_allocated_bytes, "NVML used" of nvml_used_bytes."""
    words = key.removesuffix("_bytes").replace("rss", "RSS").replace("nvml", "NVML").split("_")
    return " ".join(words[1:] if words[0] == "cuda" else words)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 10 else f"{seconds * 1e3:.3g} ms"
