"""Runner of the bench scripts: checks, times, compares to targets, writes JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import outcomes
import torch
from outcomes import Outcome, Row
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import peftkern
from peftkern.backends.device import triton_interpreted
from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, PEER_WRONG, RATIO, errors
from peftkern.tools.bench import gpu_timer, machine, memory
from peftkern.tools.bench.peers import SEED
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.timer import Timing, measure, pin_threads

GRAPH_SHARE = 0.5  # of a variant's time, added for replayed graphs
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """Sizes of the problem. `rotate`: bytes of inputs that each variant cycles through; `rows`:
    maximum rows of activations; `layers`: maximum layers of a stack."""

    n: int = 4096
    k: int = 4096
    r: int = 16
    rotate: int = 256 << 20
    device: torch.device = CPU
    rows: int | None = None
    layers: int | None = None

    def copies(self, size: int) -> int:
        return max(2, -(-self.rotate // size))

    def m(self, rows: int) -> int:
        return rows if self.rows is None else min(rows, self.rows)

    def depth(self, layers: int) -> int:
        return layers if self.layers is None else min(layers, self.layers)


@dataclass(frozen=True)
class Variant:
    """Implementation to measure: `call(i)` runs on the i-th input. `result` turns its return value
    into tensors that compare with `oracle` (float64); no oracle: nothing to check. `multiplied`:
    too slow to repeat, so one call is timed and its time multiplied by this. `planned_bytes`: the
    expected peak. `no_graph`: reason against a CUDA graph; a failed capture can break all that
    comes later."""

    call: Callable[[int], object]
    oracle: tuple[Tensor, ...] = ()
    result: Callable[[object], object] = lambda returned: returned
    multiplied: int = 0
    planned_bytes: int | None = None
    no_graph: str | None = None


@dataclass(frozen=True)
class Case:
    """Variants that do the same work: at least `bytes` of traffic and `flops` in `dtype`.

    `tokens`: of a training step; its peak memory is measured on a CPU, too, and on a GPU neither
    graphs nor launches are: an optimizer's step is not captured.
    """

    variants: dict[str, Variant]
    bytes: int
    flops: int
    dtype: torch.dtype
    tokens: int | None = None


@dataclass(frozen=True)
class Target:
    """Lower bound on the peer's time over peftkern's."""

    peer: str
    at_least: float


@dataclass(frozen=True)
class Spec:
    """Case to be built in its turn: `name` is "stem/case/dtype", `names` its variants, `judge` the
    peer whose error bounds ours, `most_launches` the bound on kernels of a call of ours, `seconds`
    the estimated time: with less time left it is not begun."""

    name: str
    build: Callable[[Options], Case]
    names: tuple[str, ...]
    judge: str
    targets: tuple[Target, ...] = ()
    peer_wrong: float = PEER_WRONG
    shape: tuple[int, int] | None = None  # (n, k) where the command line gives none
    most_launches: int | None = None
    seconds: Callable[[Options], float] = lambda options: 0.0

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Question:
    """Experiment without peers or a timer: `ask(options, seconds, note)` may take so many seconds
    (None: any number) and calls `note(name=value, ...)` with each finding at once."""

    name: str
    ask: Callable[[Options, float | None, Callable[..., None]], None]
    shape: tuple[int, int] | None = None
    seconds: Callable[[Options], float] = lambda options: 0.0

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


def check(spec: Spec, case: Case) -> dict[str, Row]:
    """Measure errors against float64 and mark wrong results: ours is bound by the judge's error."""
    rows = {name: Row() for name in case.variants}
    dtype = case.dtype
    for name, variant in case.variants.items():
        torch.manual_seed(SEED)
        try:
            start = time.perf_counter()
            returned = variant.call(0)
            if variant.multiplied:
                rows[name].timing = Timing(((time.perf_counter() - start) * variant.multiplied,))
            result = variant.result(returned)
        except Exception as error:  # the other variants still count
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again if the device itself is lost
            rows[name].wrong = gpu_timer.first_line(error)
            continue
        if not variant.oracle:
            continue
        result = result if isinstance(result, tuple) else (result,)
        pairs = [errors(g, o) for g, o in zip(result, variant.oracle, strict=True)]
        rows[name].rms, rows[name].max = (max(pair[i] for pair in pairs) for i in (0, 1))
    judge = rows[spec.judge]
    for name, row in rows.items():
        if row.rms is None:
            continue
        if name == OURS and judge.rms is not None:
            bound = RATIO * judge.rms + FLOOR_RMS[dtype], RATIO * judge.max + FLOOR_MAX[dtype]
        else:
            bound = spec.peer_wrong, float("inf")
        if not (row.rms <= bound[0] and row.max <= bound[1]):  # NaN is wrong too
            row.wrong = f"error {row.rms:.2g} rms, {row.max:.2g} max; bound {bound[0]:.2g}"
    return rows


def sized(spec: Spec | Question, options: Options) -> Options:
    """Replace the sizes of the options by those of a case that has its own."""
    return options if spec.shape is None else replace(options, n=spec.shape[0], k=spec.shape[1])


def run_case(spec: Spec, options: Options, roof: dict, seconds: float, tick) -> Outcome:
    options = sized(spec, options)
    case = spec.build(options)
    if tuple(case.variants) != spec.names:
        raise RuntimeError(f"{spec.name}: built {tuple(case.variants)}, expected {spec.names}")
    dtype = str(case.dtype).removeprefix("torch.")
    floor = max(case.bytes / roof["copy"], case.flops / roof[dtype] if case.flops else 0.0)
    facts = {"bytes": case.bytes, "flops": case.flops, "floor_ms": floor * 1e3}
    if case.tokens is not None:
        facts["tokens"] = case.tokens
    peftkern.reset_stats()
    outcome = Outcome(spec, facts, check(spec, case))
    right = {
        name: variant.call
        for name, variant in case.variants.items()
        if outcome.rows[name].wrong is None and not variant.multiplied
    }
    if case.tokens is not None:
        measure_steps(outcome.rows, case, right, options.device, seconds, tick)
    elif options.device.type == "cuda":
        measure_on_gpu(outcome.rows, case, right, seconds, tick)
    else:
        for name, timing in measure(right, seconds=seconds, tick=tick).items():
            outcome.rows[name].timing = timing
    facts["served"] = {f"{op} on {name}": n for (op, name), n in peftkern.stats().calls.items()}
    facts["fell_back"] = {f"{op}: {w}": n for (op, w), n in peftkern.stats().fallbacks.items()}
    return outcome


def measure_steps(
    rows: dict[str, Row], case: Case, right: dict, device: torch.device, seconds: float, tick
) -> None:
    """Measure time and peak memory of training steps."""
    clock = gpu_timer.measure_events if device.type == "cuda" else measure
    timings = clock(right, seconds=seconds, tick=tick)
    for name, call in right.items():
        rows[name].timing, rows[name].tokens = timings[name], case.tokens
        rows[name].peak_bytes = memory.peak_bytes(lambda call=call: call(0), device)
        rows[name].planned_bytes = case.variants[name].planned_bytes


def measure_on_gpu(rows: dict[str, Row], case: Case, right: dict, seconds: float, tick) -> None:
    """Measure single calls, replayed graphs, launches and peak memory of the correct variants.

    Time comes first: a later failure costs its own number alone. Of calls that take longer than the
    timer's patience nothing else is measured.
    """
    timings = gpu_timer.measure_events(right, seconds=seconds, tick=tick)
    for name, timing in timings.items():
        rows[name].timing = timing
    quick = {n: call for n, call in right.items() if timings[n].median <= gpu_timer.PATIENCE}
    for name, call in quick.items():
        try:
            rows[name].peak_bytes = gpu_timer.peak_bytes(call)
            rows[name].kernels = gpu_timer.launches(call) or None  # the profiler saw nothing at all
        except Exception as error:
            torch.cuda.synchronize()  # raises again if the device itself is lost
            rows[name].not_measured = gpu_timer.first_line(error)
    held = {name: call for name, call in quick.items() if case.variants[name].no_graph is None}
    medians = {name: timings[name].median for name in held}
    graphs, refused = gpu_timer.measure_graphs(held, seconds=GRAPH_SHARE * seconds, calls=medians)
    for name in right:
        rows[name].graph = graphs.get(name)
        slow = None if name in quick else f"a call takes over {gpu_timer.PATIENCE:g} s"
        rows[name].no_graph = case.variants[name].no_graph or slow or refused.get(name)


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
    add("--out", type=Path, default=machine.ROOT / "bench" / "results", help="results folder")
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
    specs: list[Spec],
    gpu_specs: Callable[[torch.device], list[Spec | Question]] = lambda device: [],
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


def _run(
    stem: str, chosen: list[Spec | Question], args: argparse.Namespace, device: torch.device
) -> int:
    on_gpu = device.type == "cuda"
    end = None if args.budget is None else time.monotonic() + args.budget
    seconds = (0.3 if on_gpu else 2.0) if args.seconds is None else args.seconds
    size = (args.n, args.k) if args.n is not None else (4096, 4096)
    rotate = machine.rotation(args.rotate_mb, device)
    options = Options(*size, args.r, rotate, device, args.rows, args.layers)
    threads = torch.get_num_threads() if on_gpu else pin_threads(args.threads)
    facts = machine.describe(threads, device, args.commit)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    where = facts["gpu"]["name"] if on_gpu else f"{facts['cpu']}, {facts['isa']}"
    console.print(f"{where}, {facts['threads']} threads", end="; ")
    roof = machine.roof(min(seconds, 1.0), device, small=size[0] * size[1] < 1 << 20)
    console.print(
        f"copies {roof['copy'] / 1e9:.1f} GB/s (read + written), dense matrix products"
        f" {roof['bfloat16'] / 1e9:.0f} bf16 and {roof['float32'] / 1e9:.0f} fp32 GFLOP/s"
    )
    record = {
        "bench": stem,
        "machine": facts,
        "roof": roof,
        "options": {"n": size[0], "k": size[1], "r": args.r, "rotate": rotate},
        "cases": [],
        "failed": {},
        "not_reached": [],
    }
    path = args.out / machine.slug(facts) / f"{stem}.json"
    found = _measure(chosen, options, seconds, end, record, path, console)
    machine.write_json(path, record)
    title = f"{stem}, r={args.r}, medians and p20-p80"
    console.print(outcomes.table(found, title, facts["gpu"]))
    console.print(f"written: {path}")
    for answer in record.get("answers", []):
        console.print(outcomes.answer(answer), markup=False)
    for name in record["not_reached"]:
        console.print(f"{name}: not reached within {args.budget:.0f} seconds", markup=False)
    for outcome in found:
        for reason, count in outcome.case["fell_back"].items():
            console.print(f"{outcome.spec.name}: fell back {count} times: {reason}", markup=False)
    nothing = len(record["not_reached"]) == len(chosen)
    return int(bool(record["failed"]) or nothing or any(o.rows[OURS].wrong for o in found))


def _measure(
    chosen: list[Spec | Question],
    options: Options,
    seconds: float,
    end: float | None,
    record: dict,
    path: Path,
    console: Console,
) -> list[Outcome]:
    """Run the cases in turn; `record` grows, and is written to `path` after each of them."""
    found: list[Outcome] = []
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(chosen))
        for done, spec in enumerate(chosen):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= spec.seconds(sized(spec, options)):
                record["not_reached"].append(spec.name)  # a later one may take less
                continue
            progress.update(bar, description=spec.short_name, completed=done)

            def tick(share: float, done: int = done) -> None:
                progress.update(bar, completed=done + share)

            def note(**facts: object) -> None:
                record["answers"][-1].update(facts)
                machine.write_json(path, record)

            try:
                if isinstance(spec, Question):
                    record.setdefault("answers", []).append({"name": spec.name})
                    spec.ask(sized(spec, options), left, note)
                else:
                    found.append(run_case(spec, options, record["roof"], seconds, tick))
                    record["cases"].append(found[-1].record())
            except Exception as error:  # the cases after it are still worth knowing
                traceback.print_exc()
                record["failed"][spec.name] = gpu_timer.first_line(error)
            machine.write_json(path, record)  # at once: a run may be stopped at any moment
            gc.collect()
    return found


_built: dict[str, tuple[Case, dict[str, Row]]] = {}


def benchmark_test(specs: list[Spec]) -> Callable:
    """Return a pytest-benchmark test of every case and variant. A case is built and checked once
    for all of its variants; sizes of its own are cut to those of the options."""
    import pytest

    ids = [pytest.param(s, name, id=f"{s.name}/{name}") for s in specs for name in s.names]

    @pytest.mark.parametrize(("spec", "name"), ids)
    def test(benchmark, spec: Spec, name: str, options: Options) -> None:
        if spec.shape is not None:
            n, k = spec.shape
            spec = replace(spec, shape=(min(n, options.n), min(k, options.k)))
        if spec.name not in _built:
            _built.clear()
            gc.collect()
            case = spec.build(sized(spec, options))
            _built[spec.name] = case, check(spec, case)
        case, rows = _built[spec.name]
        assert rows[name].wrong is None, rows[name].wrong
        variant, numbers = case.variants[name], itertools.count()
        benchmark.group = spec.name
        if variant.multiplied:
            benchmark.pedantic(lambda: variant.call(1), rounds=1)
        else:
            benchmark(lambda: variant.call(next(numbers)))

    return test
