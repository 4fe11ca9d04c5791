"""Execution of `peftkern bench`: a plan completed before anything runs, the run, the files.

Bad input is a ValueError of one line, raised by `plan`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftkern.layers.names import shortened
from peftkern.tools import pages, tables
from peftkern.tools.bench import compare, machine, providers, terminal, training_step
from peftkern.tools.bench.cases import (
    DTYPES,
    FIRST_GROUPED,
    FIRST_SHAPES,
    MODES,
    OPS,
    SCALED_BY,
    SHORT,
    Problem,
    problems,
)
from peftkern.tools.bench.instrument import Bench, pinned
from peftkern.tools.bench.processes import WorkerError
from peftkern.tools.bench.record import OURS, Record, read
from peftkern.tools.bench.shapes import (
    LARGEST,
    chosen,
    items,
    numbers,
    parse_shapes,
    percent,
    seconds,
)
from peftkern.tools.bench.training_run import TrainingBench

PIPED_WIDTH = 120
MAX_RANK = 4096
MAX_SEED = 2**31 - 1
# Environment variables that change what is measured.
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "PEFTKERN_", "CUDA_", "NVIDIA_", "PYTORCH_", "TORCH")
VARIABLES += ("TRITON_", "BNB_", "MALLOC_", "LD_PRELOAD")


class BenchError(Exception):
    """Failure to measure anything, or to write a file; the message is one line."""


@dataclass(frozen=True)
class Options:
    """Options as typed; see `peftkern bench --help`."""

    op: str
    shapes: str | None
    rows: str | None
    dtype: str | None
    mode: str | None
    r: str
    baselines: str
    format: str
    budget: str
    seconds: str
    device: str | None
    threads: int | None
    seed: int
    json: Path | None
    csv: Path | None
    html: Path | None
    compare: Path | None
    fail_if: str | None
    repro: bool
    training: training_step.Options | None  # of --model


@dataclass(frozen=True)
class Outputs:
    """Destinations of a record."""

    json: Path | None
    csv: Path | None
    html: Path | None
    earlier: Record | None
    fail_if: float
    repro: bool


@dataclass(frozen=True)
class Plan:
    """What to measure: problems, or a job."""

    device: str
    threads: int
    seed: int
    budget: float
    outputs: Outputs
    problems: list[Problem] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    not_installed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    job: training_step.Job | None = None


def plan(options: Options) -> Plan:
    """Check the options. Raises: ValueError or OSError, one line, naming the option."""
    device = given(options.device, "cuda" if torch.cuda.is_available() else "cpu")
    chosen("--device", device, ("cpu", "cuda"))
    try:
        machine.device_named(device)
    except machine.DeviceError as error:
        raise ValueError(f"--{error}") from error
    if not 0 <= options.seed <= MAX_SEED:
        raise ValueError(f"--seed: expected 0 to {MAX_SEED}, got {options.seed}")
    with pinned(options.threads) as threads:  # only to check their number
        pass
    if options.training is not None:
        return _training_plan(options, device, threads)
    ops = chosen("--op", options.op, tuple(OPS))
    dtypes = [
        DTYPES.get(one, one)
        for one in chosen("--dtype", given(options.dtype, "bf16"), (*DTYPES, *DTYPES.values()))
    ]
    format, *more = chosen("--format", options.format, tuple(SCALED_BY))
    if more:
        raise ValueError(f"--format: one at a time, got {options.format}")
    if format != "nf4" and not any(OPS[op].nf4 for op in ops):
        raise ValueError(f"--format: {', '.join(ops)} has no weight in 4 bits")
    names, absent = providers.select(
        items("--baselines", options.baselines, providers.ACCEPTED), ops, device, format
    )
    grouped = {OPS[op].grouped for op in ops}
    if len(grouped) == 2:
        raise ValueError("--op: grouped_linear has shapes of its own, measure it by itself")
    first, sizes = (FIRST_GROUPED, "MNKE") if grouped == {True} else (FIRST_SHAPES, "MNK")
    shapes = parse_shapes(given(options.shapes, first[device]), sizes=sizes)
    found = problems(
        ops,
        shapes,
        list(dict.fromkeys(dtypes)),
        None if options.mode is None else chosen("--mode", options.mode, MODES),
        numbers("--r", options.r, MAX_RANK),
        None if options.rows is None else numbers("--rows", options.rows, LARGEST),
        device,
        format,
    )
    return Plan(
        *(device, threads, options.seed, seconds("--budget", options.budget)),
        outputs=outputs(options, {problem.name for problem in found}),
        problems=found,
        baselines=names,
        not_installed=absent,
        seconds=seconds("--seconds", options.seconds),
    )


def given(option: str | None, default: str) -> str:
    """Return the option unless it was left out; an empty one is an error of its parser."""
    return default if option is None else option


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Say in an error about a file which option named it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option}: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _training_plan(options: Options, device: str, threads: int) -> Plan:
    job = training_step.plan(options.training, options.r, options.dtype, device, options.seed)
    return Plan(
        *(device, threads, options.seed, seconds("--budget", options.budget)),
        outputs=outputs(options, {job.facts["name"]}),
        job=job,
    )


def outputs(options: Options, names: set[str]) -> Outputs:
    """Check the outputs for cases of these names. Raises: as `plan`."""
    for option in ("json", "csv", "html"):
        if (path := getattr(options, option)) is not None:
            machine.check_target(f"--{option}", path)
    if options.html is not None:
        pages.require("--html")
    if options.fail_if is not None and options.compare is None:
        raise ValueError("--fail-if: needs --compare and an earlier record")
    earlier = None
    if options.compare is not None:
        with naming("--compare"):
            earlier = read(options.compare)
    if earlier is not None:
        known = {case["name"] for case in earlier["cases"]}
        if not known & names:
            raise ValueError(
                f"--compare: {options.compare} has none of these cases; it has"
                f" {shortened(sorted(known), 3) or 'none at all'}"
            )
    return Outputs(
        json=options.json,
        csv=options.csv,
        html=options.html,
        earlier=earlier,
        fail_if=percent("--fail-if", given(options.fail_if, "5%")),
        repro=options.repro,
    )


def execute(plan: Plan) -> int:
    """Measure, write, print; return the exit status.

    Raises: BenchError if the run could not measure anything, and as `tell`.
    """
    return tell(measure(plan), plan.outputs)


def tell(record: Record, outputs: Outputs) -> int:
    """Write and print; return the exit status.

    Raises: BenchError if a file could not be written, after all is printed: measuring took a
    minute.
    """
    on_terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = tables.console(None if on_terminal else PIPED_WIDTH)
    unwritten = None
    try:
        write(record, outputs)
    except OSError as error:  # a full disk
        unwritten = error
    for line in terminal.bench_report(record, console.width):
        console.print(line)
    if outputs.repro and record["cases"]:
        print_commands(record)
    status = 0 if _ours_is_fine(record) else 1
    if outputs.earlier is not None:
        status |= _compare(record, outputs, console)
    if unwritten is not None:
        raise BenchError(f"not written: {unwritten}") from unwritten
    return status


def measure(plan: Plan) -> Record:
    """Measure and return the record, with a progress bar on a terminal's standard error."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # a drawing thread would disturb the measurement
        disable=not sys.stderr.isatty(),
    )
    with ended_by(signal.SIGTERM), pinned(plan.threads) as threads, bar:
        task = bar.add_task("", total=1.0)
        if plan.job is not None:
            bench = TrainingBench(plan.job, threads=threads, budget=plan.budget)
        else:
            bench = Bench(
                plan.problems,
                plan.baselines,
                device=plan.device,
                threads=threads,
                seed=plan.seed,
                seconds=plan.seconds,
                budget=plan.budget,
                commands=lambda problem: command_of(plan, problem),
            )

        def tick(doing: str, share: float) -> None:
            bar.update(task, description=doing, completed=share, refresh=True)

        with bench:
            try:
                record = bench.run(tick)
            except WorkerError as error:
                raise BenchError(str(error)) from error
    record["command"] = shlex.join(["peftkern", *sys.argv[1:]])
    record["not_installed"] = plan.not_installed
    environment = record["environment"]
    environment["variables"] = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
    }
    for package in ("unsloth", "liger-kernel"):
        environment["versions"][package] = machine.version(package)
    return record


@contextlib.contextmanager
def ended_by(number: signal.Signals) -> Iterator[None]:
    """Let that signal end this process cleanly: workers stopped, files removed."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)


def command_of(plan: Plan, problem: Problem) -> str:
    """Return the command that measures one case again, as this run does."""
    kind = problem.kind
    shape, rows = problem.shape, []
    if not kind.rows and shape == f"{problem.N}x{problem.K}":
        shape = f"1x{shape}"
    elif kind.rows and not shape.startswith(f"{problem.M}x{problem.N}x{problem.K}"):
        rows = ["--rows", str(problem.M)]
    words = ["peftkern", "bench", "--op", problem.op, "--shapes", shape, *rows]
    words += ["--dtype", SHORT[problem.dtype], "--mode", problem.mode]
    words += ["--format", problem.format] if problem.format != "nf4" else []
    words += ["--r", str(problem.r)] if kind.lora else []
    labels = {name: one.labels for name, one in providers.PROVIDERS.items()}
    has = [name for name in plan.baselines if ":" in name or problem.op in labels[name]]
    words += ["--baselines", ",".join(has)] if has else []
    words += ["--device", plan.device]
    words += ["--threads", str(plan.threads)] if plan.device == "cpu" else []
    words += ["--seed", str(plan.seed)]
    words += ["--seconds", f"{plan.seconds:g}", "--budget", f"{plan.budget:g}s"]
    return shlex.join(words)


def print_commands(record: Record) -> None:
    """Print commands as plain text to be copied: neither wrapped nor colored."""
    environment = record["environment"]
    versions = environment["versions"]
    print("\nTo measure one of them again:")
    print(f"  # {', '.join(f'{k} {v}' for k, v in versions.items() if v)}")
    print(f"  # Python {environment['python']}; commit {environment['commit'] or 'unknown'}")
    variables = [f"{name}={shlex.quote(v)}" for name, v in environment["variables"].items()]
    for case in record["cases"]:
        print("  " + " ".join([*variables, case["command"]]))


def write(record: Record, outputs: Outputs) -> None:
    """Write the requested files, each atomically."""
    if outputs.json is not None:
        machine.write_json(outputs.json, record, allow_nan=False)
    if outputs.csv is not None:
        machine.write_text(outputs.csv, as_csv(record))
    if outputs.html is not None:
        from peftkern.tools.bench import report  # imports matplotlib

        report.write_html(record, outputs.html, outputs.earlier, outputs.fail_if)


def as_csv(record: Record) -> str:
    """Format a line for each provider of each case; samples are in the JSON alone."""
    of_case = ("op", "shape", "M", "N", "K", "r", "dtype", "mode", "bytes", "flops", "floor_ms")
    of_row = ("label", "median_ms", "p20_ms", "p80_ms", "error_rms", "error_max", "wrong")
    of_row += ("failed", "note", "at_least_ms", "peak_bytes", "gb_s", "tflop_s", "share_of_roof")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["case", *of_case, "provider", *of_row])
    for case in record["cases"]:
        for name, row in case["providers"].items():
            cells = [case["name"], *(case[key] for key in of_case), name]
            writer.writerow([*cells, *(row.get(key) for key in of_row)])
    return out.getvalue()


def _ours_is_fine(record: Record) -> bool:
    ours = [case["providers"][OURS] for case in record["cases"]]
    if record.get("failed"):  # of records from before cases could fail there is none
        return False
    return bool(ours) and all(row["wrong"] is None and row["failed"] is None for row in ours)


def _compare(record: Record, outputs: Outputs, console: Console) -> int:
    found, silent = compare.changes(outputs.earlier, record)
    for line in terminal.comparison(found, silent, outputs.fail_if):
        console.print(line)
    return int(not found or any(change.slower > outputs.fail_if for change in found))
