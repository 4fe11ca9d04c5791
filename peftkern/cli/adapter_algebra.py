"""Commands `peftkern adapter resize | combine | extract`: adapters of others, or of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import (
    DTYPES,
    InputError,
    bad_input,
    dtype_name,
    model_packages,
    parse_bytes,
    progress_bar,
    read_adapter,
    weighted_adapter,
)
from peftkern.cli.options import ForceAdapter, Json

if TYPE_CHECKING:
    import torch

    from peftkern.tools.adapters import Adapter

_WRITTEN = ("fp32", "bf16", "fp16")
_METHODS = {"": "svd", "--ties": "ties", "--dare": "dare_linear", "--prune": "magnitude_prune"}
_METHODS |= {"--ties --dare": "dare_ties"}
Destination = Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")]
Dtype = Annotated[str, typer.Option(help="Of the factors: fp32, bf16 or fp16.")]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="A row for each layer.")]
Layout = Annotated[str | None, typer.Option(help="Of experts, as `inspect` takes it.")]


def resize(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder or file.")],
    destination: Destination,
    rank: Annotated[
        int | None, typer.Option(help="Rank of each layer; with another rule, the largest.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the squared singular values to keep.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Keep what is above the largest over this (sv_ratio).")
    ] = None,
    sum: Annotated[
        float | None, typer.Option(help="Share of the sum of them to keep (sv_cumulative).")
    ] = None,
    fro: Annotated[
        float | None, typer.Option(help="Share of the Frobenius norm to keep (sv_fro).")
    ] = None,
    budget_bytes: Annotated[
        str | None,
        typer.Option(help="Size of all factors, like 20MB, spent where it keeps the most."),
    ] = None,
    average_rank: Annotated[
        float | None, typer.Option(help="Mean rank, spent where it keeps the most.")
    ] = None,
    dtype: Dtype = "fp32",
    per_layer: PerLayer = False,
    force: ForceAdapter = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Cut an adapter to a lower rank, by one rule, with the least error there is.

    The table says what it costs: error is |D - D'| / |D| of updates D, lost energy its square,
    next/top the largest singular value that is gone over the largest. DST has a scaling of 1.

    Example: peftkern adapter resize my-adapter small --energy 0.95 --rank 32
    """
    from peftkern.methods.rank_rules import RankRule
    from peftkern.tools.adapters import losses
    from peftkern.tools.adapters import resize as tool
    from peftkern.tools.adapters.write import check_destination

    size = None if budget_bytes is None else parse_bytes("--budget-bytes", budget_bytes)
    rules = {"energy": energy, "ratio": ratio, "sum": sum, "fro": fro}
    rules |= {"budget_bytes": size, "average_rank": average_rank}
    rules = {name: value for name, value in rules.items() if value is not None}
    if len(rules) > 1 or not (rules or rank is not None):
        raise InputError("expected --rank, or one of --energy, --ratio, --sum, --fro, "
                         "--budget-bytes and --average-rank")  # fmt: skip
    written = _dtype(dtype)
    with bad_input("rank", *rules):
        name, value = next(iter(rules.items())) if rules else ("rank", rank)
        rule = RankRule(name, value, most=rank if rules else None)
        check_destination(destination, force, adapter)
        source = read_adapter(adapter, layout)
        with progress_bar(len(source.updates), "updates") as progress:
            found, lost = tool.resize(source, rule, itemsize=written.itemsize, progress=progress)
        _write(found, destination, written, force)
    _report(destination, losses.as_dict(lost), as_json, lambda: losses.show(lost, per_layer))
    if not as_json and any(one.magnitude is not None for one in found.updates.values()):
        print("DoRA: the table is of scaling * B A alone, without what magnitudes make of it")


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT]... DST", help="Adapters (weight 1), new folder."),
    ],
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of the sum.", show_default="the largest of the adapters"),
    ] = None,
    cat: Annotated[
        bool, typer.Option("--cat", help="The exact sum, of the sum of all ranks.")
    ] = False,
    ties: Annotated[
        float | None, typer.Option(help="TIES: share of the elements to keep of each.")
    ] = None,
    dare: Annotated[
        float | None, typer.Option(help="DARE: share of the elements to keep, at random.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(help="Share of the largest elements to keep of each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --dare.", min=0)] = 0,
    dtype: Dtype = "fp32",
    per_layer: PerLayer = False,
    force: ForceAdapter = False,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Add adapters of one base, each times its weight, at their true scalings.

    The sum is exact (--cat), or cut to --rank with the least error there is; nothing is formed
    densely. --ties, --dare and --prune drop elements of the updates first, one dense layer at a
    time; both --ties and --dare with one share is DARE with TIES' signs. DARE's mean is the plain
    sum.

    Example: peftkern adapter combine my-adapter:0.7 runs/adapter:0.5 both --rank 32
    """
    from peftkern.tools.adapters import losses
    from peftkern.tools.adapters.combine import Combination
    from peftkern.tools.adapters.combine import combine as tool
    from peftkern.tools.adapters.write import check_destination

    *sources, destination = adapters
    if not sources:
        raise InputError("expected adapters, each with :WEIGHT or without, then a folder to write")
    shares = {"--ties": ties, "--dare": dare, "--prune": prune}
    shares = {option: share for option, share in shares.items() if share is not None}
    for option, share in shares.items():
        if not 0 < share <= 1:
            raise InputError(f"{option}: expected a number in (0, 1], got {share:g}")
    method = _METHODS.get(" ".join(shares))
    more = cat and (shares or rank is not None)
    if method is None or len(set(shares.values())) > 1 or more:
        raise InputError(
            "expected one of --rank, --cat, --ties, --dare and --prune; the last three may have a "
            "--rank, and --ties may have --dare with the same share"
        )
    method, density = "cat" if cat else method, next(iter(shares.values()), None)
    written = _dtype(dtype)
    with bad_input("rank"):
        how = Combination(method, rank, density, seed=seed)
        paths, weights = zip(*map(weighted_adapter, sources), strict=True)
        check_destination(Path(destination), force, *paths)
        read = [read_adapter(path, layout) for path in paths]
        count = len({key for one in read for key in one.updates})
        with progress_bar(count, "updates") as progress:
            found, lost = tool(read, weights, how, progress=progress)
        _write(found, Path(destination), written, force)
    _report(destination, losses.as_dict(lost), as_json, lambda: losses.show(lost, per_layer))


def extract(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the base's weights.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of its fine-tune.")],
    destination: Destination,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of each layer; with another rule, the largest.", show_default="256"
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the squared singular values to keep.")
    ] = None,
    noise: Annotated[
        bool,
        typer.Option("--noise", help="Keep what is above the rounding of TUNED; the default."),
    ] = False,
    dtype: Dtype = "fp32",
    per_layer: PerLayer = False,
    force: ForceAdapter = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of a full fine-tune: TUNED minus BASE, layer by layer, cut to a rank.

    Each may be dense or in 4 bits, of which a layer or an expert is decoded at a time. The rounding
    of TUNED, to 16 or to 4 bits, is noise in the difference, below an edge that is known: singular
    values above it are kept. Of two in 4 bits that of BASE is noise, too; under a dense TUNED it is
    not: give a --rank if TUNED was trained from BASE's weights in 16 bits. Norms, biases and tied
    embeddings that changed are carried whole. change is |TUNED - BASE| / |BASE|; error is what the
    rank leaves of the difference.

    Example: peftkern adapter extract ~/models/llama3-8b ~/models/my-tune extracted
    """
    with model_packages():
        from peftkern.tools.adapters import losses
        from peftkern.tools.adapters.extract import ExtractRule
        from peftkern.tools.adapters.extract import extract as tool
        from peftkern.tools.adapters.write import check_destination
        from peftkern.tools.checkpoints.checkpoint import read_checkpoint
        from peftkern.tools.checkpoints.decoded import decoded
    if noise and energy is not None:
        raise InputError("expected one of --energy and --noise")
    written = _dtype(dtype)
    with bad_input("rank", "energy"):
        rule = ExtractRule.asked(rank, energy, noise)
        check_destination(destination, force, base, tuned)
        with progress_bar(decoded(read_checkpoint(base, quantized=True)).nbytes) as progress:
            found, layers = tool(base, tuned, rule, progress=progress)
        _write(found, destination, written, force)
    lost = {key: one.loss for key, one in layers.items()}
    record = losses.as_dict(lost)
    for key, one in layers.items():
        record["updates"][key] |= {"change": one.change, "noise": one.noise}
    record |= {"carried": sorted(found.extras), "notes": list(found.notes)}
    changes = {key: one.change for key, one in layers.items()}
    _report(destination, record, as_json, lambda: losses.show(lost, per_layer, changes))
    if found.extras and not as_json:
        print(f"carried whole: {len(found.extras)} other tensors that changed")
    if not as_json:
        print(*found.notes, sep="\n", end="\n" if found.notes else "")


def _dtype(text: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[dtype_name("--dtype", text, _WRITTEN)])


def _write(adapter: Adapter, destination: Path, dtype: torch.dtype, force: bool) -> None:
    from peftkern.tools.adapters import write_adapter

    write_adapter(adapter, destination, dtype=dtype, force=force)


def _report(destination: Path | str, record: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        show()
        print(f"{destination}: written")
