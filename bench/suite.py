"""Runner of the bench scripts: checks, times, compares to targets, writes JSON."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import graphs
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import peftkern
from peftkern.backends.device import triton_interpreted
from peftkern.backends.tolerances import PEER_WRONG, errors
from peftkern.tools.bench import data, gpu_timer, machine, terminal
from peftkern.tools.bench.cases import ITEMSIZE, Problem
from peftkern.tools.bench.gpu_timer import first_line, measure_events
from peftkern.tools.bench.memory import peak_bytes
from peftkern.tools.bench.peers import SEED, kept
from peftkern.tools.bench.providers import PROVIDERS, Build, Provider
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import Row, case_record, new_record, ratio
from peftkern.tools.bench.timer import measure, pin_threads
from peftkern.tools.bench.worker import calls

MOST_COPIES = 128  # of a layer; a call of so small a one takes longer than to evict it
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
    comes later. `errors` compares what `call` returns, in the place of `result` and `oracle`;
    `warm`: calls before the clock runs, of copies that do some work once."""

    call: Callable[[int], object]
    oracle: tuple[Tensor, ...] = ()
    result: Callable[[object], object] = lambda returned: returned
    multiplied: int = 0
    planned_bytes: int | None = None
    no_graph: str | None = None
    errors: Callable[[object], tuple[float, float]] | None = None
    warm: int = 0


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
    problem: Problem | None = None  # of `peftkern bench`, where it is one of its cases


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


def of_problem(
    options: Options, problem: Problem, peers: Mapping[str, str | Build | Provider]
) -> Case:
    """Build a case of `peftkern bench` in this process, at the sizes of the options.

    peers: its variants by name, peftkern's first; each a provider, or the name of a provider of
    `peftkern bench`, or a function that builds its layers.
    """
    device, rows = options.device, problem.M
    rows = rows if problem.kind.counts == "layers" or rows is None else options.m(rows)
    # On a CPU dropout's mask is a tensor, which the interpreted kernels do not take.
    dropout = problem.dropout if device.type == "cuda" else 0.0
    problem = replace(problem, M=rows, dropout=dropout)
    tensors = data.inputs(problem, 0, device)
    right = {**tensors, **data.oracle_of(problem, tensors)}
    dense_bytes = problem.N * problem.K * ITEMSIZE[problem.dtype]

    def variant(name: str, provider: str | Build | Provider) -> Variant:
        one = PROVIDERS[provider] if isinstance(provider, str) else provider
        one = one if isinstance(one, Provider) else Provider(one, {})
        copies = options.copies(dense_bytes if one.dense else problem.weight_bytes)
        layers = one.build(problem, tensors, min(MOST_COPIES, copies))
        # A GPU's L2 cache would still hold much of a single x.
        setup, call, collect = calls(
            problem, layers, tensors, copies if device.type != "cpu" else 1
        )
        expected = right
        if problem.dropout and one.adapted:
            keep = kept(tensors["x"], problem, patched=name == OURS)
            expected = right | data.oracle_of(problem, tensors, keep)

        def errors(returned: object) -> tuple[float, float]:
            found = data.compare(problem, collect(returned), expected, one.adapted)
            return found["rms"], found["max"]

        checked = not (problem.dropout and provider == "compile")  # which draws a mask of its own
        return Variant(
            lambda i: call(setup()),
            errors=errors if checked else None,
            multiplied=layers[0].multiplied,
            no_graph=layers[0].no_graph,
            warm=0 if problem.trains else len(layers),
        )

    variants = {name: variant(name, provider) for name, provider in peers.items()}
    return Case(variants, *problem.work(), getattr(torch, problem.dtype), problem=problem)


def spec_of(
    name: str,
    problem: Problem,
    peers: Mapping[str, str | Build | Provider],
    *targets: Target,
    judge: str | None = None,
    **more: object,
) -> Spec:
    """Return the spec of such a case; the judge is the second of its variants."""
    names = tuple(peers)
    return Spec(
        name,
        lambda o: of_problem(o, replace(problem, N=o.n, K=o.k, r=problem.r and o.r), peers),
        names,
        judge or names[1],
        tuple(target for target in targets if target.peer in names),
        peer_wrong=problem.kind.peer_wrong,
        **more,
    )


def check(spec: Spec, case: Case) -> dict[str, Row]:
    """Measure errors against float64 and mark wrong results: ours is bound by the judge's error."""
    rows = {name: Row() for name in case.variants}
    for name, variant in case.variants.items():
        torch.manual_seed(SEED)
        row = rows[name]
        row.planned_bytes, row.no_graph = variant.planned_bytes, variant.no_graph
        try:
            start = time.perf_counter()
            returned = variant.call(0)
            if variant.multiplied:
                row.samples = [(time.perf_counter() - start) * variant.multiplied]
            if variant.errors is not None:
                row.error_rms, row.error_max = variant.errors(returned)
            result = variant.result(returned)
            for i in range(variant.warm if not variant.multiplied else 0):
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
    eager = None if judge.error_rms is None else (judge.error_rms, judge.error_max)
    for name, row in rows.items():
        if row.error_rms is not None:
            row.judge(case.dtype, eager if name == OURS else None, spec.peer_wrong)
    return rows


def sized(spec: Spec | Question, options: Options) -> Options:
    """Replace the sizes of the options by those of a case that has its own."""
    return options if spec.shape is None else replace(options, n=spec.shape[0], k=spec.shape[1])


def run_case(spec: Spec, options: Options, roof: dict, seconds: float, tick) -> dict:
    """Build, check and measure a case; return its record."""
    options = sized(spec, options)
    case = spec.build(options)
    if tuple(case.variants) != spec.names:
        raise RuntimeError(f"{spec.name}: built {tuple(case.variants)}, expected {spec.names}")
    peftkern.reset_stats()
    rows = check(spec, case)
    right = {
        name: variant.call
        for name, variant in case.variants.items()
        if rows[name].good and not variant.multiplied
    }
    on_gpu = options.device.type == "cuda"
    timings = (measure_events if on_gpu else measure)(right, seconds=seconds, tick=tick)
    for name, timing in timings.items():
        rows[name].samples = list(timing.samples)
    if case.tokens is not None:
        for name, call in right.items():
            rows[name].peak_bytes = peak_bytes(lambda call=call: call(0), options.device)
    elif on_gpu:
        measure_more(rows, timings, case, right, seconds)
    record = case_record(
        facts_of(spec, options, case),
        rows,
        work=(case.bytes, case.flops),
        roof=roof,
        labels={name: name for name in rows},
        tokens=case.tokens,
    )
    record["targets"] = [*reached(spec, record)]
    record["served"] = {f"{op} on {name}": n for (op, name), n in peftkern.stats().calls.items()}
    record["fell_back"] = {f"{op}: {w}": n for (op, w), n in peftkern.stats().fallbacks.items()}
    return record


def facts_of(spec: Spec, options: Options, case: Case) -> dict:
    """Return a case's size and kind; its rows are those of its name."""
    stem, _, short = spec.name.partition("/")
    if case.problem is not None:
        size = f"{case.problem.N}x{case.problem.K}"
        return {"name": spec.name, **case.problem.facts(), "shape": size}
    rows = re.search(r"-[MT]([0-9]+)\b", short)
    return {
        "name": spec.name,
        "op": "training_step" if case.tokens else stem,
        "shape": short,
        "M": case.tokens or (options.m(int(rows[1])) if rows else None),
        "N": None if case.tokens else options.n,
        "K": None if case.tokens else options.k,
        "r": options.r,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": "full" if case.tokens or "backward" in short else "forward",
    }


def reached(spec: Spec, record: dict) -> Iterator[dict]:
    """Yield the targets with what was measured."""
    for target in spec.targets:
        found = ratio(record, target.peer)
        met = found is not None and found >= target.at_least
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


def measure_more(rows: dict[str, Row], timings: dict, case: Case, right: dict, seconds: float):
    """Measure peak memory, launches and replayed graphs of the correct variants on a GPU.

    Time came first: a failure here costs its own number alone. Of calls that take longer than the
    timer's patience nothing else is measured.
    """
    quick = {n: call for n, call in right.items() if timings[n].median <= gpu_timer.PATIENCE}
    for name, call in quick.items():
        try:
            rows[name].peak_bytes = gpu_timer.peak_bytes(call)
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
    began = time.monotonic()
    end = None if args.budget is None else began + args.budget
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
    path = args.out / machine.slug(environment) / f"{stem}.json"

    def write() -> None:  # at once: a run may be stopped at any moment
        record["elapsed_s"] = time.monotonic() - began
        machine.write_json(path, record)

    _measure(chosen, options, seconds, end, record, write, console)
    write()
    for line in terminal.bench_report(record, console.width):
        console.print(line)
    console.print(f"written: {path}")
    nothing = len(record["not_reached"]) == len(chosen)
    ours = [case["providers"][OURS] for case in record["cases"]]
    bad = any(row["wrong"] or row["failed"] for row in ours)
    return int(bool(record["failed"]) or nothing or bad)


def _measure(
    chosen: list[Spec | Question],
    options: Options,
    seconds: float,
    end: float | None,
    record: dict,
    write: Callable[[], None],
    console: Console,
) -> None:
    """Run the cases in turn; `record` grows, and is written after each of them."""
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
                write()

            try:
                if isinstance(spec, Question):
                    record["answers"].append({"name": spec.name})
                    spec.ask(sized(spec, options), left, note)
                else:
                    found = run_case(spec, options, record["roof"], seconds, tick)
                    record["cases"].append(found)
            except Exception as error:  # the cases after it are still worth knowing
                traceback.print_exc()
                record["failed"][spec.name] = first_line(error)
            write()
            gc.collect()


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
        assert rows[name].good, rows[name].wrong or rows[name].failed
        variant, numbers = case.variants[name], itertools.count()
        benchmark.group = spec.name
        if variant.multiplied:
            benchmark.pedantic(lambda: variant.call(1), rounds=1)
        else:
            benchmark(lambda: variant.call(next(numbers)))

    return test
