"""Run of `peftkern bench --model`: training steps by PEFT, beside the same with `peftkern.patch`.

Each side lives in a process of its own, on the same weights, adapters and batches; where memory has
room for both they take turns step by step, so that a slow machine slows both. Before the clock runs
the losses of the first steps are compared: they may differ by a few times what rounding errors in
PEFT's own layers change about them. PEFT has half of what is left of the budget for those; then it
is stopped, and a lower bound stands in the place of its time.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from peftkern.tools.bench import machine
from peftkern.tools.bench.processes import Process, WorkerError, WorkerSlowError
from peftkern.tools.bench.record import OURS, Record
from peftkern.tools.bench.rows import Row, case_record, new_record
from peftkern.tools.bench.training_step import Job, planned_bytes
from peftkern.tools.bench.worker import REFEREE

PEFT = "peft"
WORKER = "peftkern.tools.bench.training_worker"
COMPARED = 5  # steps, in which AdamW has made use of wrong gradients
FEWEST = 3  # steps that stand for a result
# Of the difference that rounding errors make, which is one draw; what a float32 sum is off by, if
# the loss itself has no fewer digits; and a token's loss that goes to another expert.
TIMES_NOISE, FLOOR, REROUTED = 5.0, 1e-5, 0.25
ROOM = 1.1  # times what the first process holds, for the second


class TrainingBench:
    """Run: `with TrainingBench(...) as bench: record = bench.run(tick)`."""

    def __init__(
        self, job: Job, *, threads: int, budget: float, roof: dict[str, float] | None = None
    ) -> None:
        self.job, self.threads, self.budget, self.roof = job, threads, budget, roof
        self.environment = machine.describe(threads, torch.device(job.step.device))
        self.started = time.monotonic()
        self.deadline = self.started + budget
        self.rows = {OURS: Row(), PEFT: Row()}
        self.losses: dict[str, list[float]] = {}
        self.said = list(job.said)
        self.calls: dict[str, Any] = {}

    def __enter__(self) -> TrainingBench:
        self.processes = {name: Process(name, WORKER) for name in (PEFT, OURS)}
        if self.roof is None:
            self.processes[REFEREE] = Process(REFEREE)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.stop()

    def run(self, tick: Callable[[str, float], None] = lambda doing, share: None) -> Record:
        """Measure both. Raises: WorkerError if there are no ceilings: the budget was over."""
        self.tick = tick
        tick("planning its memory", 0.0)
        for name, row in self.rows.items():
            row.planned_bytes = planned_bytes(self.job.step, patched=name == OURS)
        noise = self._prepare(PEFT)
        roof = self.roof or self._roof()  # when the others have been imported
        together = self._room()
        if not together:
            self._time([PEFT], (time.monotonic() + self.deadline) / 2)
            self._stop(PEFT)
        self._prepare(OURS)
        self._judge(noise)
        self._time([OURS, PEFT] if together else [OURS], self.deadline)
        case = case_record(
            facts := self.job.facts,
            self.rows,
            work=self.job.work,
            roof=roof,
            labels={OURS: OURS, PEFT: PEFT},
            tokens=facts["M"],
            said=self.said,
            command=self.job.command(self.threads, self.budget),
        )
        return new_record(
            self.environment,
            roof,
            device=self.job.step.device,
            seed=self.job.step.seed,
            budget_s=self.budget,
            elapsed_s=time.monotonic() - self.started,
            cases=[case | self.calls],
        )

    def _roof(self) -> dict:
        referee, step = self.processes[REFEREE], self.job.step
        small = self.job.work[0] < 1 << 22
        asked = {"seconds": 0.0 if small else 0.3, "small": small, "dtypes": [step.dtype]}
        try:
            doing = "measuring the ceilings"
            self.tick(doing, 0.0)
            start = {"device": step.device, "threads": self.threads}
            referee.ask(self.deadline, doing, "start", **start)
            return referee.ask(self.deadline, doing, "roof", **asked)
        except WorkerSlowError:
            why = f"--budget: {self.budget:g} s ended before anything was measured"
            raise WorkerError(why) from None
        finally:
            self._stop(REFEREE)

    def _stop(self, name: str) -> None:
        if name in self.processes:
            self.processes.pop(name).stop()

    def _ask(
        self, name: str, doing: str, do: str, until: float | None = None, **more: Any
    ) -> dict | None:
        """Return the answer; None if there is none, which ends the side with a reason.

        Args: until, a deadline of these steps alone: a lower bound of a step is the reason then.
        """
        row = self.rows[name]
        if name not in self.processes:
            return None
        share = (time.monotonic() - self.started) / self.budget
        self.tick(f"{name}: {doing}", min(1.0, share))
        began = time.monotonic()
        try:
            return self.processes[name].ask(until or self.deadline, doing, do, **more)
        except WorkerSlowError:
            if until is None:
                row.failed = f"{self.budget:g} s ended while {doing} (--budget)"
            else:
                row.at_least = (time.monotonic() - began) / more["steps"]
        except WorkerError as error:
            row.failed = str(error)
        self._stop(name)
        return None

    def _prepare(self, name: str) -> list[float] | None:
        """Build a side, let it run the compared steps twice, measure its memory; return the losses
        of the first time, with rounding errors if it is PEFT's. A side without another to compare
        with runs one step."""
        asked: dict[str, Any] = {"threads": self.threads}
        asked["step"] = dataclasses.asdict(self.job.step)
        self._ask(name, "building the model", "start", **asked)
        alone = self.rows[PEFT].at_least is not None
        steps = 1 if alone else min(COMPARED, self.job.step.steps)
        doing = "running the first step" if alone else f"running the first {steps} steps"
        until = (time.monotonic() + self.deadline) / 2 if name == PEFT else None
        found = first = self._ask(name, doing, "losses", until, steps=steps, noise=name == PEFT)
        if not alone:
            found = self._ask(name, doing, "losses", until, steps=steps)
        memory = self._ask(name, "measuring its memory", "memory")
        if found is not None:
            self.losses[name], self.resolution = found["losses"], found["resolution"]
            self.calls |= found["calls"]
            self.said += found["said"]
        if memory is not None:
            self.rows[name].peak_bytes = memory["peak_bytes"]
            self.rows[name].held_bytes, self.free = memory["held_bytes"], memory["free_bytes"]
        return None if first is None else first["losses"]

    def _room(self) -> bool:
        """Return whether a second process fits beside the first."""
        held = self.rows[PEFT].held_bytes
        if held is None or self.free is None or self.free >= ROOM * held:
            return True
        sizes = f"{PEFT} holds {held / 1e9:.1f} GB, {self.free / 1e9:.1f} GB are free"
        self.said.append(f"one side after the other, not in turns: {sizes}")
        return False

    def _judge(self, noise: list[float] | None) -> None:
        """Compare the losses of the first steps with PEFT's."""
        for name, losses in self.losses.items():
            bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
            if bad:
                self.rows[name].wrong = f"loss {losses[bad[0]]} at step {bad[0] + 1}"
        if len(self.losses) < 2 or noise is None:
            if OURS in self.losses:
                self.said.append("losses were not compared: PEFT has none")
            return
        ours, theirs = self.losses[OURS], self.losses[PEFT]
        row = self.rows[OURS]
        row.error_rms, row.error_max = _differences(ours, theirs)
        self.rows[PEFT].error_rms, moved = _differences(noise, theirs)
        self.rows[PEFT].error_max = moved
        bound = TIMES_NOISE * moved + max(FLOOR, 2 * self.resolution)
        bound += REROUTED / self.job.facts["M"] if self.job.routed else 0.0
        said = f"losses of {len(theirs)} steps: {theirs[0]:.4g} to {theirs[-1]:.4g} by PEFT; ours"
        said += f" differ by at most {row.error_max:.1e}; bound {bound:.1e}, as rounding errors"
        self.said.append(f"{said} move PEFT's by {moved:.1e}")
        if row.wrong is None and self.rows[PEFT].wrong is None and not row.error_max <= bound:
            row.wrong = f"losses differ from PEFT's by {row.error_max:.2g}; bound {bound:.2g}"

    def _time(self, names: list[str], until: float) -> None:
        """Let sides run a step in turns, in shuffled order, until each has its steps."""
        steps, shuffle = self.job.step.steps, random.Random(self.job.step.seed)
        while order := [
            name
            for name in names
            if name in self.processes
            and len(self.rows[name].samples) < steps
            and time.monotonic() + max(self.rows[name].samples[-3:], default=0.0) < until
        ]:
            shuffle.shuffle(order)
            for name in order:
                number = len(self.rows[name].samples) + 1
                answer = self._ask(name, f"step {number} of {steps}", "run")
                if answer is not None:
                    self.rows[name].samples += answer["samples"]
        for name in names:
            row, got = self.rows[name], len(self.rows[name].samples)
            if not row.good:
                continue
            if got < min(FEWEST, steps):
                row.failed = f"only {got} of {steps} steps within {self.budget:g} s (--budget)"
            elif got < steps:
                self.said.append(f"{name}: {got} of {steps} steps until the budget ended")


def _differences(losses: list[float], expected: list[float]) -> tuple[float, float]:
    """Return the root mean square and the largest of the relative differences."""
    found = [abs(one - other) / abs(other) for one, other in zip(losses, expected, strict=True)]
    return math.sqrt(sum(x * x for x in found) / len(found)), max(found)
