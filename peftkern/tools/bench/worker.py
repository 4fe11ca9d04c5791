"""Process of one provider: `python -m peftkern.tools.bench.worker PROVIDER PARENT`.

Commands come as JSON lines on standard input, each is answered by one line; the output of libraries
goes to standard error. The process ends with its input, and is killed with its parent.

    {"do": "start", "device", "threads", "packages"}    -> {}
    {"do": "build", "problem", "file", "rotate"}        -> {}: layers from the case's file
    {"do": "first"}                                     -> {"seconds"}: of the first call
    {"do": "check", "limit"}                            -> {"rms", "max", "note"}: of that call;
                                                           "seconds" of the quickest until now
    {"do": "run", "seconds"}                            -> {"samples"}: of the calls of a turn
    {"do": "memory"}                                    -> {"peak_bytes"}
    {"do": "free"}                                      -> {}
    {"do": "roof", "seconds", "dtypes", "small"}        -> the ceilings          (by the referee)
    {"do": "prepare", "problem", "file", "seed"}        -> {"rms", "max"}: eager (by the referee)

An exception is answered by {"error": its first line}; the process goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern.tools.bench import data, gpu_timer, machine, memory, providers, timer
from peftkern.tools.bench.cases import Problem

REFEREE = "referee"
PR_SET_PDEATHSIG = 1
MOST_CALLS = 200  # of a turn on a GPU
MOST_COPIES = 64  # of a layer; smaller ones are evicted by the turns of other processes


class Worker:
    """Implementation of the commands, one method each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.free()

    def free(self) -> dict:
        self.problem = self.tensors = self.setup = self.call = self.collect = self.held = None
        self.estimate = None  # seconds of a call
        gc.collect()
        return {}

    def start(self, device: str, threads: int, packages: Sequence[str] = ()) -> dict:
        """Import what the provider needs, so that no build pays for it."""
        self.device = torch.device(device)
        if device == "cpu":
            torch.set_num_threads(threads)
        else:
            torch.cuda.init()
        if self.name != REFEREE:
            self.provider = providers.provider(self.name)
            for package in packages:
                importlib.import_module(package)
        return {}

    def build(self, problem: dict, file: str, rotate: int) -> dict:
        self.free()
        peftkern.reset_stats()
        self.problem = Problem(**problem)
        self.tensors = data.load(Path(file), self.device)
        self.copies = min(MOST_COPIES, max(2, -(-rotate // self.problem.weight_bytes)))
        layers = self.provider.build(self.problem, self.tensors, self.copies)
        x = self.tensors.get("x")
        inputs = 1  # a GPU's L2 cache would still hold much of a single x
        if x is not None and self.device.type == "cuda":
            inputs = min(self.copies, max(2, -(-rotate // x.nbytes)))
        self.setup, self.call, self.collect = calls(self.problem, layers, self.tensors, inputs)
        self.held = self.setup()
        return {}

    def first(self) -> dict:
        """Make one call, and hold its results."""
        self.quickest = self._timed(self.held)
        return {"seconds": self.quickest}

    def _timed(self, given: object) -> float:
        began = time.perf_counter()
        self.held = self.call(given)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def check(self, limit: float | None = None) -> dict:
        """Check the first call against the oracle. Then each copy is called once, so that a
        library's first-call work on a weight is not timed. In training there is none: so many
        calls as fit into `limit` seconds, at most two."""
        results, self.held = self.collect(self.held), None
        found = data.compare(self.problem, results, self.tensors, self.provider.adapted)
        del results
        fell_back = peftkern.stats().fallbacks if self.name == "peftkern" else {}
        each, spent = self.problem.mode == "no-grad" or not self.problem.kind.rows, self.quickest
        for _ in range(self.copies if each else 2):
            if not each and limit is not None and spent + self.quickest > limit:
                break
            seconds = self._timed(self.setup())
            self.held, spent = None, spent + seconds
            self.quickest = min(self.quickest, seconds)
        found["note"] = "; ".join(f"{op}: {why}" for (op, why) in fell_back) or None
        return found | {"seconds": self.quickest}

    def run(self, seconds: float) -> dict:
        if self.device.type == "cpu":
            return {"samples": timer.turn(self.call, self.setup, seconds, self.copies)}
        if self.estimate is None:
            self.estimate = min(gpu_timer.turn(self.call, 5, self.setup))
        counted = max(1, min(MOST_CALLS, round(seconds / max(1e-6, self.estimate))))
        samples = gpu_timer.turn(self.call, gpu_timer.UNCOUNTED + counted, self.setup)
        return {"samples": samples[gpu_timer.UNCOUNTED :]}

    def memory(self) -> dict:
        return {"peak_bytes": memory.peak_bytes(lambda: self.call(self.setup()), self.device)}

    def roof(self, seconds: float, dtypes: list[str], small: bool) -> dict:
        if self.device.type == "cpu":  # a roof of the others, too, where they are slow
            dtypes = [*dict.fromkeys([*dtypes, "float32"])]
        return machine.roof(seconds, self.device, small, tuple(dtypes))

    def prepare(self, problem: dict, file: str, seed: int) -> dict:
        return data.prepare(Problem(**problem), seed, Path(file), self.device)


def calls(
    problem: Problem, layers: list, tensors: dict, inputs: int
) -> tuple[Callable, Callable, Callable]:
    """Return (setup, call, collect): `call(setup())` is timed, `collect` names its results. Copies
    take turns, and so do as many inputs."""
    numbers = itertools.count()
    count = len(layers)
    if not problem.kind.rows:
        collect = layers[0].collect or (lambda y: {problem.kind.results[0]: y})
        return lambda: layers[next(numbers) % count], lambda one: one.run(), collect
    dy, train = tensors["dy"], problem.mode != "no-grad"
    xs = [tensors["x"].clone().requires_grad_(train) for _ in range(inputs)]

    def pick() -> tuple:
        number = next(numbers)
        return layers[number % count], xs[number % len(xs)]

    def forward(given: tuple) -> torch.Tensor:
        one, x = given
        with torch.autocast(x.device.type, x.dtype, enabled=problem.autocast):
            return one.run(x)

    def backward(given: tuple) -> tuple:
        one, x, y = given
        return torch.autograd.grad(y, (x, *one.adapter), dy)

    def setup_backward() -> tuple:
        one, x = pick()
        return one, x, one.run(x)

    def full(given: tuple) -> tuple:
        one, x = given
        y = forward(given)
        return y.detach(), *backward((one, x, y))

    def no_grad(given: tuple) -> torch.Tensor:
        with torch.no_grad():
            return forward(given)

    gradients = ("dx", "lora_A.grad", "lora_B.grad", "magnitude.grad")
    if problem.mode == "no-grad":
        return pick, no_grad, lambda y: {"y": y}
    if problem.mode == "forward":
        return pick, forward, lambda y: {"y": y}
    if problem.mode == "backward":
        return setup_backward, backward, lambda got: dict(zip(gradients, got, strict=False))
    return pick, full, lambda got: dict(zip(("y", *gradients), got, strict=False))


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when the thread that started it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def answer(worker: Any, parent: int) -> None:
    """Answer the commands of standard input by a worker's methods."""
    die_with(parent)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            said = getattr(worker, command.pop("do"))(**command)
        except BaseException as error:  # SystemExit, too: any exception of a library is an answer
            traceback.print_exc()
            said = {"error": gpu_timer.first_line(error)}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    os.environ.setdefault("PEFTKERN_TRUST", "always")  # kernels are what is measured
    answer(Worker(sys.argv[1]), int(sys.argv[2]))
