"""Chosen ranks for a terminal: a row for each layer, then the config to paste."""

from __future__ import annotations

from collections.abc import Iterator

from peftkern.integrations.peft.rank_report import RankReport
from peftkern.methods.rank_choice import LayerRank
from peftkern.tools import tables
from peftkern.tools.adapters.terminal import shared_start

_BAR = 16  # columns of the largest rank
_ROOM = 100  # columns of a terminal from which on bars are drawn
KEPT = {
    "weights": "of |W|^2",
    "activations": "of inputs",
    "gradients": "of |G|^2",
    "gora": "importance",
}


def columns(found: RankReport) -> tuple[str, ...]:
    """Name the columns: what a rank keeps depends on what the ranks were chosen by."""
    bound = ("excess",) if found.certificate is not None else ()
    return ("size", "rank", KEPT[found.by], "parameters", *bound)


def cells(layer: LayerRank) -> list[tuple[str, float]]:
    """Format the columns of a layer, each with what a table is sorted by."""
    m, n = layer.shape
    found = [
        (f"{layer.experts}x{m}x{n}" if layer.experts > 1 else f"{m}x{n}", layer.experts * m * n),
        (str(layer.rank), layer.rank),
        (f"{layer.kept:.1%}", layer.kept),
        (f"{layer.parameters:,}", layer.parameters),
    ]
    if layer.certificate is not None:
        found.append((f"{layer.certificate:.1e}", layer.certificate))
    return found


def remarks(found: RankReport) -> Iterator[str]:
    """Yield what else there is to know."""
    dropped = [layer.name for layer in found.layers if not layer.rank]
    if dropped:
        yield f"without an adapter: {', '.join(dropped)}"
    for name, what in found.unreached.items():
        yield f"not reached: {name}: {what}"
    for name, reason in found.skipped.items():
        yield f"keeps its rank: {name}: {reason}"


def show(found: RankReport) -> None:
    """Print ranks, what they are worth, and the config."""
    console = tables.console()
    prefix = shared_start([layer.name for layer in found.layers])
    table = tables.table(prefix or "layer", *columns(found), whole=1, numbers=True)
    most = max(layer.rank for layer in found.layers)
    for layer in found.layers:
        bar = ["█" * round(_BAR * layer.rank / most)] if console.width >= _ROOM else []
        texts = (text for text, _ in cells(layer))
        table.add_row(layer.name.removeprefix(prefix), *texts, *bar)
    tables.show(console, table)
    console.print()
    for line in (*remarks(found), str(found)):
        console.print(line)
    console.print()
    print(found.python(), end="")  # not wrapped, to be pasted
