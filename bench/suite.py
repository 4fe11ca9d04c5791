"""Runner of the bench scripts: checks, times, compares to targets, writes JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import folders
import graphs
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from specs import CPU, SEED, Case, Named, Options, Spec, Steps, sized

import peftkern
from peftkern.backends import dispatch
from peftkern.backends.device import has_products, triton_interpreted
from peftkern.backends.tolerances import errors
from peftkern.tools.bench import gpu_timer, machine, terminal
from peftkern.tools.bench.gpu_timer import first_line, measure_events
from peftkern.tools.bench.memory import peak_bytes
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import (
    Row,
    calls_of_ours,
    case_record,
    new_record,
    ratio,
    ratio_at_least,
)
from peftkern.tools.bench.runner import FIRST_CALLS, LEAST, Checked, Runner, Tick
from peftkern.tools.bench.timer import measure, pin_threads
from peftkern.tools.bench.training_run import TrainingBench
from peftkern.tools.bench.training_worker import Worker

PATIENCE = 10.0  # times a variant's seconds, or one, for a slow peer's first call on a CPU
POLL_SECONDS = 0.01
GRAPH_SHARE = 0.5  # of a variant's time, added for replayed graphs
MOST_SECONDS = 3600.0  # of training steps without a budget
One = TypeVar("One", bound=Named)


@dataclass
class Built(Checked):
    """State of a case that was built in this process."""

    case: Case | None = None


def check(spec: Spec, case: Case, limit: float = math.inf) -> Built:
    """Compare one call of each variant with float64; the judge's error bounds ours.

    A peer has `limit` seconds for its first call where torch may take a minute for it.
    """
    rows = {name: Row() for name in case.variants}
    built = Built(rows, case.dtype, None, spec.peer_wrong, case=case)
    quick = limit == math.inf or has_products(case.dtype, CPU)
    for name, variant in case.variants.items():
        torch.manual_seed(SEED)
        row = rows[name]
        row.no_graph = variant.no_graph
        bounded = not quick and name != OURS
        if bounded and stopped(variant.call, limit):
            row.at_least = limit / torch.get_num_threads()
            continue
        try:
            start = time.perf_counter()
            returned = variant.call(0)
            seconds = time.perf_counter() - start
            warm = not variant.multiplied and (not bounded or built.allow(name, seconds, limit))
            if variant.multiplied:
                row.samples = [seconds * variant.multiplied]
            if variant.errors is not None:
                row.error_rms, row.error_max = variant.errors(returned)
            result = variant.result(returned)
            for i in range(variant.warm if warm else 0):
                variant.call(i + 1)
        except Exception as error:  # the other variants still count
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again if the device itself is lost
            row.failed = first_line(error)
            continue
        if variant.oracle:
            result = result if isinstance(result, tuple) else (result,)
            pairs = [errors(g, o) for g, o in zip(result, variant.oracle, strict=True)]
            row.error_rms, row.error_max = (max(pair[i] for pair in pairs) for i in (0, 1))
    judge = rows[spec.judge]
    if judge.at_least is not None and case.eager is not None:
        built.eager = case.eager()
    elif judge.error_rms is not None:
        built.eager = judge.error_rms, judge.error_max
    return built


def stopped(call: Callable[[int], object], limit: float) -> bool:
    """Make a first call in a fork of this process; return whether it was stopped at the limit.

    A fork has none of OpenMP's threads and may use one, so that the same call here takes at least
    1 / threads of the limit.
    """
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):  # it will fail here, too
            torch.set_num_threads(1)
            call(0)
        os._exit(0)
    end = time.monotonic() + limit
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(POLL_SECONDS)
    return False


class InProcess(Runner[Named]):
    """Runner of specs in this process, each variant for `seconds`; `write`: the record's file.

    Training steps are run by the processes of `peftkern bench --model`.
    """

    def __init__(
        self,
        record: dict,
        options: Options,
        seconds: float,
        deadline: float = math.inf,
        write: Callable[[], None] = lambda: None,
    ) -> None:
        self.record, self.options, self.seconds = record, options, seconds
        self.deadline, self.written = deadline, write
        self.on_gpu = options.device.type == "cuda"

    def seconds_before_clock(self, case: Named) -> float:
        return case.seconds(sized(case, self.options))

    def run_case(self, case: Named, until: float, tick: Tick) -> bool:
        if isinstance(case, Spec):
            return super().run_case(case, until, tick)
        left = self.deadline - time.monotonic()
        if isinstance(case, Steps):
            self.record["cases"].append(self.trained(case, min(left, MOST_SECONDS), tick))
            return True

        def note(**facts: object) -> None:
            self.record["answers"][-1].update(facts)
            self.written()

        self.record["answers"].append({"name": case.name})
        case.ask(sized(case, self.options), None if left == math.inf else left, note)
        return True

    def trained(self, case: Steps, seconds: float, tick: Tick) -> dict:
        """Measure training steps; return the record of the case."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if forced := dispatch.forced_backend():
                stack.enter_context(mock.patch.dict(os.environ, PEFTKERN_BACKEND=forced))
            job, threads = case.job(sized(case, self.options), folder), torch.get_num_threads()
            roof = self.record["roof"]
            bench = TrainingBench(job, threads=threads, budget=seconds, roof=roof)
            (found,) = stack.enter_context(bench).run(tick)["cases"]
        ours, theirs = found["providers"].values()
        found["providers"] = {OURS: ours, "PEFT": theirs | {"label": "PEFT"}}
        found["against"] = found["against"] and "PEFT"
        return found | {"name": case.name, "shape": case.short_name, "command": ""}

    def check(self, case: Spec, until: float, tick: Tick) -> Built:
        tick(case.short_name, 0.0)
        built = case.build(sized(case, self.options))
        if tuple(built.variants) != case.names:
            raise RuntimeError(f"{case.name}: built {tuple(built.variants)}, not {case.names}")
        peftkern.reset_stats()
        share = FIRST_CALLS * (until - time.monotonic()) / len(built.variants)
        limit = min(PATIENCE * max(1.0, self.seconds), max(LEAST, share))
        return check(case, built, math.inf if self.on_gpu or triton_interpreted() else limit)

    def time(self, case: Spec, checked: Built, right: list[str], until: float, tick: Tick) -> bool:
        """Time every variant for its seconds, whatever the deadline: the case was begun."""
        variants, rows = checked.case.variants, checked.rows
        calls = {name: variants[name].call for name in right if not variants[name].multiplied}
        how = {"seconds": self.seconds, "tick": lambda share: tick(case.short_name, share)}
        if self.on_gpu:
            timings = measure_events(calls, **how)
        else:
            timings = measure(calls, few=checked.few, **how)
        for name, timing in timings.items():
            rows[name].samples = list(timing.samples)
        if self.on_gpu:
            measure_more(rows, timings, calls, self.seconds, self.options.device)
        return True

    def case_record(self, case: Spec, checked: Built) -> dict:
        built, rows = checked.case, checked.rows
        record = case_record(
            facts_of(case, sized(case, self.options), built),
            rows,
            work=(built.bytes, built.flops),
            roof=self.record["roof"],
            labels={name: name for name in rows},
        )
        return record | {"targets": [*reached(case, record)], **calls_of_ours()}


def facts_of(spec: Spec, options: Options, case: Case) -> dict:
    """Return a case's size and kind; its rows are those of its name."""
    stem, _, short = spec.name.partition("/")
    if case.problem is not None:
        size = f"{case.problem.N}x{case.problem.K}"
        return {"name": spec.name, **case.problem.facts(), "shape": size}
    rows, rank = (re.search(rf"-{letter}([0-9]+)\b", short) for letter in ("[MT]", "r"))
    return {
        "name": spec.name,
        "op": stem,
        "shape": short,
        "M": options.m(int(rows[1])) if rows else None,
        "N": options.n,
        "K": options.k,
        "r": int(rank[1]) if rank else options.r,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": "full" if "backward" in short else "forward",
    }


def reached(spec: Spec, record: dict) -> Iterator[dict]:
    """Yield the targets with what was measured."""
    for target in spec.targets:
        found = ratio(record, target.peer)
        bound = ratio_at_least(record, target.peer)
        met = (found or bound or 0.0) >= target.at_least
        if found is None and bound and not met:
            met = None  # a bound below the target tells nothing
        yield {
            **{"peer": target.peer, "at_least": target.at_least, "launches_at_most": None},
            **{"measured": found, "met": met},
        }
    launches = record["providers"][OURS]["launches"]
    if spec.most_launches is not None and launches is not None:
        yield {
            **{"peer": None, "at_least": None, "launches_at_most": spec.most_launches},
            **{"measured": launches, "met": launches <= spec.most_launches},
        }


def measure_more(
    rows: dict[str, Row], timings: dict, right: dict, seconds: float, device: torch.device
) -> None:
    """Measure peak memory, launches and replayed graphs of the correct variants on a GPU.

    Time came first: a failure here costs its own number alone. Of calls that take longer than the
    timer's patience nothing else is measured.
    """
    quick = {n: call for n, call in right.items() if timings[n].median <= gpu_timer.PATIENCE}
    for name, call in quick.items():
        try:
            rows[name].peak_bytes = peak_bytes(lambda call=call: call(0), device)
            rows[name].kernels = graphs.launches(call) or None  # the profiler saw nothing at all
        except Exception as error:
            torch.cuda.synchronize()  # raises again if the device itself is lost
            rows[name].note = first_line(error)
    held = {name: call for name, call in quick.items() if rows[name].no_graph is None}
    medians = {name: timings[name].median for name in held}
    found, refused = graphs.measure_graphs(held, seconds=GRAPH_SHARE * seconds, calls=medians)
    for name in right:
        rows[name].graph = found[name].median if name in found else None
        slow = None if name in quick else f"a call takes over {gpu_timer.PATIENCE:g} s"
        rows[name].no_graph = rows[name].no_graph or slow or refused.get(name)


def parse(stem: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bench_{stem}.py")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device whose cases to run (cpu)")
    add("--n", type=int, help="rows of the weight (4096, on a GPU what the case says)")
    add("--k", type=int, help="columns of the weight (the same)")
    add("--r", type=int, default=16, help="LoRA rank (16)")
    add("--rows", type=int, help="at most so many rows of activations")
    add("--layers", type=int, help="at most so many layers of a stack")
    add("--threads", type=int, help="default: every core that the process may use")
    add("--seconds", type=float, help="time for each variant of each case (2, on a GPU 0.3)")
    add("--budget", type=float, help="start no case after so many seconds (default: run them all)")
    add("--rotate-mb", type=int, help="inputs to cycle through (default: beyond the caches)")
    add("--only", default="", help="cases whose name contains this")
    add("--out", type=Path, default=folders.RESULTS, help="results folder")
    add("--commit", default="", help="what to record where the tree carries no history")
    options = parser.parse_args(argv)
    sizes = (options.n, options.k, options.r, options.rows, options.layers)
    if min(size for size in sizes if size is not None) < 1:
        parser.error("--n, --k, --r, --rows and --layers must be at least 1")
    if (options.n is None) != (options.k is None):
        options.n, options.k = options.n or 4096, options.k or 4096
    return options


def main(
    stem: str,
    specs: list[Named],
    gpu_specs: Callable[[torch.device], list[Named]] = lambda device: [],
    argv: list[str] | None = None,
) -> int:
    """Run the cases of one bench script; return 1 if any of our results is wrong or no case fit
    into the time, 2 without the device.

    `gpu_specs` are a GPU's, from the most to the least wanted. Under Triton's interpreter they run
    on the CPU as a smoke test; its times mean nothing.
    """
    args = parse(stem, argv)
    os.environ.setdefault("PEFTKERN_TRUST", "always")  # kernels are what is measured
    try:
        device = machine.device_named(args.device)
    except machine.DeviceError as error:
        print(f"bench_{stem}.py: error: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    if on_gpu or triton_interpreted():
        specs = gpu_specs(device)
    chosen = [spec for spec in specs if args.only in spec.name]
    if args.n is not None:
        chosen = [replace(spec, shape=(args.n, args.k)) for spec in chosen]
    if not chosen:
        print(f"bench_{stem}.py: no case for {device.type} with {args.only!r} in its name")
        return 0
    with peftkern.use_backend("triton") if triton_interpreted() else contextlib.nullcontext():
        return _run(stem, chosen, args, device)


def _run(stem: str, chosen: list[Named], args: argparse.Namespace, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    began = time.monotonic()
    end = math.inf if args.budget is None else began + args.budget
    seconds = (0.3 if on_gpu else 2.0) if args.seconds is None else args.seconds
    size = (args.n, args.k) if args.n is not None else (4096, 4096)
    rotate = machine.rotation(args.rotate_mb, device)
    options = Options(*size, args.r, rotate, device, args.rows, args.layers)
    threads = torch.get_num_threads() if on_gpu else pin_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    environment = machine.describe(threads, device, args.commit)
    record = new_record(
        environment,
        {},
        bench=stem,
        command=shlex.join(["python", f"bench/bench_{stem}.py", *sys.argv[1:]]),
        device=device.type,
        options={"n": size[0], "k": size[1], "r": args.r, "rotate": rotate},
        **{"seed": 0, "budget_s": args.budget, "elapsed_s": 0.0},
    )
    if busy := terminal.busy_machine(record):
        console.print(busy, style="yellow")
    small = size[0] * size[1] < 1 << 20
    record["roof"] = machine.roof(min(seconds, 1.0), device, small)
    path = args.out / folders.slug(environment) / f"{stem}.json"

    def write() -> None:  # at once: a run may be stopped at any moment
        record["elapsed_s"] = time.monotonic() - began
        machine.write_json(path, record)

    columns = (TextColumn("{task.description:<36}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=1.0)

        def tick(doing: str, share: float) -> None:
            progress.update(bar, description=doing, completed=share)

        InProcess(record, options, seconds, end, write).run_cases(chosen, tick)
    write()
    for line in terminal.bench_report(record, console.width):
        console.print(line)
    console.print(f"written: {path}")
    nothing = len(record["not_reached"]) == len(chosen)
    ours = [case["providers"][OURS] for case in record["cases"]]
    bad = any(row["wrong"] or row["failed"] for row in ours)
    return int(bool(record["failed"]) or nothing or bad)


def cut(spec: One, options: Options) -> One:
    """Cut the sizes that a case has of its own to those of the options."""
    if spec.shape is None:
        return spec
    n, k = spec.shape
    return replace(spec, shape=(min(n, options.n), min(k, options.k)))


_built: dict[str, Built] = {}


def benchmark_test(specs: list[Spec]) -> Callable:
    """Return a pytest-benchmark test of every case and variant. A case is built and checked once
    for all of its variants."""
    import pytest

    ids = [pytest.param(s, name, id=f"{s.name}/{name}") for s in specs for name in s.names]

    @pytest.mark.parametrize(("spec", "name"), ids)
    def test(benchmark, spec: Spec, name: str, options: Options) -> None:
        spec = cut(spec, options)
        if spec.name not in _built:
            _built.clear()
            gc.collect()
            _built[spec.name] = check(spec, spec.build(sized(spec, options)))
            _built[spec.name].judge()
        row, variant = _built[spec.name].rows[name], _built[spec.name].case.variants[name]
        assert row.good, row.wrong or row.failed
        numbers = itertools.count()
        benchmark.group = spec.name
        if variant.multiplied:
            benchmark.pedantic(lambda: variant.call(1), rounds=1)
        else:
            benchmark(lambda: variant.call(next(numbers)))

    return test


def steps_test(cases: list[Steps]) -> Callable:
    """Return a pytest-benchmark test of the steps of every case and side."""
    import pytest

    ids = [pytest.param(c, name, id=f"{c.name}/{name}") for c in cases for name in (OURS, "PEFT")]

    @pytest.mark.parametrize(("case", "name"), ids)
    def test(benchmark, case: Steps, name: str, options: Options, tmp_path: Path) -> None:
        worker = Worker(name)
        step = case.job(sized(cut(case, options), options), tmp_path).step
        worker.start(asdict(step), torch.get_num_threads())
        worker.restart()
        benchmark.group = case.name
        benchmark(worker.run)

    return test
