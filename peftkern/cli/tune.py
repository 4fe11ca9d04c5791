"""Command `peftkern tune`: layers tried against PEFT's own forward before a training meets them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from peftkern.cli.options import Json

if TYPE_CHECKING:
    from peftkern.tools.tune.job import Job
    from peftkern.tools.tune.tune import Outcome

BUSY = 1.2  # load over cores, of which this run is one


def tune(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(
            help="NxK of a weight, llama3-8b, qwen2.5-7b-q_proj, ...: as of `peftkern bench`.",
            show_default="llama3-8b, without --model",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A config.json or its folder: its linear layers, not its experts."),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="With --model: all-linear, or names such as q_proj,v_proj.")
    ] = "all-linear",
    base: Annotated[
        str | None,
        typer.Option(help="dense, nf4.", show_default="both; nf4 if the model is in 4 bits"),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="Batch times sequence; a power of two is a class.")
    ] = "1,512,2048",
    r: Annotated[str, typer.Option("--r", help="LoRA rank.")] = "16",
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32.", show_default="the model's, else bf16")
    ] = None,
    adapter_dtype: Annotated[str, typer.Option(help="fp32 (PEFT's default), bf16, fp16.")] = "fp32",
    autocast: Annotated[
        bool, typer.Option("--autocast", help="As under Trainer(bf16=True).")
    ] = False,
    budget: Annotated[str, typer.Option(help="For the whole run: 60s, 5m.")] = "60s",
    limit: Annotated[
        str, typer.Option(help="For one class, after which its process is killed.")
    ] = "60s",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N.", show_default="cuda if there is one")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the cache knows, too.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Try layers against PEFT's own forward before a training meets them.

    A patched layer does so by itself at its second call; this keeps the same verdicts in the same
    cache ahead of time. Lists take commas. Cheap layers come first; what does not fit the budget is
    listed. A child process does the work: one that hangs or crashes costs its class a demotion.
    Ctrl-C keeps what is decided, and a second run goes on from there.

    Example: peftkern tune --shape 4096x4096 --base nf4 --rows 512 --budget 5m
    """
    from peftkern.cli.frame import InputError, Stopped, bad_input, present_device
    from peftkern.tools.tune import job as jobs
    from peftkern.tools.tune.tune import TuneError

    with bad_input():
        given = {field.name: context.params[field.name] for field in fields(jobs.Options)}
        job = jobs.plan(jobs.Options(**given), str(present_device(device)))
    try:
        outcome = _run(job)
    except TuneError as error:
        raise InputError(str(error)) from error
    if as_json:
        print(json.dumps(outcome.as_dict(), indent=2))
    else:
        _print(outcome)
    if outcome.stopped:
        raise Stopped


def _run(job: Job) -> Outcome:
    """Try everything under a bar, which standard error gets."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from peftkern.tools.tune.tune import run

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    what = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    silent = not console.is_terminal
    with Bar(*columns, what, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task("starting", total=None)
        return run(
            job,
            lambda done, of, title: bar.update(task, completed=done, total=of, description=title),
        )


def _print(outcome: Outcome) -> None:
    from peftkern.tools import tables

    console = tables.console()
    shown = tables.table("layer", "forward", "training", "served by", "")
    for row in outcome.rows:
        ratios = ["-" if x is None else f"{x:.2f}" for x in (row.forward, row.training)]
        note = row.why if row.forward is None else "known before" if row.known else ""
        style = None if row.side == "peftkern" else "yellow"
        shown.add_row(row.title, *ratios, row.side, note, style=style)
    if outcome.rows:
        tables.section(console, "Time of ours over PEFT's, and who serves", shown)
    for name, size in outcome.crossovers.items():
        if name.startswith("few_rows"):
            console.print(f"{name}: up to {size:,} rows take the path of few rows")
        else:
            console.print(f"{name}: kernels pay from {size:,} values on (see `peftkern doctor`)")
    for program, reason in outcome.demoted.items():
        console.print(f"demoted: {program}: {reason}", style="bold red")
    if outcome.not_reached:
        console.print(f"\nNot reached within the budget ({len(outcome.not_reached)}):")
        for title in outcome.not_reached:
            console.print(f"  {title}")
    if outcome.experts:
        console.print("\nExperts were skipped: a patched model tries them itself, in training:")
        for title in outcome.experts:
            console.print(f"  {title}")
    if outcome.load > BUSY:
        text = f"The machine was busy: load {outcome.load:.1f} times its cores. Ratios may be off;"
        console.print(f"\n{text} --again measures them anew.", style="yellow")
    console.print(f"\n{outcome.seconds:.0f} s; verdicts are in {outcome.folder}", soft_wrap=True)
