"""Command `peftkern merge BASE ADAPTER[:WEIGHT]... DST`: a checkpoint with adapters merged in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import (
    InputError,
    bad_input,
    checkpoint_run,
    model_packages,
    progress_bar,
    read_adapter,
    weighted_adapter,
)
from peftkern.cli.options import Force, Json
from peftkern.tools.destinations import check_apart

if TYPE_CHECKING:
    from peftkern.tools.merge.arithmetic import Change
    from peftkern.tools.merge.merge import Summary

TOO_LITTLE = 1  # exit status if less of the update survived than was asked for
_SHOWN = 5  # weights that lost most


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder with safetensors.")],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="Adapters; a weight multiplies the update."
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    out: Annotated[
        str,
        typer.Option(
            help="bf16, fp16, fp32; nf4, fp4, mxfp4, nvfp4, int4; keep: as each tensor is stored."
        ),
    ] = "keep",
    residual: Annotated[
        int,
        typer.Option(help="Rank of an adapter for what 4 bits lose.", show_default="none"),
    ] = 0,
    as_trained: Annotated[
        str,
        typer.Option(
            help="nf4, fp4, mxfp4, nvfp4 or int4: the adapter was trained on BASE in that, which it"
            " is merged into.",
            show_default="BASE as it is",
        ),
    ] = "",
    trained_experts: Annotated[
        bool,
        typer.Option(
            "--trained-experts",
            help="With --as-trained nf4: fused experts were in it, too (quantize_,"
            " NF4ExpertsConfig).",
        ),
    ] = False,
    blocksize: Annotated[
        int | None,
        typer.Option(
            help="Values that share one scale, of --out in 4 bits.", show_default="64, of int4 128"
        ),
    ] = None,
    min_survival: Annotated[
        float, typer.Option(help="Share of the update that has to survive rounding.")
    ] = 0.5,
    changed_base: Annotated[
        bool,
        typer.Option(
            "--changed-base", help="BASE is the one that PiSSA, OLoRA or the like has changed."
        ),
    ] = False,
    layout: Annotated[
        str | None, typer.Option(help="Layout of the adapter's experts, if nothing in it tells.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a safetensors checkpoint.

    Peak memory: panels of rows and the adapters; of 4 bits, token rows, DoRA of embeddings and
    stored tables a whole weight, of experts one, for each thread.

    The bits are those of PEFT's merge_and_unload where that is right; tied embeddings are untied if
    an adapter changes one of them. Into 4 bits, the update of a QLoRA adapter is lost for the most
    part: the report says how much survives, and the exit status is 1 below --min-survival. What is
    written in 4 bits is what `peftkern quantize` makes of the merged checkpoint, and loads like
    that. A stopped run resumes when it is repeated.

    Example: peftkern merge ~/models/llama3-8b ~/runs/adapter ~/models/merged
    """
    if not 0 <= min_survival <= 1:
        raise InputError(f"--min-survival: expected a share of 0 to 1, got {min_survival}")
    parsed = [weighted_adapter(text) for text in adapters]
    check_apart(destination, InputError, *(path for path, _ in parsed), within=True)
    with model_packages():
        from peftkern.tools.checkpoints.checkpoint import read_checkpoint
        from peftkern.tools.merge.merge import merge_checkpoint
        from peftkern.tools.merge.plan import Options
    read = [(read_adapter(path, layout), weight) for path, weight in parsed]
    own = ("out", "residual", "as_trained", "blocksize", "trained_experts")
    with bad_input(*own):
        chosen = Options(out, residual, as_trained, changed_base, blocksize, trained_experts)
    with bad_input(), checkpoint_run(destination, *own):  # the inner one says what can be resumed
        checkpoint = read_checkpoint(base, quantized=True)
        with progress_bar(checkpoint.nbytes) as progress:
            summary = merge_checkpoint(
                checkpoint, read, destination, chosen, force=force, progress=progress
            )
    survived = summary.total.survival >= min_survival
    if as_json:
        print(json.dumps(_record(summary, survived), indent=2))
    else:
        print("\n".join(_report(summary, destination)))
    if not survived:
        print(
            f"peftkern: {summary.total.survival:.1%} of the update survived, expected "
            f"{min_survival:.0%}: --out bf16 keeps it, and so does leaving the adapter apart",
            file=sys.stderr,
        )
        raise typer.Exit(TOO_LITTLE)


def _report(summary: Summary, destination: Path) -> Iterator[str]:
    from peftkern.layers.names import shortened

    plan, total = summary.plan, summary.total
    units = [unit for file in plan.files for unit in file.units]
    copied = sum(unit.copied for unit in units)
    resumed = f" ({summary.resumed} by an earlier run)" if summary.resumed else ""
    merged, files = _number(len(summary.changes), "weight"), _number(len(plan.files), "file")
    yield f"{merged} merged, {_number(copied, 'tensor')} copied, in {files}{resumed}"
    for untied in plan.untied:
        yield f"{untied.parameter}: no longer tied to {untied.source}, written apart"
    yield (
        f"{total.survival:.1%} of the update survives rounding, which has an error of "
        f"{total.relative_error:.2%} of the weights, {total.error_of_update:.1%} of the update"
    )
    if summary.others:
        error = summary.total_of_others.relative_error
        others = _number(len(summary.others), "other weight")
        yield f"{others} quantized anew, with an error of {error:.2%} of the weights"
    if plan.unfit:
        yield f"dense, as their rows are not whole blocks: {shortened(plan.unfit, _SHOWN)}"
    worst = sorted(summary.changes.items(), key=lambda item: item[1].survival)
    worst = [(name, one) for name, one in worst if one.survival < total.survival][:_SHOWN]
    if worst:
        yield "least: " + ", ".join(f"{one.survival:.1%} {name}" for name, one in worst)
    yield f"{_number(len(plan.companions.copied), 'other file')} copied"
    left = [name if name.isprintable() else ascii(name) for name in plan.companions.left]
    if left:
        yield f"left behind: {', '.join(left)}"
    yield f"{destination}: written"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _record(summary: Summary, survived: bool) -> dict[str, Any]:
    """Return the same for JSON; sizes in bytes."""
    plan = summary.plan
    return {
        "survived": survived,
        "total": _change(summary.total),
        "weights": {name: _change(change) for name, change in summary.changes.items()},
        "others": {name: change.relative_error for name, change in summary.others.items()},
        "untied": {untied.parameter: untied.source for untied in plan.untied},
        "files": {file.name: file.nbytes for file in plan.files},
        "resumed_files": summary.resumed,
        "copied": plan.companions.copied,
        "left_behind": plan.companions.left,
        "unfit": plan.unfit,
    }


def _change(change: Change) -> dict[str, float]:
    return {
        "survival": change.survival,
        "relative_error": change.relative_error,
        "error_of_update": change.error_of_update,
        "values_measured": change.values,
    }
