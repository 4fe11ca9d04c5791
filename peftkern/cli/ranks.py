"""Command `peftkern ranks MODEL`: the rank of each layer, before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftkern.cli.frame import (
    InputError,
    bad_input,
    check_page,
    checkpoint_run,
    model_packages,
    parse_bytes,
    present_device,
    progress_bar,
    refuse_useless,
    write_page,
)
from peftkern.cli.options import Certify, Device, Html, Json, Length, RsLora, Seed

if TYPE_CHECKING:
    from peftkern.integrations.peft.rank_report import RankReport
    from peftkern.tools.ranks.choose import Settings

FROM_DATA = ("activations", "gradients", "gora")
_OPTIONS = ("alpha", "budget", "cost", "data", "length", "max_rank", "min_rank", "rank", "seed")
_OPTIONS += ("target", "texts", "tol")


def ranks(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder with safetensors; or FILE.py, which is run."),
    ],
    by: Annotated[
        str, typer.Option(help="weights; or of data: activations, gradients, gora.")
    ] = "weights",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA whose budget is shared out.")] = 16,
    budget: Annotated[
        float | None,
        typer.Option(help="Ranks, or parameters, of all layers.", show_default="as of LoRA"),
    ] = None,
    cost: Annotated[
        str, typer.Option(help="What the budget counts: rank, parameters, bytes or flops.")
    ] = "rank",
    min_rank: Annotated[int, typer.Option(help="At least for a layer; 0 may drop it.")] = 1,
    max_rank: Annotated[
        int | None, typer.Option(help="At most for a layer.", show_default="twice the rank")
    ] = None,
    relative: Annotated[
        bool | None,
        typer.Option(
            "--relative/--absolute",
            help="Compare layers by shares of each, or as they are.",
            show_default="relative, but absolute for gradients",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha at that rank.", show_default="the rank")
    ] = None,
    rslora: RsLora = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A linear layer, like q_proj, or experts, like gate_up_proj; may be repeated.",
            show_default="all layers but the head",
        ),
    ] = None,
    tol: Annotated[
        float, typer.Option(help="Excess of a spectrum's error over the least to stop at.")
    ] = 1e-3,
    certify: Certify = True,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For all but weights: texts, a line each; or .jsonl."),
    ] = None,
    texts: Annotated[int, typer.Option(help="Number of texts, or batches, to take.")] = 64,
    length: Length = 1024,
    memory: Annotated[
        str, typer.Option(help="For gradients, and inputs of experts: 4GB or 500MiB.")
    ] = "4GB",
    seed: Seed = 0,
    device: Device = "cpu",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Choose the rank of each layer within the budget of LoRA, and print a LoraConfig for it.

    By the spectra of the weights, dense or in 4 bits, read one at a time; or, with the model loaded
    and texts run through it, by the variance of the inputs that ranks explain, by the gradient's
    spectra, or by GoRA's importance. `peftkern init --ranks` starts an adapter with what --json
    prints.

    Texts are what the model's loss takes: of language models the tokens, masked or shifted as
    theirs are; of encoder-decoders {"text": ..., "target": ...} in a .jsonl, or halves of a text;
    of classifiers {"text": ..., "label": ...}.

    FILE.py serves any model: it defines model(), batches() for all but weights, each of them what
    the model is called with, and loss(model, batch) unless the model returns its loss.

    Example: peftkern ranks ~/models/llama3-8b --rank 16 --html ranks.html

    Of a program: peftkern ranks train.py --by gradients --target q_proj
    """
    if by not in ("weights", *FROM_DATA):
        expected = ", ".join(("weights", *FROM_DATA))
        raise InputError(f"--by: expected one of {expected}, got {by!r}")
    program = source.suffix == ".py"
    if program and data is not None:
        raise InputError(f"--data: expected none beside {source}, which has batches(), got {data}")
    if not program and (data is None) == (by in FROM_DATA):
        expected = "a file of texts" if by in FROM_DATA else "none: weights need no texts"
        raise InputError(f"--data: expected {expected} for {by}, got {data or 'none'}")
    if by == "weights":
        useless = ("texts", "length", "memory")
        refuse_useless(context, lambda name: name in useless, "{}: has no effect on --by weights")
    statistics_bytes = parse_bytes("--memory", memory)
    device = str(present_device(device))
    check_page("--html", html)
    with model_packages():
        from peftkern.functional.rank_allocation import COSTS
        from peftkern.functional.truncated_svd import check_options
        from peftkern.methods.rank_choice import LoraBudget
        from peftkern.tools.ranks.choose import Settings
    if cost not in COSTS:
        raise InputError(f"--cost: expected one of {', '.join(COSTS)}, got {cost!r}")
    with bad_input(*_OPTIONS):
        check_options(tol, certify, seed)
        budgeted = LoraBudget(rank, budget, cost, min_rank, max_rank)
        settings = Settings(by, budgeted, relative, alpha, rslora, tol, certify, seed)
    sizes = {"most": texts, "length": length, "statistics_bytes": statistics_bytes}
    found = _choose(source, settings, tuple(target or ()), data, sizes, device)
    if html is not None:
        from peftkern.tools.ranks import page

        write_page(html, page.html(found, str(source)))
    if as_json:
        print(json.dumps({"source": str(source), **found.as_dict()}, indent=2))
    else:
        from peftkern.tools.ranks import terminal

        terminal.show(found)


def _choose(
    source: Path,
    settings: Settings,
    names: tuple[str, ...],
    data: Path | None,
    sizes: dict[str, int],
    device: str,
) -> RankReport:
    """Choose the ranks of a model's layers. Raises: InputError."""
    from peftkern.tools.checkpoints.checkpoint import read_checkpoint
    from peftkern.tools.checkpoints.decoded import decoded
    from peftkern.tools.ranks import choose

    with checkpoint_run(None, *_OPTIONS):
        if source.suffix == ".py":
            sizes.pop("length")  # of a text
            return choose.from_file(source, settings, names, **sizes, device=device)
        base = decoded(read_checkpoint(source, quantized=True))
        if data is not None:
            return choose.from_texts(base, settings, data, names, **sizes, device=device)
        with progress_bar(base.nbytes) as progress:
            how = {"device": device, "progress": progress}
            return choose.from_weights(base, settings, names, **how)
