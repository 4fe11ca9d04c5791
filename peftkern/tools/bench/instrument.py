"""`peftkern bench`: every case beside every baseline, each provider in a process of its own.

The processes take turns of some 50 ms in shuffled order on the same cores, so that a slow machine
slows all of them: ratios come from one stretch of time. A process that crashes or hangs loses its
provider the case and affects no other. A referee, also a process, measures the ceilings and draws
each case's tensors and their float64 results (`data`). The budget bounds the whole run: cases not
reached are named.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from peftkern.tools.bench import machine
from peftkern.tools.bench.cases import OPS, Problem, available_memory
from peftkern.tools.bench.processes import (
    Process,
    WorkerError,
    WorkerGoneError,
    WorkerSlowError,
    ask_all,
)
from peftkern.tools.bench.providers import provider
from peftkern.tools.bench.record import OURS, Record
from peftkern.tools.bench.record import Case as CaseRow
from peftkern.tools.bench.rows import Row, case_record, new_record
from peftkern.tools.bench.timer import MIN_SAMPLES, in_turns, pin_threads
from peftkern.tools.bench.worker import REFEREE

TURN_SECONDS = 0.05
SETTLE_SECONDS = 0.004  # for the threads of the last turn to stop spinning
SLOWEST_CALL = 30.0  # limit of a provider's call in seconds
PATIENCE = 0.25  # of the budget, for providers that build or check slowly: compilers
START_PATIENCE = 0.5  # the same, for imports
GRACE = 1.0  # seconds after the budget for a turn to end
MOST_STARTS = 2  # of a provider's process, the first among them

Tick = Callable[[str, float], None]


class Bench:
    """Run of a benchmark: `with Bench(...) as bench: record = bench.run(tick)`.

    A provider is done with a case after `seconds` of counted calls; `budget` bounds everything.
    """

    def __init__(
        self,
        problems: list[Problem],
        baselines: list[str],
        *,
        device: str,
        threads: int,
        seed: int,
        seconds: float,
        budget: float,
        commands: Callable[[Problem], str] = lambda problem: "",
    ) -> None:
        self.problems, self.names = problems, [OURS, *baselines]
        self.device, self.threads, self.seed = device, threads, seed
        self.seconds, self.budget = seconds, budget
        self.commands = commands
        self.processes: dict[str, Process] = {}
        self.starts = dict.fromkeys([REFEREE, *self.names], 0)
        self.gone: dict[str, str] = {}  # abandoned providers, with reasons
        self.environment = machine.describe(threads, torch.device(device))  # its load: before ours
        self.started = time.monotonic()
        self.deadline = self.started + budget
        self.shuffle = random.Random(seed)

    def __enter__(self) -> Bench:
        self.folder = tempfile.TemporaryDirectory(prefix="peftkern-bench-")
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.stop()
        self.folder.cleanup()

    def run(self, tick: Tick = lambda doing, share: None) -> Record:
        """Measure as many cases as the budget allows.

        Raises: WorkerError if there are no ceilings: the referee failed, or the budget was over.
        """
        tick("starting", 0.0)
        self._start(list(self.starts))
        dtypes = sorted({problem.dtype for problem in self.problems})
        small = max(p.N * p.K * (p.E or 1) for p in self.problems) < 1 << 20
        tick("ceilings of this machine", 0.0)
        if REFEREE not in self.processes:
            raise self._no_ceilings(self.gone[REFEREE])
        asked = {"seconds": 0.0 if small else 0.3, "dtypes": dtypes, "small": small}
        try:
            referee = self.processes[REFEREE]
            roof = referee.ask(self.deadline, "measuring the ceilings", "roof", **asked)
        except WorkerError as error:
            raise self._no_ceilings(str(error)) from error
        cases: list[CaseRow] = []
        left = list(self.problems)
        overhead = 0.0  # mean seconds of a case before its timing starts
        while left and time.monotonic() + overhead < self.deadline:
            problem = left.pop(0)
            began = time.monotonic()
            slot = (self.deadline - began) / (len(left) + 1)

            def part(doing: str, share: float, op: str = problem.op) -> None:
                number = f"{len(cases) + 1}/{len(self.problems)}"
                tick(f"{number} {op}: {doing}", (len(cases) + share) / len(self.problems))

            rows, before_clock = self._case(problem, began + slot, part)
            if rows is None:
                left.insert(0, problem)
                break
            overhead += (before_clock - overhead) / (len(cases) + 1)
            cases.append(self._record(problem, rows, roof))
        return new_record(
            self.environment,
            roof,
            device=self.device,
            seed=self.seed,
            budget_s=self.budget,
            elapsed_s=time.monotonic() - self.started,
            cases=cases,
            not_reached=[problem.name for problem in left],
        )

    def _no_ceilings(self, why: str) -> WorkerError:
        if time.monotonic() >= self.deadline:
            return WorkerError(f"--budget: {self.budget:g} s ended before anything was measured")
        return WorkerError(f"the ceilings of this machine could not be measured: {why}")

    def _start(self, names: list[str]) -> None:
        """Start processes for the providers that have none and are not abandoned."""
        new = {}
        for name in names:
            if name not in self.processes and name not in self.gone:
                self.starts[name] += 1
                new[name] = self.processes[name] = Process(name)
        asked = {"do": "start", "device": self.device, "threads": self.threads}
        patience = START_PATIENCE * self.budget
        _, errors = ask_all(new, patience, self.deadline, "starting", **asked)
        for name, error in errors.items():  # its imports fail
            self._stopped(name, error, for_good=True)

    def _stopped(self, name: str, error: WorkerError, for_good: bool = False) -> None:
        self.processes.pop(name).stop()
        if for_good or self.starts[name] >= MOST_STARTS:
            self.gone[name] = str(error)

    def _case(
        self, problem: Problem, until: float, tick: Callable[[str, float], None]
    ) -> tuple[dict[str, Row] | None, float]:
        """Measure a case; return its rows, None if the budget ended before its timing started, and
        the seconds until then."""
        began = time.monotonic()
        names = [name for name in self.names if problem.op in provider_labels(name)]
        self._start([REFEREE, *names])
        rows = {name: Row(failed=self.gone.get(name)) for name in names}
        path = Path(self.folder.name) / "case.safetensors"
        given = {"problem": problem.as_dict(), "file": str(path)}
        patience = PATIENCE * self.budget
        try:
            tick("float64 result", 0.0)
            if REFEREE in self.gone:
                raise WorkerError(self.gone[REFEREE])
            referee = self.processes[REFEREE]
            eager = referee.ask(self.deadline, "preparing", "prepare", seed=self.seed, **given)
        except WorkerError as error:
            if time.monotonic() >= self.deadline:
                return None, 0.0
            if isinstance(error, WorkerGoneError) and REFEREE in self.processes:
                self._stopped(REFEREE, error)
            return {name: Row(failed=f"no data: {error}") for name in names}, 0.0
        rotate = self._rotation(len(names))
        for do, doing, more in (
            ("build", "building the layers", {**given, "rotate": rotate}),
            ("check", "checking the results", {}),
        ):
            tick(doing, 0.0)
            asked = {name: self.processes[name] for name in names if rows[name].failed is None}
            answers, errors = ask_all(asked, patience, self.deadline, doing, do, **more)
            self._note_failures(rows, errors)
        if time.monotonic() >= self.deadline:
            return None, 0.0
        for name, answer in answers.items():
            row = rows[name]
            row.error_rms, row.error_max, row.note = (answer[k] for k in ("rms", "max", "note"))
            bound = (eager["rms"], eager["max"]) if name == OURS else None
            row.judge(getattr(torch, problem.dtype), bound, problem.kind.peer_wrong)
        right = [name for name in names if rows[name].good]
        for name in right:
            self._peak(name, rows[name])
        before_clock = time.monotonic() - began
        if problem.mode != "memory":
            self._time(rows, right, until, tick)
            if rows[OURS].unfinished:
                return None, 0.0
        if time.monotonic() < self.deadline:  # else they are about to be stopped anyway
            asked = {name: self.processes[name] for name in names if name in self.processes}
            _, errors = ask_all(asked, SLOWEST_CALL, self.deadline, "letting go of a case", "free")
            for name, error in errors.items():
                self._stopped(name, error)
        path.unlink(missing_ok=True)
        return rows, before_clock

    def _note_failures(self, rows: dict[str, Row], errors: dict[str, WorkerError]) -> None:
        for name, error in errors.items():
            rows[name].failed = str(error)
            if isinstance(error, WorkerGoneError):
                self._stopped(name, error, for_good=isinstance(error, WorkerSlowError))

    def _peak(self, name: str, row: Row) -> None:
        try:
            deadline = min(time.monotonic() + SLOWEST_CALL, self.deadline + GRACE)
            answer = self.processes[name].ask(deadline, "measuring memory", "memory")
            row.peak_bytes = answer["peak_bytes"]
        except WorkerError as error:
            self._note_failures({name: row}, {name: error})

    def _time(
        self,
        rows: dict[str, Row],
        right: list[str],
        until: float,
        tick: Callable[[str, float], None],
    ) -> None:
        """Take turns until each has its seconds, or the case's slot is over."""
        began = time.monotonic()

        def over(short: bool) -> bool:
            now = time.monotonic()
            return now >= self.deadline or (now >= until and not short)

        def turn(name: str) -> list[float] | None:
            now, row = time.monotonic(), rows[name]
            if now >= self.deadline:
                return []
            tick("measuring", min(1.0, (now - began) / max(1e-9, until - began)))
            limit = min(now + SLOWEST_CALL, self.deadline + GRACE)
            asked = {"seconds": TURN_SECONDS}
            try:
                answer = self.processes[name].ask(limit, "being measured", "run", **asked)
            except WorkerError as error:
                self._note_failures(rows, {name: error})
                row.unfinished = time.monotonic() >= self.deadline
                return None
            time.sleep(SETTLE_SECONDS)
            return answer["samples"]

        turns = {n: functools.partial(turn, n) for n in right if rows[n].failed is None}
        timings = in_turns(turns, seconds=self.seconds, over=over, shuffle=self.shuffle)
        for name, timing in timings.items():
            row, got = rows[name], len(timing.samples)
            row.samples = list(timing.samples)
            if row.failed is None and got < MIN_SAMPLES:
                row.failed = f"only {got} of {MIN_SAMPLES} calls within the budget"
                row.unfinished = True

    def _rotation(self, workers: int) -> int:
        """Return bytes of weights that each process cycles through. On a CPU all of them together
        exceed the caches, and no weight is read twice in a turn: in between, the turns of the
        others have evicted it."""
        wanted = machine.rotation(None, torch.device(self.device))
        if self.device != "cpu":
            return wanted
        free = available_memory()
        least = wanted // max(1, workers - 1)
        return least if free is None else min(least, free // (3 * workers))

    def _record(self, problem: Problem, rows: dict[str, Row], roof: dict) -> CaseRow:
        facts = problem.facts()
        labels = {name: provider_labels(name)[problem.op] for name in rows}
        return case_record(
            {"name": problem.name, **facts},
            rows,
            work=problem.work(),
            roof=roof,
            labels=labels,
            against=problem.kind.against,
            command=self.commands(problem),
        )


def provider_labels(name: str) -> dict[str, str]:
    """Return the display name per op; a provider from a module claims to have them all."""
    return dict.fromkeys(OPS, name) if ":" in name else provider(name).labels


@contextlib.contextmanager
def pinned(threads: int | None) -> Iterator[int]:
    """Pin this process and its children to as many fixed cores while the context lasts."""
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        yield pin_threads(threads)
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)
