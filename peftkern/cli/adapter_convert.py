"""Command `peftkern adapter convert A DST --to LAYOUT`: an adapter for another reader."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import bad_input
from peftkern.cli.options import ForceAdapter, Json

if TYPE_CHECKING:
    from peftkern.tools.adapters.convert.run import Conversion

_SHOWN = 6  # modules that are named one by one


def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder or safetensors file.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft, peft-old-moe, per-expert, grouped, diffusers, kohya, mlx, or lora."
        ),
    ],
    from_layout: Annotated[
        str | None,
        typer.Option(
            "--from-layout",
            "--layout",
            help="Of experts, where the file does not tell: peft, peft-old-moe, unsloth or "
            "unsloth-old-moe.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the base: from kohya, from DoRA to lora, of experts to per-expert and "
            "mlx."
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter before training, to lora from pissa, olora and kin."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Of a pipeline, to and from diffusers and kohya: unet, text_encoder..."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="To lora from DoRA.", show_default="the adapter's own")
    ] = None,
    force: ForceAdapter = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another layout: without a change of any product, or not at all.

    peft: PEFT's folder. peft-old-moe: for PEFT before 0.19.1, which exchanged the input and
    output of experts. per-expert: a pair for each expert (vLLM, transformers 4). grouped: experts
    in three dimensions (SGLang). lora: plain LoRA of AdaLoRA, of PiSSA and kin with --initial,
    and, nearly, of DoRA with --base. The scaling becomes 1: lora_B takes it, rounded once unless
    it is a power of two.

    Example: peftkern adapter convert my-adapter for-mlx --to mlx
    """
    from peftkern.tools.adapters.convert.run import convert_adapter

    options = {"from_layout": from_layout, "base": base, "initial": initial}
    options |= {"component": component, "rank": rank, "force": force}
    with bad_input("to", "from_layout", "base", "initial", "component", "rank"):
        done = convert_adapter(adapter, destination, to, **options)
    if as_json:
        print(json.dumps(_record(done), indent=2))
    else:
        print("\n".join(_report(done)))


def _report(done: Conversion) -> Iterator[str]:
    yield f"{done.modules} updates, from {done.layout}'s names to {done.to}"
    yield from done.notes
    if done.rounded:
        yield f"{len(done.rounded)} lora_B rounded once by their scaling, no power of two"
    worst = sorted(done.losses.items(), key=lambda item: -item[1].relative)
    for key, loss in worst[:_SHOWN]:
        yield f"{key}: the best update of rank {loss.rank} leaves {loss.relative:.2%} of DoRA's"
    if len(worst) > _SHOWN:
        yield f"{len(worst) - _SHOWN} more leave less; in all {done.lost:.2%}"
    yield f"{done.destination}: written"


def _record(done: Conversion) -> dict[str, Any]:
    losses = {k: {**dataclasses.asdict(v), "relative": v.relative} for k, v in done.losses.items()}
    return {**dataclasses.asdict(done), "losses": losses, "lost": done.lost}
