"""`peftkern bench`: every case beside every baseline, each provider in a process of its own.

The processes take turns of some 50 ms in shuffled order on the same cores, so that a slow machine
slows all of them: ratios come from one stretch of time. A process that crashes or hangs loses its
provider the case and affects no other. A referee, also a process, measures the ceilings and draws
each case's tensors and their float64 results (`data`). The budget bounds the whole run: cases not
reached are named.

On a CPU processes are forked for each case from one that has imported what they need (`nursery`),
and first calls come one after the other, ours before all others: one that takes more than its share
of the case's slot is stopped, and what it had taken is a lower bound of its time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from peftkern.tools.bench import machine
from peftkern.tools.bench.cases import OPS, Problem, available_memory
from peftkern.tools.bench.processes import (
    Forked,
    Nursery,
    Process,
    WorkerError,
    WorkerGoneError,
    WorkerSlowError,
    ask_all,
    receive_all,
)
from peftkern.tools.bench.providers import provider
from peftkern.tools.bench.record import OURS, Record
from peftkern.tools.bench.rows import Row, case_record, new_record
from peftkern.tools.bench.runner import FIRST_CALLS, LEAST, Checked, Runner, Tick
from peftkern.tools.bench.timer import MIN_SAMPLES, in_turns, pin_threads
from peftkern.tools.bench.worker import REFEREE

TURN_SECONDS = 0.05
SETTLE_SECONDS = 0.004  # for the threads of the last turn to stop spinning
SLOWEST_CALL = 30.0  # limit of a provider's call in seconds
PATIENCE = 0.25  # of the budget, for providers that build or check slowly: compilers
START_PATIENCE = 0.5  # the same, for imports
GRACE = 1.0  # seconds after the budget for a turn to end
MOST_ENDS = 2  # of a provider's process that crashed, until it is abandoned


class Bench(Runner[Problem]):
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
        self.overhead: list[float] = []  # seconds of each case before its timing starts
        self.device, self.threads, self.seed = device, threads, seed
        self.seconds, self.budget = seconds, budget
        self.commands = commands
        self.processes: dict[str, Process] = {}
        self.nursery: Nursery | None = None  # on a CPU
        self.ends = dict.fromkeys([REFEREE, *self.names], 0)
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
        if self.nursery is not None:
            self.nursery.stop()
        self.folder.cleanup()

    def run(self, tick: Tick = lambda doing, share: None) -> Record:
        """Measure as many cases as the budget allows.

        Raises: WorkerError if there are no ceilings: the referee failed, or the budget was over.
        """
        tick("starting", 0.0)
        self._start([REFEREE], [])
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
        self.record = new_record(
            self.environment,
            roof,
            **{"device": self.device, "seed": self.seed, "budget_s": self.budget, "elapsed_s": 0.0},
        )
        self.run_cases(self.problems, tick)
        self.record["elapsed_s"] = time.monotonic() - self.started
        return self.record

    def _no_ceilings(self, why: str) -> WorkerError:
        if time.monotonic() >= self.deadline:
            return WorkerError(f"--budget: {self.budget:g} s ended before anything was measured")
        return WorkerError(f"the ceilings of this machine could not be measured: {why}")

    def _start(self, names: list[str], ops: Iterable[str]) -> None:
        """Start processes for the providers that have none and are not abandoned, with what they
        import for these ops."""
        new, packages = {}, {}
        for name in names:
            if name in self.processes or name in self.gone:
                continue
            own = name == REFEREE or ":" in name  # a user's module is imported by its worker alone
            packages[name] = [] if own else provider(name).imports(ops)
            try:
                new[name] = self.processes[name] = self._process(name, packages[name])
            except WorkerGoneError as error:
                self.gone[name] = str(error)
        for name, process in new.items():
            process.send("start", device=self.device, threads=self.threads, packages=packages[name])
        patience = START_PATIENCE * self.budget
        _, errors = receive_all(new, patience, self.deadline, "starting")
        for name, error in errors.items():  # its imports fail
            self._stopped(name, error, for_good=True)

    def _process(self, name: str, packages: list[str]) -> Process:
        if self.device != "cpu":
            return Process(name)
        if self.nursery is None or not self.nursery.alive:
            self.nursery = Nursery()
        return Process(
            name, fork=lambda log: Forked(self.nursery, name, packages, log, self.deadline)
        )

    def _stopped(self, name: str, error: WorkerError, for_good: bool = False) -> None:
        self.processes.pop(name).stop()
        self.ends[name] += 1
        if for_good or self.ends[name] >= MOST_ENDS:
            self.gone[name] = str(error)

    def seconds_before_clock(self, case: Problem) -> float:
        """Return the mean of the cases before it."""
        return statistics.fmean(self.overhead) if self.overhead else 0.0

    def check(self, case: Problem, until: float, tick: Tick) -> Checked | None:
        """Let the referee draw the tensors, and each process build its layers and check a call."""
        names = [name for name in self.names if case.op in provider_labels(name)]
        tick(f"{case.op}: imports, float64 result", 0.0)
        ops = [case.op] if self.device == "cpu" else {problem.op for problem in self.problems}
        self._start([REFEREE], [])
        given = {
            "problem": dataclasses.asdict(case),
            "file": str(Path(self.folder.name) / "case.safetensors"),
        }
        began, referee = time.monotonic(), self.processes.get(REFEREE)
        if referee is not None:  # in one thread, as imports are
            referee.send("prepare", seed=self.seed, **given)
        self._start(names, ops)
        self.began = began if self.overhead else time.monotonic()  # imports are paid once
        rows = {name: Row(failed=self.gone.get(name)) for name in names}
        try:
            if referee is None:
                raise WorkerError(self.gone[REFEREE])
            eager = referee.receive(self.deadline, "preparing")
        except WorkerError as error:
            if time.monotonic() >= self.deadline:
                return None
            if isinstance(error, WorkerGoneError) and REFEREE in self.processes:
                self._stopped(REFEREE, error)
            return Checked({name: Row(failed=f"no data: {error}") for name in names})
        tick(f"{case.op}: building the layers", 0.0)
        asked = {name: self.processes[name] for name in names if rows[name].failed is None}
        more = given | {"rotate": self._rotation(len(names))}
        patience = PATIENCE * self.budget
        _, errors = ask_all(asked, patience, self.deadline, "building the layers", "build", **more)
        self._note_failures(rows, errors)
        bound, dtype = (eager["rms"], eager["max"]), getattr(torch, case.dtype)
        checked = Checked(rows, dtype, bound, case.kind.peer_wrong)
        tick(f"{case.op}: checking the results", 0.0)
        answers = (self._in_turn if self.device == "cpu" else self._at_once)(checked, until)
        if time.monotonic() >= self.deadline:
            return None
        if case.mode == "memory":  # one more call is all that is measured
            checked.few.clear()
        for name, answer in answers.items():
            row = rows[name]
            row.error_rms, row.error_max, row.note = (answer[k] for k in ("rms", "max", "note"))
        return checked

    def _at_once(self, checked: Checked, until: float) -> dict[str, dict]:
        """Let all make their first call at once, and check it: each may have kernels to compile."""
        rows, answers = checked.rows, {}
        for do, doing in (("first", "in its first call"), ("check", "checking the results")):
            asked = {name: self.processes[name] for name in rows if rows[name].failed is None}
            answers, errors = ask_all(asked, PATIENCE * self.budget, self.deadline, doing, do)
            self._note_failures(rows, errors)
        self.overhead.append(time.monotonic() - self.began)
        return answers

    def _in_turn(self, checked: Checked, until: float) -> dict[str, dict]:
        """Let one after the other, ours first, make its first call, and check it."""
        rows, answers = checked.rows, {}
        waiting = [name for name in rows if rows[name].failed is None]
        half = self._share(until)
        while waiting:
            name, began, called = waiting.pop(0), time.monotonic(), False
            limit = max(LEAST, (half - began) / (1 + len(waiting)))
            end = self.deadline if name == OURS else min(self.deadline, began + limit)
            try:
                process = self.processes[name]
                process.ask(end, "in its first call", "first")
                called, more, doing = True, {}, "checking the results"
                if name != OURS:
                    end = min(self.deadline, time.monotonic() + SLOWEST_CALL)
                    more = {"limit": limit}
                answers[name] = process.ask(end, doing, "check", **more)
                if name != OURS:
                    checked.allow(name, answers[name]["seconds"], limit)
            except WorkerError as error:
                slow = isinstance(error, WorkerSlowError) and not called and name != OURS
                if slow and (":" in name or not provider(name).compiles):
                    rows[name].at_least = end - began
                    self.processes.pop(name).stop()
                else:
                    self._note_failures(rows, {name: error})
            if name == OURS:
                self.overhead.append(time.monotonic() - self.began)
                half = self._share(until)
        return answers

    @staticmethod
    def _share(until: float) -> float:
        """Return when the first calls of all peers should have ended."""
        now = time.monotonic()
        return now + FIRST_CALLS * max(0.0, until - now)

    def _note_failures(self, rows: dict[str, Row], errors: dict[str, WorkerError]) -> None:
        for name, error in errors.items():
            rows[name].failed = str(error)
            if isinstance(error, WorkerGoneError):
                self._stopped(name, error, for_good=isinstance(error, WorkerSlowError))

    def measure_peak(self, name: str, checked: Checked) -> None:
        row = checked.rows[name]
        if name in checked.few:
            return
        try:
            deadline = min(time.monotonic() + SLOWEST_CALL, self.deadline + GRACE)
            answer = self.processes[name].ask(deadline, "measuring memory", "memory")
            row.peak_bytes = answer["peak_bytes"]
        except WorkerError as error:
            self._note_failures({name: row}, {name: error})

    def time(
        self, case: Problem, checked: Checked, right: list[str], until: float, tick: Tick
    ) -> bool:
        """Take turns until each has its seconds, or the case's slot is over; then let go of it."""
        rows, began = checked.rows, time.monotonic()
        if case.mode != "memory":
            turns = {
                name: functools.partial(self._turn, name, checked, began, until, tick)
                for name in right
                if rows[name].failed is None
            }

            def over(short: bool) -> bool:
                now = time.monotonic()
                return now >= self.deadline or (now >= until and not short)

            how = {"few": checked.few, "over": over, "shuffle": self.shuffle}
            for name, timing in in_turns(turns, seconds=self.seconds, **how).items():
                row, got = rows[name], len(timing.samples)
                row.samples, wanted = list(timing.samples), checked.few.get(name, MIN_SAMPLES)
                if row.failed is None and got < wanted:
                    row.failed = f"only {got} of {wanted} calls within the budget"
                    row.unfinished = True
            if rows[OURS].unfinished:
                return False
        asked = {name: self.processes[name] for name in rows if name in self.processes}
        if self.device == "cpu":  # others start at once, with what the next case imports
            for name, process in asked.items():
                process.stop()
                del self.processes[name]
        elif time.monotonic() < self.deadline:  # else they are about to be stopped anyway
            _, errors = ask_all(asked, SLOWEST_CALL, self.deadline, "letting go of a case", "free")
            for name, error in errors.items():
                self._stopped(name, error)
        return True

    def _turn(
        self, name: str, checked: Checked, began: float, until: float, tick: Tick
    ) -> list[float] | None:
        now, rows = time.monotonic(), checked.rows
        if now >= self.deadline:
            return []
        tick("measuring", min(1.0, (now - began) / max(1e-9, until - began)))
        limit = self.deadline + GRACE
        if name not in checked.few:
            limit = min(now + SLOWEST_CALL, limit)
        try:
            asked = {"seconds": TURN_SECONDS}
            answer = self.processes[name].ask(limit, "being measured", "run", **asked)
        except WorkerError as error:
            self._note_failures(rows, {name: error})
            rows[name].unfinished = time.monotonic() >= self.deadline
            return None
        time.sleep(SETTLE_SECONDS)
        return answer["samples"]

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

    def case_record(self, case: Problem, checked: Checked) -> dict:
        return case_record(
            {"name": case.name, **case.facts()},
            checked.rows,
            work=case.work(),
            roof=self.record["roof"],
            labels={name: provider_labels(name)[case.op] for name in checked.rows},
            against=case.kind.against,
            command=self.commands(case),
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
