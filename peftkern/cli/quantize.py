"""Command `peftkern quantize SRC DST`: a checkpoint in 4 bits for transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import (
    DTYPES,
    InputError,
    checkpoint_run,
    dtype_name,
    model_packages,
    parse_bytes,
    present_device,
    progress_bar,
)
from peftkern.cli.options import Force, Json, ShardSize

if TYPE_CHECKING:
    from peftkern.tools.quantize.file_plan import Choice, Plan, Size
    from peftkern.tools.quantize.quantized_checkpoint import Summary

SHARE_TOLD = 0.01  # share of experts in all parameters from which they get a line
MOST = 0.5  # share of the parameters that are expected to be quantized
TOO_LITTLE = 1  # exit status if they are not
_SHOWN = 6  # kinds of tensors that stay as they are
_IMPORT = "from peftkern.integrations.transformers import NF4ExpertsConfig"
_COMPUTE_DTYPES = ("bf16", "fp16", "fp32")


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with safetensors.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="New folder to write.", show_default=False)
    ] = None,
    format: Annotated[
        str, typer.Option(help="nf4, fp4, mxfp4, nvfp4 or int4; what loads each is said above.")
    ] = "nf4",
    blocksize: Annotated[
        int | None,
        typer.Option(
            help="Values that share one scale: 32 to 4096 in nf4 and fp4, 32 to 256 in int4; mxfp4"
            " has 32, nvfp4 16.",
            show_default="64, of int4 128",
        ),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option(help="Keep absmax in 8 bits instead of 32, in nf4 and fp4.")
    ] = True,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16 or fp32, of nf4 and fp4.", show_default="that of most weights"
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A linear layer to leave as it is, like q_proj; may be repeated."),
    ] = None,
    stack: Annotated[
        bool,
        typer.Option(
            "--stack-experts/--no-stack-experts",
            help="Write the experts of a layer as one tensor, which peftkern loads, or each that"
            " has tensors of its own like a linear layer.",
        ),
    ] = True,
    shard_size: ShardSize = "5GB",
    device: Annotated[str, typer.Option(help="Where to quantize: cpu, cuda or cuda:N.")] = "cpu",
    force: Force = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Go on if most parameters stay as they are.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a safetensors checkpoint to 4 bits.

    Peak memory: about one file. DST loads with transformers' from_pretrained: in nf4 and fp4 with
    bitsandbytes installed, nf4 experts after `from peftkern.integrations.transformers import
    NF4ExpertsConfig`; gpt-oss in mxfp4 as OpenAI ships it. Linear layers in mxfp4, nvfp4 and int4,
    for which there is no standard, are in peftkern's own layout and load after `from
    peftkern.integrations.transformers import BlockLinearConfig`.

    The linear layers that transformers itself would quantize are in 4 bits, and experts in nf4, of
    gpt-oss in mxfp4, too; all else is copied, tokenizer and sub-folders included, but for weights
    in other formats, which are named at the end. A stopped run resumes when it is repeated. Exit
    status 1, and nothing written, if most parameters would stay as they are.

    Example: peftkern quantize ~/models/llama3-8b ~/models/llama3-8b-nf4
    """
    from peftkern.tools.quiet import quiet

    if destination is None and not dry_run:
        raise InputError("DST: expected a new folder to write, or --dry-run")
    shard_bytes = parse_bytes("--shard-size", shard_size)
    device = str(present_device(device))
    _check_format(format, double_quant, compute_dtype)
    if compute_dtype is not None:
        compute_dtype = DTYPES[dtype_name("--compute-dtype", compute_dtype, _COMPUTE_DTYPES)]
    with model_packages(), quiet():  # bitsandbytes tells of kernels that it did not find
        from peftkern.tools.checkpoints.checkpoint import read_checkpoint
        from peftkern.tools.quantize.file_plan import Options, plan_files
        from peftkern.tools.quantize.linear_weights import find_weights
        from peftkern.tools.quantize.quantized_checkpoint import check_request, quantize_checkpoint
    with checkpoint_run(destination, "format", "blocksize", "skip"):
        own = {"double_quant": double_quant, "shard_bytes": shard_bytes, "device": device}
        options = Options.of(format, blocksize, **own)
        checkpoint = read_checkpoint(source)
        choice, config = find_weights(
            checkpoint,
            skip=skip or (),
            stack=stack,
            format=format,
            blocksize=options.blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
        )
        plan = plan_files(checkpoint, choice, options)
        too_little = _share(plan.quantized, plan.total) < MOST and not partial
        summary = check_request(checkpoint, destination, plan, force)
        if not too_little and not dry_run:
            with progress_bar(checkpoint.nbytes) as progress:
                parts = (checkpoint, destination, choice, config, options)
                summary = quantize_checkpoint(*parts, force=force, progress=progress)
    if as_json and (dry_run or not too_little):
        print(json.dumps(_record(summary, choice, written=not dry_run), indent=2))
    elif dry_run or not too_little:
        print("\n".join(_report(summary, choice, format, None if dry_run else destination)))
    if too_little:
        print(f"peftkern: {_too_little(plan, choice, format)}", file=sys.stderr)
        raise typer.Exit(TOO_LITTLE)


def _check_format(format: str, double_quant: bool, compute_dtype: str | None) -> None:
    """Refuse options that only formats of bitsandbytes have."""
    from peftkern.formats.nf4 import STATE_KEYS

    if format in STATE_KEYS:
        return
    for option, given in (
        ("--no-double-quant", not double_quant),
        ("--compute-dtype", compute_dtype is not None),
    ):
        if given:
            raise InputError(f"{option}: expected with nf4 or fp4, got --format {format}")


def _report(
    summary: Summary, choice: Choice, format: str, destination: Path | None
) -> Iterator[str]:
    """Describe what is written, or, without a destination, what would be."""
    plan, to_be = summary.plan, "to be " if destination is None else ""
    total, quantized = plan.total, plan.quantized
    resumed = f" ({summary.resumed} by an earlier run)" if summary.resumed else ""
    yield (
        f"{quantized.tensors} tensors {to_be}quantized, {total.tensors - quantized.tensors} kept"
        f"{resumed}"
    )
    yield (
        f"{_size(total.bytes_before)} before, {_size(total.bytes_after)} after: "
        f"{total.bits:.2f} bits per parameter, {quantized.bits:.2f} in quantized tensors, "
        f"which hold {_share(quantized, total):.0%} of the parameters"
    )
    yield from (*_experts(plan, choice, format), *_unfit(choice))
    files = f"{len(plan.files)} file{'s' * (len(plan.files) > 1)}"
    if destination is None:
        yield from (_kept(plan), f"{files} to be written")
    else:
        yield f"largest relative error {summary.largest_error:.2%}, of {summary.largest_error_name}"
        yield f"{files} read back, checksums agree"
    yield f"{len(summary.copied)} other file{'s' * (len(summary.copied) != 1)} {to_be}copied"
    left = [name if name.isprintable() else ascii(name) for name in summary.left]
    if left:
        yield f"left behind: {', '.join(left)}"
    yield "a dry run: nothing is written" if destination is None else f"{destination}: written"


def _record(summary: Summary, choice: Choice, written: bool) -> dict[str, Any]:
    """Return the same for JSON; sizes in bytes."""
    plan = summary.plan
    sizes = {"total": plan.total, "quantized": plan.quantized, "experts": plan.experts}
    return {
        "written": written,
        **{name: size.as_dict() for name, size in sizes.items()},
        "unfit": list(choice.unfit),
        "kept": {name: size.as_dict() for name, size in plan.kept().items()},
        "files": {name: sum(u.nbytes for u in units) for name, units in plan.files.items()},
        "copied": summary.copied,
        "left_behind": summary.left,
        "resumed_tensors": summary.resumed,
        "largest_error": {summary.largest_error_name: summary.largest_error} if written else {},
    }


def _too_little(plan: Plan, choice: Choice, format: str) -> str:
    """Say why nothing is written although it could be."""
    total = plan.total
    return "; ".join(
        [
            f"{1 - _share(plan.quantized, total):.0%} of the parameters would stay as they are: "
            f"{total.bits:.2f} bits per parameter in all",
            *_experts(plan, choice, format),
            *_unfit(choice),
            "--partial writes it all the same",
        ]
    )


def _unfit(choice: Choice) -> Iterator[str]:
    """Name linear layers that the format cannot have."""
    from peftkern.layers.names import shortened

    if choice.unfit:
        names = shortened(choice.unfit, _SHOWN)
        yield f"layers that stay dense, as their rows are not whole blocks: {names}"


def _experts(plan: Plan, choice: Choice, format: str) -> Iterator[str]:
    """Say which experts of a mixture are quantized and which are not."""
    loader = "each as a linear layer, which no model of transformers 5 loads"
    if choice.stacks and format == "mxfp4":
        loader = "as OpenAI ships gpt-oss"
    elif choice.stacks:
        loader = f"{_IMPORT} before from_pretrained"
    why = "skipped, or rearranged when they are loaded"
    if format != "nf4" and not choice.stacks:
        why = "skipped, or there is no layout of experts in this format"
    for size, which in (
        (plan.experts, f"are quantized: {loader}"),
        (plan.kept_experts, f"stay as they are ({why})"),
    ):
        if (share := _share(size, plan.total)) >= SHARE_TOLD:
            yield f"experts: {share:.0%} of the parameters, at {size.bits:.2f} bits, {which}"


def _kept(plan: Plan) -> str:
    """Name the largest of what stays as it is."""
    from peftkern.layers.names import shortened

    kept = [f"{_share(size, plan.total):.1%} {name}" for name, size in plan.kept().items()]
    return f"left as they are: {shortened(kept, _SHOWN) or 'none'}"


def _share(part: Size, total: Size) -> float:
    return part.parameters / max(total.parameters, 1)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
