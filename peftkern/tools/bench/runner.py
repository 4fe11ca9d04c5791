"""Loop of a benchmark: cases in turn within a budget, each implementation checked, then timed.

Where implementations run is the matter of a subclass: in processes of their own for `peftkern
bench` (`instrument`), in this one for the scripts of bench/.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from peftkern.tools.bench.gpu_timer import first_line
from peftkern.tools.bench.record import OURS, Record
from peftkern.tools.bench.rows import Row

Tick = Callable[[str, float], None]  # of what is being done, and the share done
CALLS = 10  # of a peer, about: the checked one, warm ones, one for its memory, timed ones
FIRST_CALLS = 0.5  # of what is left of a case's slot, for the first calls of all peers on a CPU
LEAST = 1.0  # seconds of it for each, however late it is
One = TypeVar("One")  # case, in the words of a subclass; it has a `name`


@dataclass
class Checked:
    """State of a case: a row of each implementation, with its errors; `eager`: the error (rms, max)
    that bounds ours; `peer_wrong`: the one from which a peer's result is wrong; `few`: the
    samples of peers that are too slow for more."""

    rows: dict[str, Row]
    dtype: torch.dtype = torch.float32
    eager: tuple[float, float] | None = None
    peer_wrong: float = 0.0
    few: dict[str, int] = field(default_factory=dict)

    def allow(self, name: str, seconds: float, limit: float) -> bool:
        """Return whether a peer whose call takes so many seconds has all its calls within the
        limit; else it has as many samples as fit."""
        if seconds * CALLS > limit:
            self.few[name] = max(1, int(limit / seconds))
        return name not in self.few

    def judge(self) -> list[str]:
        """Mark the wrong results; return the names of the others."""
        for name, row in self.rows.items():
            if row.error_rms is not None:
                bound = self.eager if name == OURS else None
                row.judge(self.dtype, bound, self.peer_wrong)
        return [name for name, row in self.rows.items() if row.good]


class Runner(ABC, Generic[One]):
    """Run whose `record` grows; `deadline`, of time.monotonic, bounds it."""

    record: Record
    deadline: float = math.inf

    def run_cases(self, cases: Iterable[One], tick: Tick) -> None:
        """Measure the cases in turn; those that the deadline does not leave time for are named."""
        cases = list(cases)
        for done, case in enumerate(cases):
            began = time.monotonic()
            if self.deadline - began <= self.seconds_before_clock(case):
                self.record["not_reached"].append(case.name)  # a later one may take less
                continue

            def part(doing: str, share: float, done: int = done) -> None:
                tick(f"{done + 1}/{len(cases)} {doing}", (done + share) / len(cases))

            slot = (self.deadline - began) / (len(cases) - done)
            try:
                if not self.run_case(case, began + slot, part):
                    self.record["not_reached"].append(case.name)
            except Exception as error:  # the cases after it are still worth knowing
                traceback.print_exc()
                self.record["failed"][case.name] = first_line(error)
            self.written()
            gc.collect()

    def run_case(self, case: One, until: float, tick: Tick) -> bool:
        """Measure a case; return False if the deadline came before it was timed."""
        checked = self.check(case, until, tick)
        if checked is None:
            return False
        right = checked.judge()
        for name in right:
            self.measure_peak(name, checked)
        if not self.time(case, checked, right, until, tick):
            return False
        self.record["cases"].append(self.case_record(case, checked))
        return True

    def seconds_before_clock(self, case: One) -> float:
        """Estimate the seconds that a case needs at least; with fewer left it is not begun."""
        return 0.0

    def written(self) -> None:
        """Write the record as far as it is complete: a run may be stopped at any moment."""

    def measure_peak(self, name: str, checked: Checked) -> None:
        """Measure the peak memory of a call, where that is done before it is timed."""

    @abstractmethod
    def check(self, case: One, until: float, tick: Tick) -> Checked | None:
        """Build each implementation and compare one call of it with float64; stop peers whose
        call takes too much of the time `until` the end of the case's slot."""

    @abstractmethod
    def time(self, case: One, checked: Checked, right: list[str], until: float, tick: Tick) -> bool:
        """Let those with right results take turns; return False if the deadline came too early."""

    @abstractmethod
    def case_record(self, case: One, checked: Checked) -> dict:
        """Make the record of a case."""
