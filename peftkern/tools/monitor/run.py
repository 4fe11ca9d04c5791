"""Runs as `peftkern.monitor` records them: files that may still be growing."""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from peftkern.formats.json_files import brief, parse_json
from peftkern.monitor.records import FIELDS, FORMAT

COUNTS = ("kernel_calls", "reference_calls", "fallbacks")
MOVED = ("pruned", "revived")


class Mask(NamedTuple):
    """What a mask of AdaLoRA kept and what it moved: triplets by their numbers in the layers."""

    kept: int
    budget: float | None
    importance: dict[str, float]
    pruned: dict[str, list[int]]
    revived: dict[str, list[int]]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Mask:
        importance = record.get("importance", {}).items()
        found = {name: math.nan if one is None else float(one) for name, one in importance}
        moved = ({k: [*map(index, v)] for k, v in record.get(kind, {}).items()} for kind in MOVED)
        budget = record.get("budget")
        budget = None if budget is None else float(budget)
        return cls(sum(record["ranks"].values()), budget, found, *moved)


class Run:
    """Records of a file; `read` takes in what has come since it was last called.

    A step is the `global_step` of a Trainer; in another loop steps count on through the file. Steps
    that a resumed training repeats replace those before; totals count all that ran.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Values of records by step, COUNTS for each step; NaN: it was not finite.
        self.points: list[tuple[int, dict[str, float]]] = []
        self.ranks: list[tuple[int, dict[str, int]]] = []
        self.masks: list[tuple[int, Mask]] = []  # of each entry of `ranks`
        self.starts: list[dict[str, Any]] = []
        self.totals: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.fallback_reasons: Counter[str] = Counter()
        self.finished = False
        self.changed = math.nan  # when the file was, in seconds as time.time()
        self.ignored = 0  # lines that were cut off, the last one among them
        self._offset = self._lines = self._base = 0
        self._torn: list[str] = []  # what is wrong with lines that are no JSON

    def read(self) -> list[dict[str, Any]]:
        """Take in the complete lines that are new, and return the records of steps among them.

        Raises: OSError; ValueError naming the file if it is none of a monitor. A line may be cut
            off at the end, or where another process then went on in a line of its own.
        """
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode) or status.st_size < self._offset:
            raise ValueError(f"{self.path}: expected a file that a monitor appends to")
        self.changed = status.st_mtime
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            *lines, rest = file.read().split(b"\n")
        steps = []
        for line in lines:
            self._offset += len(line) + 1
            self._lines += 1
            record = self._parsed(line)
            try:
                if record is not None and self._took_step(record):
                    steps.append(record)
            except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
                why = f"line {self._lines}: {type(error).__name__}: {error}"
                raise self._wrong(why) from None
        if not self.starts and (self._torn or rest):
            raise self._wrong(self._torn[0] if self._torn else "no complete line")
        self.ignored = len(self._torn) + bool(rest)
        return steps

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a value of that name, and the values."""
        found = [(step, values[name]) for step, values in self.points if name in values]
        return [step for step, _ in found], [value for _, value in found]

    def values(self) -> list[str]:
        """Return the names of the caller's own values, the loss first."""
        names = {name: None for _, values in self.points for name in values}
        own = [name for name in names if name not in FIELDS and name != "global_step"]
        return sorted(own, key=lambda name: name != "loss")

    def mean_ranks(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return curves of the mean rank of layers of a kind: the last part of their names."""
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for step, ranks in self.ranks:
            kinds: dict[str, list[int]] = {}
            for name, rank in ranks.items():
                kinds.setdefault(name.rpartition(".")[2], []).append(rank)
            for kind, found in kinds.items():
                at, means = curves.setdefault(kind, ([], []))
                at.append(step)
                means.append(sum(found) / len(found))
        return curves

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = parse_json(line)
        except ValueError as error:
            self._torn.append(f"line {self._lines}: {error}")
            return None
        if not self.starts and not (isinstance(record, dict) and record.get("type") == "start"):
            raise self._wrong(f"line {self._lines} is no start")
        return record

    def _took_step(self, record: dict[str, Any]) -> bool:
        kind = record["type"]
        if kind == "start":
            # Files of the first version have no format in their start, and the same fields.
            if record.get("format", FORMAT) != FORMAT:
                raise self._wrong(f"this one's format is {brief(record['format'])}, not {FORMAT!r}")
            self.starts.append(record)
            self._base = self.points[-1][0] if self.points else 0
        elif kind == "step":
            self._add_step(record)
        elif kind == "ranks":
            _append(self.ranks, self._step_of(record), _counts(record["ranks"]))
            _append(self.masks, self._step_of(record), Mask.of(record))
        elif kind != "summary":
            raise LookupError(f"type {kind!r}")
        self.finished = kind == "summary"
        return kind == "step"

    def _add_step(self, record: dict[str, Any]) -> None:
        values = {
            name: math.nan if value is None else float(value)
            for name, value in record.items()
            if value is None or type(value) in (int, float)
        }
        values |= {name: record[name] / record["steps"] for name in COUNTS}
        _append(self.points, self._step_of(record), values)
        for name in ("steps", "tokens", "seconds", *COUNTS):
            if not math.isfinite(values[name]):
                raise ArithmeticError(f"{name} is not finite")
            self.totals[name] += record[name]
        self.calls.update(_counts(record["calls"]))
        self.fallback_reasons.update(_counts(record["fallback_reasons"]))

    def _step_of(self, record: dict[str, Any]) -> int:
        return index(record.get("global_step", self._base + record["step"]))

    def _wrong(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: expected the JSON lines of peftkern.monitor: {why}")


def _counts(counts: dict[str, int]) -> dict[str, int]:
    return {name: index(count) for name, count in counts.items()}


def _append(history: list[tuple[int, Any]], at: int, what: Any) -> None:
    while history and history[-1][0] >= at:
        history.pop()
    history.append((at, what))
