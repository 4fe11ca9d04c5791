"""Command `peftkern init METHOD BASE DST`: adapters that start from weights or data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import (
    InputError,
    checkpoint_run,
    model_packages,
    parse_bytes,
    present_device,
    progress_bar,
    refuse_useless,
)
from peftkern.cli.options import (
    Certify,
    Device,
    Force,
    Json,
    Length,
    RsLora,
    Seed,
    ShardSize,
    Targets,
    Texts,
)

if TYPE_CHECKING:
    from peftkern.methods.initialization.report import InitReport

FROM_WEIGHTS = ("pissa", "olora", "qpissa", "loftq")
FROM_DATA = ("corda", "eva", "lora_ga")
_IN_NF4 = ("qpissa", "loftq")
_OF = {  # methods that an option is of, if it is not of all
    "steps": ("loftq",),
    "blocksize": _IN_NF4,
    "double_quant": _IN_NF4,
    "texts": FROM_DATA,
    "length": FROM_DATA,
}


def init(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=", ".join((*FROM_WEIGHTS, *FROM_DATA)) + ".")
    ],
    source: Annotated[Path, typer.Argument(metavar="BASE", help="Folder with safetensors.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    rank: Annotated[
        int | None, typer.Option(help="Rank of every adapter.", show_default="16")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha.", show_default="the rank")
    ] = None,
    rslora: RsLora = False,
    ranks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ranks of each: what `peftkern ranks --json` printed."),
    ] = None,
    target: Targets = None,
    tol: Annotated[
        float, typer.Option(help="Excess of the error over the least possible to stop at.")
    ] = 1e-3,
    certify: Certify = True,
    steps: Annotated[int, typer.Option(help="Steps of loftq.")] = 5,
    blocksize: Annotated[int, typer.Option(help="NF4: values that share one absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="NF4: keep absmax in 8 bits.")] = True,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For corda, eva, lora_ga: texts, as for `ranks`."),
    ] = None,
    texts: Texts = 64,
    length: Length = 1024,
    seed: Seed = 0,
    shard_size: ShardSize = "5GB",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Start LoRA adapters from the weights of a checkpoint, or from texts.

    DST is a new base with the adapter in its folder "adapter"; together they compute what BASE
    does. pissa and olora write a dense base, qpissa and loftq one in NF4, all four a tensor at a
    time; a stopped run resumes when it is repeated. They start experts, too, if these are named:
    --target experts.down_proj. corda, eva, which starts experts as well, and lora_ga load the model
    and run the texts through it, in 4 bits if BASE is: what corda and lora_ga leave of it is
    quantized again, as it was.

    Load: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DST), DST + "/adapter",
    is_trainable=True).

    Example: peftkern init pissa ~/models/llama3-8b ~/models/llama3-8b-pissa --rank 16
    """
    method = method.replace("-", "_")
    if method not in FROM_WEIGHTS + FROM_DATA:
        accepted = ", ".join(FROM_WEIGHTS + FROM_DATA)
        raise InputError(f"METHOD: expected one of {accepted}, got {method!r}")
    if (data is None) == (method in FROM_DATA):
        expected = "a file of texts" if method in FROM_DATA else "none: it starts from weights"
        raise InputError(f"--data: expected {expected} for {method}, got {data or 'none'}")
    why = f"{{}}: has no effect on {method}"
    refuse_useless(context, lambda name: method not in _OF.get(name, (method,)), why)
    if ranks is not None:
        given = {"--rank": rank, "--alpha": alpha, "--rslora": rslora or None, "--target": target}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name}: expected none beside --ranks, got {value!r}")
    shard_bytes = parse_bytes("--shard-size", shard_size)
    device = str(present_device(device))
    with model_packages():
        from peftkern.tools.checkpoints.checkpoint import read_checkpoint
        from peftkern.tools.checkpoints.decoded import decoded
        from peftkern.tools.initialize import checkpoint, from_text
        from peftkern.tools.initialize.rank_file import read_ranks
        from peftkern.tools.initialize.request import Request
        from peftkern.tools.quantize.file_plan import Options
    with checkpoint_run(destination, *_OPTIONS):
        how = {"rank": 16 if rank is None else rank, "alpha": alpha, "rslora": rslora}
        names = tuple(target or ())
        if ranks is not None:
            how, names = read_ranks(ranks)
        request = Request(method, tol=tol, certify=certify, steps=steps, seed=seed, **how)
        base = decoded(read_checkpoint(source, quantized=True))
        if method in FROM_DATA:
            sizes = {"most": texts, "length": length, "shard_bytes": shard_bytes}
            job = from_text.prepare(
                base, destination, request, data, names, **sizes, device=device, force=force
            )
            report = job.run(force)
        else:
            options = Options(blocksize, double_quant, shard_bytes, device)
            job = checkpoint.prepare(base, destination, request, options, names)
            job.check(force)
            with progress_bar(base.nbytes) as progress:
                report = job.run(force, progress)
    if as_json:
        print(json.dumps({"written": str(destination), **report.as_dict()}, indent=2))
    else:
        _show(report, destination)


_OPTIONS = ("alpha", "blocksize", "data", "length", "rank", "ranks", "seed", "steps")
_OPTIONS += ("shard_bytes", "target", "texts", "tol")


def _show(report: InitReport, destination: Path) -> None:
    """Print a line for each layer, and what was written."""
    from peftkern.tools import tables
    from peftkern.tools.adapters.terminal import shared_start

    prefix = shared_start([layer.name for layer in report.layers])
    columns = ("shape", "rank", "energy kept", "error", "excess")
    rows = tables.table(prefix or "layer", *columns, whole=1, numbers=True)
    for layer in report.layers:
        shape = "x".join(map(str, layer.shape))
        shape = shape if layer.matrices == 1 else f"{layer.matrices} of {shape}"
        bound = _number(layer.certificate)
        row = (shape, str(layer.rank), f"{layer.energy:.1%}", _number(layer.error), bound)
        rows.add_row(layer.name.removeprefix(prefix), *row)
    tables.show(tables.console(), rows)
    for name, reason in report.skipped.items():
        print(f"left as it was: {name}: {reason}")
    print(report)
    print(f"{destination}: written, the adapter in {destination / 'adapter'}")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.1e}"
