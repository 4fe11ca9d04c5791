"""One provider in a process of its own: `python -m peftkern.tools.bench.worker PROVIDER PARENT`.

Commands come as JSON lines on standard input, each is answered by one line; what libraries print
goes to standard error. The process ends with its input, and is killed with its parent.

    {"do": "start", "device", "threads"}                -> {}
    {"do": "build", "problem", "data", "rotate"}        -> {"note"}: layers from the case's file
    {"do": "check"}                                     -> {"rms", "max", "note"}: of one call
    {"do": "run", "seconds"}                            -> {"samples"}: of the calls of a turn
    {"do": "memory"}                                    -> {"peak_bytes"}
    {"do": "free"}                                      -> {}
    {"do": "roof", "seconds", "dtypes", "small"}        -> the ceilings          (by the referee)
    {"do": "prepare", "problem", "data", "seed"}        -> {"rms", "max"}: eager (by the referee)

An exception is answered by {"error": its first line}; the process goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

REFEREE = "referee"
PR_SET_PDEATHSIG = 1
MOST_CALLS = 200  # of a turn on a GPU
MOST_COPIES = 64  # of a layer; what is smaller, other processes' turns empty the caches of


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Worker:
    """What the commands do; one method each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.free()

    def free(self) -> dict:
        self.problem = self.tensors = self.setup = self.call = self.collect = None
        self.estimate = None  # seconds of a call
        gc.collect()
        return {}

    def start(self, device: str, threads: int) -> dict:
        """Import what the provider needs, so that no build pays for it."""
        import torch

        from peftkern.tools.bench import providers

        self.device = torch.device(device)
        if device == "cpu":
            torch.set_num_threads(threads)
        else:
            torch.cuda.init()
        if self.name != REFEREE:
            self.provider = providers.provider(self.name)
            for package in self.provider.packages:
                if package != "unsloth":  # which changes the packages that are imported after it
                    __import__(package)
            if self.provider.over_peft and providers.has("peft"):
                from peftkern.tools.bench import peers  # noqa: F401
        else:
            from peftkern.tools.bench import data, machine  # noqa: F401
        return {}

    def build(self, problem: dict, data: str, rotate: int) -> dict:
        import peftkern
        from peftkern.tools.bench.cases import Problem
        from peftkern.tools.bench.data import load

        self.free()
        peftkern.reset_stats()
        self.problem = Problem(**problem)
        self.tensors = load(Path(data), self.device)
        self.copies = min(MOST_COPIES, max(2, -(-rotate // self.problem.weight_bytes)))
        layers = self.provider.build(self.problem, self.tensors, self.copies)
        x = self.tensors.get("x")
        inputs = 1  # a GPU's L2 cache would still hold much of a single x
        if x is not None and self.device.type == "cuda":
            inputs = min(self.copies, max(2, -(-rotate // x.nbytes)))
        self.setup, self.call, self.collect = calls(self.problem, layers, self.tensors, inputs)
        return {}

    def check(self) -> dict:
        """One call against the oracle. Then each copy is met once, so that no clock pays for what a
        library does to a weight at its first call."""
        import peftkern
        from peftkern.tools.bench.data import compare

        results = self.collect(self.call(self.setup()))
        found = compare(self.problem, results, self.tensors, self.provider.adapted)
        del results
        fell_back = peftkern.stats().fallbacks if self.name == "peftkern" else {}
        for _ in range(self.copies if self.problem.mode == "no-grad" else 2):
            self.call(self.setup())
        found["note"] = "; ".join(f"{op}: {why}" for (op, why) in fell_back) or None
        return found

    def run(self, seconds: float) -> dict:
        from peftkern.tools.bench import gpu_timer, timer

        if self.device.type == "cpu":
            return {"samples": timer.turn(self.call, self.setup, seconds, self.copies)}
        if self.estimate is None:
            self.estimate = min(gpu_timer.turn(self.call, 5, self.setup))
        counted = max(1, min(MOST_CALLS, round(seconds / max(1e-6, self.estimate))))
        samples = gpu_timer.turn(self.call, gpu_timer.UNCOUNTED + counted, self.setup)
        return {"samples": samples[gpu_timer.UNCOUNTED :]}

    def memory(self) -> dict:
        from peftkern.tools.bench.memory import peak_bytes

        return {"peak_bytes": peak_bytes(lambda: self.call(self.setup()), self.device)}

    def roof(self, seconds: float, dtypes: list[str], small: bool) -> dict:
        from peftkern.tools.bench import machine

        return machine.roof(seconds, self.device, small, tuple(dtypes))

    def prepare(self, problem: dict, data: str, seed: int) -> dict:
        from peftkern.tools.bench.cases import Problem
        from peftkern.tools.bench.data import prepare

        return prepare(Problem(**problem), seed, Path(data), self.device)


def calls(problem, layers: list, tensors: dict, inputs: int) -> tuple[Callable, Callable, Callable]:
    """`call(setup())` is what is timed; `collect` names its results. Copies take turns, and so
    do as many inputs."""
    import torch

    numbers = itertools.count()
    count = len(layers)
    if not problem.kind.rows:
        return lambda: layers[next(numbers) % count], lambda one: one.run(), lambda y: {"y": y}
    dy, train = tensors["dy"], problem.mode != "no-grad"
    xs = [tensors["x"].clone().requires_grad_(train) for _ in range(inputs)]

    def pick() -> tuple:
        number = next(numbers)
        return layers[number % count], xs[number % len(xs)]

    def forward(given: tuple) -> torch.Tensor:
        one, x = given
        return one.run(x)

    def backward(given: tuple) -> tuple:
        one, x, y = given
        return torch.autograd.grad(y, (x, *one.adapter), dy)

    def setup_backward() -> tuple:
        one, x = pick()
        return one, x, one.run(x)

    def full(given: tuple) -> tuple:
        one, x = given
        y = one.run(x)
        return y.detach(), *backward((one, x, y))

    def no_grad(given: tuple) -> torch.Tensor:
        with torch.no_grad():
            return forward(given)

    gradients = ("dx", "lora_A.grad", "lora_B.grad")
    if problem.mode == "no-grad":
        return pick, no_grad, lambda y: {"y": y}
    if problem.mode == "forward":
        return pick, forward, lambda y: {"y": y}
    if problem.mode == "backward":
        return setup_backward, backward, lambda got: dict(zip(gradients, got, strict=False))
    return pick, full, lambda got: dict(zip(("y", *gradients), got, strict=False))


def die_with(parent: int) -> None:
    """Linux kills this process when the thread that started it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        sys.exit(1)


def main(name: str, parent: int) -> None:
    die_with(parent)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(name)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except BaseException as error:  # SystemExit too: whatever a library raises is an answer
            traceback.print_exc()
            answer = {"error": first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
