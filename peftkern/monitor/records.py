"""Records of a training loop: fields, counts, and their lines in a file and on a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftkern.backends import counts
from peftkern.backends.programs import PLAIN

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

__all__ = ["FIELDS", "Summary", "scalars"]
Number = int | float
FORMAT = "peftkern monitor 1"  # of a file; every "start" line states it
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
    """Totals of all steps. Seconds of a step: median and quantiles around it; NaN without steps.

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
        times = (self.step_seconds, self.step_seconds_p20, self.step_seconds_p80)
        each = "{} each [{} - {}]".format(*(value_text("seconds", time) for time in times))
        lines = [f"{self.steps:,} steps in {self.seconds:.4g} s, {each}"]
        if self.tokens:
            lines.append(f"{self.tokens:,} tokens, {self.tokens_per_second:,.0f} a second")
        lines += [f"{name_of(key)} {value_text(key, value)}" for key, value in self.memory.items()]
        lines.append(
            f"{self.kernel_calls:,} calls of kernels, {self.reference_calls:,} of plain torch, "
            f"{self.fallbacks:,} fallbacks"
        )
        lines += [f"  {count:,} x {why}" for why, count in self.fallback_reasons.items()]
        return "\n".join(lines)


def scalars(record: dict[str, Any]) -> dict[str, Number]:
    """Return the numbers of a record that a plot over steps wants."""
    left_out = ("time", "step")
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in left_out}


class JSONLines:
    """JSONL file to append to, a line at a time and each with one write."""

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
    """Replace numbers that are not finite by null: JSON has no NaN."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }


def plain(summary: Summary) -> dict[str, Any]:
    fields = dataclasses.asdict(summary)
    return fields.pop("memory") | fields


def kernel_counts(before: counts.Stats, now: counts.Stats) -> dict[str, Any]:
    """Return the counts of `counts.stats` in between, in numbers and by name."""
    calls = dict(_more(before.calls, now.calls))
    fallbacks = dict(_more(before.fallbacks, now.fallbacks))
    in_torch = sum(count for (_, backend), count in calls.items() if backend in PLAIN)
    return {
        "kernel_calls": sum(calls.values()) - in_torch,
        "reference_calls": in_torch,
        "fallbacks": sum(fallbacks.values()),
        "calls": {f"{op} on {backend}": count for (op, backend), count in calls.items()},
        "fallback_reasons": {f"{op}: {why}": count for (op, why), count in fallbacks.items()},
    }


def _more(before: dict[Any, int], now: dict[Any, int]) -> Iterator[tuple[Any, int]]:
    """Return what has grown; a count that has shrunk was reset in between and began at zero."""
    for key, count in sorted(now.items()):
        old = before.get(key, 0)
        grown = count - old if count >= old else count
        if grown:
            yield key, grown


def check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in FIELDS:
            raise ValueError(f"{name}: a record has a field of that name")
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {came(value)}")


def moved_triplets(
    before: Mapping[str, Sequence[bool]], now: Mapping[str, int | Sequence[bool]]
) -> dict[str, dict[str, list[int]]]:
    """Return which triplets of which layers were pruned and revived between two masks.

    A layer that had no mask had all of them; one whose triplets were dropped tells nothing.
    """
    moved: dict[str, dict[str, list[int]]] = {"pruned": {}, "revived": {}}
    for layer, kept in now.items():
        if isinstance(kept, int):
            continue
        held = before.get(layer, [True] * len(kept))
        if len(held) != len(kept):
            continue
        for kind, was in (("pruned", True), ("revived", False)):
            changed = enumerate(zip(held, kept, strict=True))
            found = [i for i, (a, b) in changed if bool(a) is was and bool(b) is not was]
            if found:
                moved[kind][layer] = found
    return moved


def came(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor: the host would wait for its value"
    return repr(value)


def live_line() -> Live | None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    return Live(console=console, auto_refresh=False) if console.is_terminal else None


def line_of(record: dict[str, Any]) -> Text:
    """Format a record as one line of a terminal, what matters most first; null stands for NaN."""
    from rich.text import Text

    record = {key: math.nan if value is None else value for key, value in record.items()}
    steps = record["steps"]
    parts = [f"step {record['step']:,}", f"{value_text('seconds', record['step_seconds'])}/step"]
    if record["tokens"]:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts += [f"{key} {value:.4g}" for key, value in record.items() if key not in FIELDS]
    shown = ["cuda_allocated", "cuda_reserved", "cuda_peak_allocated", "nvml_used"]
    if "cuda_allocated_bytes" not in record:
        shown = ["process_rss"]
    for key in (f"{key}_bytes" for key in shown):
        if key in record:
            parts.append(f"{name_of(key)} {value_text(key, record[key])}")
    if "nvml_utilization_percent" in record:
        parts.append(f"busy {record['nvml_utilization_percent']}%")
    parts.append(f"{record['kernel_calls'] / steps:.4g} kernels/step")
    if record["fallbacks"]:
        parts.append(f"{record['fallbacks'] / steps:.4g} fallbacks/step")
    return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


def name_of(key: str) -> str:
    """Name a field: "peak allocated" of cuda_peak_allocated_bytes, "NVML used"."""
    words = key.removesuffix("_bytes").replace("rss", "RSS").replace("nvml", "NVML").split("_")
    return " ".join(words[1:] if words[0] == "cuda" else words)


def value_text(name: str, value: float) -> str:
    """Format a value of a record, with its unit."""
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    if name.endswith("seconds"):
        return f"{value:,.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return f"{value:,.0f}" if name == "tokens_per_second" else f"{value:,.4g}"
