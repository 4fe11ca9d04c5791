"""Runs cases: checks every result, times the right ones, compares with targets, writes JSON."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import machine
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timer import Timing, measure, milliseconds, pin_threads
from torch import Tensor

import peftkern

sys.path.append(str(machine.ROOT / "tests"))
from tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors  # the one place that bounds errors

OURS = "peftkern"
# Relative RMS error from which a peer's result counts as wrong and its time means nothing.
PEER_WRONG = 0.03


@dataclass(frozen=True)
class Options:
    """Sizes of the problem. `rotate`: bytes of inputs that each variant cycles through."""

    n: int = 4096
    k: int = 4096
    r: int = 16
    rotate: int = 256 << 20

    def copies(self, size: int) -> int:
        return max(2, -(-self.rotate // size))


@dataclass(frozen=True)
class Variant:
    """`call(i)` runs on the i-th input. `result` turns what it returned into tensors that compare
    with `oracle` (float64); no oracle: nothing to check. `multiplied`: too slow to be repeated, so
    one call is timed and its time multiplied by this."""

    call: Callable[[int], object]
    oracle: tuple[Tensor, ...] = ()
    result: Callable[[object], object] = lambda returned: returned
    multiplied: int = 0


@dataclass(frozen=True)
class Case:
    """Variants that do the same work: at least `bytes` of traffic and `flops` in `dtype`."""

    variants: dict[str, Variant]
    bytes: int
    flops: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Target:
    """The peer's time over peftkern's, at least."""

    peer: str
    at_least: float


@dataclass(frozen=True)
class Spec:
    """A case that is built when its turn comes: `name` is "stem/case/dtype", `names` its variants,
    `judge` the peer whose error bounds ours."""

    name: str
    build: Callable[[Options], Case]
    names: tuple[str, ...]
    judge: str
    targets: tuple[Target, ...] = ()
    peer_wrong: float = PEER_WRONG

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


@dataclass
class Row:
    """What came out for one variant."""

    rms: float | None = None
    max: float | None = None
    wrong: str | None = None
    timing: Timing | None = None

    def record(self) -> dict:
        record = {"error_rms": self.rms, "error_max": self.max, "wrong": self.wrong}
        if self.timing is not None:
            record["median_ms"] = self.timing.median * 1e3
            record["p20_ms"] = self.timing.quantile(0.2) * 1e3
            record["p80_ms"] = self.timing.quantile(0.8) * 1e3
            record["samples_ms"] = [round(s * 1e3, 5) for s in self.timing.samples]
        return record


@dataclass
class Outcome:
    spec: Spec
    case: dict
    rows: dict[str, Row] = field(default_factory=dict)

    def ratio(self, peer: str) -> float | None:
        ours, theirs = self.rows[OURS].timing, self.rows[peer].timing
        return theirs.median / ours.median if ours and theirs else None

    @property
    def share_of_floor(self) -> float | None:
        ours = self.rows[OURS].timing
        return self.case["floor_ms"] / 1e3 / ours.median if ours else None

    def record(self) -> dict:
        targets = [
            {
                "peer": target.peer,
                "at_least": target.at_least,
                "measured": self.ratio(target.peer),
                "met": (self.ratio(target.peer) or 0.0) >= target.at_least,
            }
            for target in self.spec.targets
        ]
        rows = {name: row.record() for name, row in self.rows.items()}
        return {
            "name": self.spec.name,
            **self.case,
            "share_of_floor": self.share_of_floor,
            "targets": targets,
            "variants": rows,
        }


def check(spec: Spec, case: Case) -> dict[str, Row]:
    """Errors against float64, and what is wrong: ours is bound by the judge's error."""
    rows = {name: Row() for name in case.variants}
    dtype = case.dtype
    for name, variant in case.variants.items():
        if not variant.oracle:
            variant.call(0)
            continue
        start = time.perf_counter()
        returned = variant.call(0)
        if variant.multiplied:
            rows[name].timing = Timing(((time.perf_counter() - start) * variant.multiplied,))
        result = variant.result(returned)
        result = result if isinstance(result, tuple) else (result,)
        pairs = [errors(g, o) for g, o in zip(result, variant.oracle, strict=True)]
        rows[name].rms, rows[name].max = (max(pair[i] for pair in pairs) for i in (0, 1))
    for name, row in rows.items():
        if row.rms is None:
            continue
        if name == OURS:
            judge = rows[spec.judge]
            bound = RATIO * judge.rms + FLOOR_RMS[dtype], RATIO * judge.max + FLOOR_MAX[dtype]
        else:
            bound = spec.peer_wrong, float("inf")
        if not (row.rms <= bound[0] and row.max <= bound[1]):  # NaN is wrong too
            row.wrong = f"error {row.rms:.2g} rms, {row.max:.2g} max; bound {bound[0]:.2g}"
    return rows


def run_case(spec: Spec, options: Options, roof: dict, seconds: float, tick) -> Outcome:
    case = spec.build(options)
    if tuple(case.variants) != spec.names:
        raise RuntimeError(f"{spec.name}: built {tuple(case.variants)}, expected {spec.names}")
    dtype = str(case.dtype).removeprefix("torch.")
    floor = max(case.bytes / roof["copy"], case.flops / roof[dtype])
    facts = {"bytes": case.bytes, "flops": case.flops, "floor_ms": floor * 1e3}
    peftkern.reset_stats()
    outcome = Outcome(spec, facts, check(spec, case))
    right = {
        name: variant.call
        for name, variant in case.variants.items()
        if outcome.rows[name].wrong is None and not variant.multiplied
    }
    for name, timing in measure(right, seconds=seconds, tick=tick).items():
        outcome.rows[name].timing = timing
    facts["served"] = {f"{op} on {name}": n for (op, name), n in peftkern.stats().calls.items()}
    facts["fell_back"] = {f"{op}: {w}": n for (op, w), n in peftkern.stats().fallbacks.items()}
    return outcome


def table(outcomes: Iterable[Outcome], title: str) -> Table:
    grid = Table(title=title, title_justify="left")
    grid.add_column("case")
    for name in (OURS, "of floor"):
        grid.add_column(name, justify="right")
    grid.add_column("peer")
    for name in ("its time", "ratio", "target", "", "error (ours / its)"):
        grid.add_column(name, justify="right")
    for outcome in outcomes:
        ours = outcome.rows[OURS]
        targets = {target.peer: target.at_least for target in outcome.spec.targets}
        share = outcome.share_of_floor
        head = [
            outcome.spec.short_name,
            str(ours.timing) if ours.timing else f"[red]WRONG[/]: {ours.wrong}",
            f"{share:.0%}" if share else "",
        ]
        for peer in [name for name in outcome.rows if name != OURS]:
            theirs, ratio, least = outcome.rows[peer], outcome.ratio(peer), targets.get(peer)
            mark = ""
            if least is not None:
                met = ratio is not None and ratio >= least
                mark = "[green]✓[/]" if met else "[red]✗[/]"
            grid.add_row(
                *head,
                peer,
                f"{milliseconds(theirs.timing.median)} ms" if theirs.timing else "WRONG",
                f"{ratio:.2f}x" if ratio else "",
                f"{least:.3g}x" if least else "",
                mark,
                f"{ours.rms:.1e} / {theirs.rms:.1e}" if theirs.rms is not None else "",
            )
            head = ["", "", ""]
        grid.add_section()
    return grid


def parse(stem: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bench_{stem}.py")
    add = parser.add_argument
    add("--n", type=int, default=4096, help="rows of the weight (4096)")
    add("--k", type=int, default=4096, help="columns of the weight (4096)")
    add("--r", type=int, default=16, help="LoRA rank (16)")
    add("--threads", type=int, help="default: every core that the process may use")
    add("--seconds", type=float, default=2.0, help="time for each variant of each case (2)")
    add("--rotate-mb", type=int, help="inputs to cycle through (default: beyond the caches)")
    add("--only", default="", help="cases whose name contains this")
    add("--out", type=Path, default=machine.ROOT / "bench" / "results", help="results folder")
    options = parser.parse_args(argv)
    if min(options.n, options.k, options.r) < 1:
        parser.error("--n, --k and --r must be at least 1")
    return options


def rotation(given_mb: int | None) -> int:
    """Beyond the last level, but at most 640 MB per variant: a virtual machine is told the size of
    a cache that it shares."""
    if given_mb is not None:
        return given_mb << 20
    return min(machine.cache_bytes() * 5 // 4, 640 << 20)


def main(stem: str, specs: list[Spec], argv: list[str] | None = None) -> int:
    """Run the cases of one bench script; 1 if any of our results is wrong."""
    args = parse(stem, argv)
    options = Options(args.n, args.k, args.r, rotation(args.rotate_mb))
    facts = machine.describe(pin_threads(args.threads))
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads", end="; ")
    small = args.n * args.k < 1 << 20
    roof = machine.roof(min(args.seconds, 1.0), *((1 << 20, 256) if small else ()))
    console.print(
        f"copies {roof['copy'] / 1e9:.1f} GB/s (read + written), dense matrix products"
        f" {roof['bfloat16'] / 1e9:.0f} bf16 and {roof['float32'] / 1e9:.0f} fp32 GFLOP/s"
    )
    chosen = [spec for spec in specs if args.only in spec.name]
    outcomes = []
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(chosen))
        for done, spec in enumerate(chosen):
            progress.update(bar, description=spec.short_name, completed=done)

            def tick(share: float, done: int = done) -> None:
                progress.update(bar, completed=done + share)

            outcomes.append(run_case(spec, options, roof, args.seconds, tick))
            gc.collect()
    console.print(table(outcomes, f"{stem}, {args.n}x{args.k}, r={args.r}, medians and p20-p80"))
    record = {
        "bench": stem,
        "machine": facts,
        "roof": roof,
        "options": {"n": args.n, "k": args.k, "r": args.r, "rotate": options.rotate},
        "cases": [outcome.record() for outcome in outcomes],
    }
    path = args.out / machine.slug(facts) / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    console.print(f"written: {path}")
    for outcome in outcomes:
        for reason, count in outcome.case["fell_back"].items():
            console.print(f"{outcome.spec.name}: fell back {count} times: {reason}", markup=False)
    return int(any(outcome.rows[OURS].wrong for outcome in outcomes))


def benchmark_ids(specs: list[Spec]) -> list:
    """Parameters for pytest-benchmark: one test per case and variant."""
    import pytest

    return [
        pytest.param(spec, name, id=f"{spec.name}/{name}") for spec in specs for name in spec.names
    ]


_built: dict[str, tuple[Case, dict[str, Row]]] = {}


def run_benchmark(benchmark, spec: Spec, name: str, options: Options) -> None:
    """One pytest-benchmark test; the case is built and checked once for all of its variants."""
    if spec.name not in _built:
        _built.clear()
        gc.collect()
        case = spec.build(options)
        _built[spec.name] = case, check(spec, case)
    case, rows = _built[spec.name]
    assert rows[name].wrong is None, rows[name].wrong
    numbers = itertools.count()
    benchmark.group = spec.name
    if case.variants[name].multiplied:
        benchmark.pedantic(lambda: case.variants[name].call(1), rounds=1)
        return
    benchmark(lambda: case.variants[name].call(next(numbers)))
