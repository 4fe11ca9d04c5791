"""`peftkern bench`: every case beside every baseline, each provider in a process of its own.

The processes take turns of some 50 ms in shuffled order on the same cores, so that a slow machine
slows all of them: ratios come from one stretch of time. A process that crashes or hangs loses its
provider the case and affects no other. A referee, also a process, measures the ceilings and draws
each case's tensors and their float64 results (`data`). The budget bounds the whole run: cases not
reached are named.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, PEER_WRONG, RATIO
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
from peftkern.tools.bench.record import FORMAT, OURS, Record
from peftkern.tools.bench.record import Case as CaseRow
from peftkern.tools.bench.record import Provider as ProviderRow
from peftkern.tools.bench.timer import MIN_SAMPLES, Timing, pin_threads
from peftkern.tools.bench.worker import REFEREE

TURN_SECONDS = 0.05
SETTLE_SECONDS = 0.004  # for the threads of the last turn to stop spinning
SLOWEST_CALL = 30.0  # limit of a provider's call in seconds
PATIENCE = 0.25  # of the budget, for providers that build or check slowly: compilers
START_PATIENCE = 0.5  # the same, for imports
GRACE = 1.0  # seconds after the budget for a turn to end
MOST_STARTS = 2  # of a provider's process, the first among them

Tick = Callable[[str, float], None]


@dataclass
class Row:
    """State of one provider in one case."""

    error_rms: float | None = None
    error_max: float | None = None
    wrong: str | None = None
    failed: str | None = None
    note: str | None = None
    peak_bytes: int | None = None
    samples: list[float] = field(default_factory=list)
    unfinished: bool = False  # the budget ended before it had enough calls

    def record(self, label: str, work: tuple[int, int], floor: float) -> ProviderRow:
        good = self.wrong is None and self.failed is None
        timing = Timing(tuple(self.samples)) if good and self.samples else None
        median = timing.median if timing else None
        return {
            "label": label,
            "median_ms": median * 1e3 if timing else None,
            "p20_ms": timing.quantile(0.2) * 1e3 if timing else None,
            "p80_ms": timing.quantile(0.8) * 1e3 if timing else None,
            "samples_ms": [round(s * 1e3, 5) for s in timing.samples] if timing else [],
            "error_rms": _finite(self.error_rms),
            "error_max": _finite(self.error_max),
            "wrong": self.wrong,
            "failed": self.failed,
            "note": self.note,
            "peak_bytes": self.peak_bytes if good else None,
            "gb_s": work[0] / median / 1e9 if timing else None,
            "tflop_s": work[1] / median / 1e12 if timing and work[1] else None,
            "share_of_roof": floor / median if timing else None,
        }


def _finite(value: float | None) -> float | None:
    """Replace NaN, which JSON lacks, by None; `wrong` reports it."""
    return value if value is None or math.isfinite(value) else None


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
        return {
            "format": FORMAT,
            "command": "",
            "device": self.device,
            "seed": self.seed,
            "budget_s": self.budget,
            "elapsed_s": time.monotonic() - self.started,
            "environment": self.environment,
            "roof": roof,
            "cases": cases,
            "not_reached": [problem.name for problem in left],
            "not_installed": {},
        }

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
            self._judge(problem, rows[name], answer, eager if name == OURS else None)
        right = [name for name in names if rows[name].failed is None and rows[name].wrong is None]
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

    @staticmethod
    def _judge(problem: Problem, row: Row, answer: dict, eager: dict | None) -> None:
        """Mark wrong results: ours by the rule of the tests, a peer by the wider PEER_WRONG."""
        row.error_rms, row.error_max, row.note = (answer[key] for key in ("rms", "max", "note"))
        dtype = getattr(torch, problem.dtype)
        rms, top = PEER_WRONG, math.inf
        if eager is not None:
            rms = RATIO * eager["rms"] + FLOOR_RMS[dtype]
            top = RATIO * eager["max"] + FLOOR_MAX[dtype]
        if not (row.error_rms <= rms and row.error_max <= top):  # NaN is wrong too
            row.wrong = f"error {row.error_rms:.2g} rms, {row.error_max:.2g} max; bound {rms:.2g}"
            row.wrong += f" rms, {top:.2g} max" if eager is not None else " rms"

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
        """Take turns in shuffled order until each has its seconds, or the case's slot is over."""
        order = [name for name in right if rows[name].failed is None]
        began = time.monotonic()

        def wanting(name: str) -> bool:
            samples = rows[name].samples
            return rows[name].failed is None and (
                len(samples) < MIN_SAMPLES or sum(samples) < self.seconds
            )

        def short(name: str) -> bool:
            return rows[name].failed is None and len(rows[name].samples) < MIN_SAMPLES

        while any(map(wanting, order)):
            now = time.monotonic()
            if now >= self.deadline or (now >= until and not any(map(short, order))):
                break
            tick("measuring", min(1.0, (now - began) / max(1e-9, until - began)))
            self.shuffle.shuffle(order)
            for name in order:
                row = rows[name]
                if row.failed is not None or time.monotonic() >= self.deadline:
                    continue
                limit = min(time.monotonic() + SLOWEST_CALL, self.deadline + GRACE)
                try:
                    answer = self.processes[name].ask(
                        limit, "being measured", "run", seconds=TURN_SECONDS
                    )
                except WorkerError as error:
                    self._note_failures(rows, {name: error})
                    row.unfinished = time.monotonic() >= self.deadline
                    continue
                row.samples += answer["samples"]
                time.sleep(SETTLE_SECONDS)
        for name in filter(short, order):
            got = len(rows[name].samples)
            rows[name].failed = f"only {got} of {MIN_SAMPLES} calls within the budget"
            rows[name].unfinished = True

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
        work = problem.work()
        floor = max(work[0] / roof["copy"], work[1] / roof[problem.dtype])
        providers = {
            name: row.record(provider_labels(name)[problem.op], work, floor)
            for name, row in rows.items()
        }
        good = [n for n, row in rows.items() if row.wrong is None and row.failed is None]
        against = [name for name in problem.kind.against if name in good]
        against += [name for name in good if name != OURS and name not in against]
        facts = problem.as_dict()
        del facts["E"]  # the shape tells
        return {
            "name": problem.name,
            **facts,
            "bytes": work[0],
            "flops": work[1],
            "floor_ms": floor * 1e3,
            "against": against[0] if against else None,
            "command": self.commands(problem),
            "providers": providers,
        }


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
