"""Trials of layers ahead of a training, in a process that may hang or crash.

The child (`worker.py`) tries one layer after another and keeps the verdicts in the user's cache.
One that takes longer than `limit` is killed with its class undecided: the next child finds the mark
of the program that it was in, demotes it, and tries the class once more. A class that ends two
children is PEFT's.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peftkern.backends import journal, trust
from peftkern.tools.bench.processes import Process, WorkerError, WorkerGoneError, WorkerSlowError
from peftkern.tools.tune.cases import Case, RowSweep, Sweep
from peftkern.tools.tune.job import Job

START_SECONDS = 600.0  # to import PEFT and its friends on a busy machine, or to write a verdict
ATTEMPTS = 2  # at a class that ends its process

Progress = Callable[[int, int, str], None]  # classes done, of all, and what is tried now


class TuneError(Exception):
    """Failure to try anything; the message is one line."""


@dataclass(frozen=True)
class Row:
    """Verdict on a class. forward, training: ours over PEFT on the worst clock, if measured."""

    title: str
    name: str
    side: str
    why: str
    forward: float | None
    training: float | None
    known: bool  # before this run


@dataclass
class Outcome:
    """Result of a run; `as_dict` is the JSON of `peftkern tune --json`."""

    rows: list[Row] = field(default_factory=list)
    crossovers: dict[str, int] = field(default_factory=dict)
    demoted: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    stopped: bool = False
    folder: str = ""
    seconds: float = 0.0
    load: float = 0.0  # of the machine, over its cores; above 1 others had a share in the times
    experts: list[str] = field(default_factory=list)  # of the model, left to a training

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(job: Job, progress: Progress = lambda done, of, what: None) -> Outcome:
    """Try everything within the budget; Ctrl-C ends it with what is decided.

    Raises: TuneError if the cache cannot be written, or the child does not start.
    """
    folder = trust.cache_folder() / "trust"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tune").touch()
        (folder / ".tune").unlink()
    except OSError as error:
        raise TuneError(f"{folder}: {error.strerror}: set PEFTKERN_CACHE to another") from error
    campaign = _Campaign(job, progress)
    campaign.outcome.folder, campaign.outcome.experts = str(folder), job.experts
    begin = time.monotonic()
    try:
        campaign.run(begin + job.budget)
    except KeyboardInterrupt:
        campaign.outcome.stopped = True
    except WorkerError as error:
        raise TuneError(f"the process that tries layers does not work: {error}") from error
    finally:
        campaign.stop()
    campaign.outcome.seconds = time.monotonic() - begin
    if hasattr(os, "getloadavg"):
        campaign.outcome.load = round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    return campaign.outcome


class _Campaign:
    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.outcome = Outcome()
        self.process: Process | None = None
        self.decided: set[str] = set()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

    def run(self, end: float) -> None:
        job, outcome = self.job, self.outcome
        outcome.not_reached = [f"crossover of {sweep.name}" for sweep in job.sweeps]
        outcome.not_reached += [case.title for case in job.cases]
        self.progress(0, len(outcome.not_reached), "starting")
        started = self._start()
        outcome.crossovers = started["crossovers"]
        known = {} if job.again else started["known"]
        waiting = []
        for case, name in zip(job.cases, started["names"], strict=True):
            if name in known:
                self._record(case, {"class": name, **known[name]}, known=True)
            elif name not in self.decided:
                waiting.append(case)
        for sweep in job.sweeps:
            if sweep.name in outcome.crossovers and not job.again:
                self._reached(f"crossover of {sweep.name}")
            else:
                self._sweep(sweep, end)
        for case in waiting:
            if time.monotonic() >= end:
                break
            self._try(case)
        outcome.demoted = self._ask("demoted", "telling")

    def _reached(self, title: str) -> None:
        left = self.outcome.not_reached
        if title in left:
            left.remove(title)
        self._tell(title)

    def _tell(self, what: str) -> None:
        total = len(self.job.cases) + len(self.job.sweeps)
        self.progress(total - len(self.outcome.not_reached), total, what)

    def _record(self, case: Case, verdict: dict, known: bool) -> Row:
        worst = {name: max(clock.values()) for name, clock in verdict.get("ratios", {}).items()}
        row = Row(
            title=case.title,
            name=verdict["class"],
            side=verdict["side"],
            why=verdict.get("why", ""),
            forward=worst.get("forward"),
            training=worst.get("training"),
            known=known,
        )
        if row.name not in self.decided:
            self.decided.add(row.name)
            self.outcome.rows.append(row)
        self._reached(case.title)
        return row

    def _sweep(self, sweep: Sweep | RowSweep, end: float) -> None:
        """Find the smallest size that pays, taking it that all larger ones do, too."""
        low, high = 0, len(sweep.sizes)
        while low < high:
            if time.monotonic() >= end:
                return
            middle = (low + high) // 2
            low, high = (low, middle) if self._pays(sweep, middle) else (middle + 1, high)
        size = sweep.sizes[high] if high < len(sweep.sizes) else 2 * sweep.sizes[-1]
        if isinstance(sweep, RowSweep):
            size -= 1  # the most rows that do not
        self._ask("cross", "writing", name=sweep.name, size=size)
        self.outcome.crossovers[sweep.name] = size
        self._reached(f"crossover of {sweep.name}")

    def _pays(self, sweep: Sweep | RowSweep, place: int) -> bool:
        """Return whether layers of a size are ours, or panels take so many rows in less time."""
        size = sweep.sizes[place]
        if isinstance(sweep, Sweep):
            return self._try(sweep.case(size), small=True).side == trust.OURS
        self._tell(f"crossover of {sweep.name}, {size} rows")
        return self._ask("panels", f"timing {size} rows", name=sweep.name, rows=size)["ratio"] < 1

    def _try(self, case: Case, small: bool = False) -> Row:
        """Try a layer, in another process if the first one hangs or ends."""
        self._tell(case.title)
        reason, given = "", dataclasses.asdict(case)
        for _ in range(ATTEMPTS):
            arguments = {"case": given, "again": self.job.again, "small": small}
            try:
                verdict = self._ask("measure", f"trying {case.title}", **arguments)
                return self._record(case, verdict, known=False)
            except WorkerSlowError:
                reason = f"its trial did not end within {self.job.limit:.0f} s"
                journal.accuse(trust.cache_folder() / "trust", self.process.popen.pid, reason)
            except WorkerGoneError as error:
                reason = f"its trial ended the process ({error})"
            except WorkerError as error:
                reason = f"its trial raised {error}"
                break
            self.stop()
            self._start()
        verdict = self._ask("give_up", "writing", case=given, why=reason)
        return self._record(case, verdict, known=False)

    def _ask(self, do: str, doing: str, **arguments: Any) -> dict:
        seconds = self.job.limit if do == "measure" else START_SECONDS
        return self.process.ask(time.monotonic() + seconds, doing, do, **arguments)

    def _start(self) -> dict:
        """Start a child, which reads the journal of the one before."""
        self.process = Process(self.job.device, "peftkern.tools.tune.worker")
        cases = [dataclasses.asdict(case) for case in self.job.cases]
        return self._ask("start", "importing PEFT", cases=cases)
