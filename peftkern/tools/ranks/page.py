"""Chosen ranks as a page: maps of layer x module, spectra, every layer, the config."""

from __future__ import annotations

from peftkern.integrations.peft.rank_report import RankReport
from peftkern.tools import layer_charts, pages
from peftkern.tools.ranks.terminal import KEPT, cells, columns, remarks


def html(found: RankReport, source: str) -> str:
    """Return the page."""
    ranks = [(layer.name, layer.rank) for layer in found.layers]
    kept = [(layer.name, 100 * layer.kept) for layer in found.layers]
    maps = (
        layer_charts.layer_map(ranks, "rank"),
        layer_charts.layer_map(kept, f"% {KEPT[found.by]}"),
    )
    spectra = layer_charts.spectra([(la.name, la.S) for la in found.layers if la.S])
    return pages.render(
        "ranks.html.j2",
        source=source,
        heading=str(found),
        remarks=list(remarks(found)),
        maps=[drawn for drawn in maps if drawn is not None],
        spectra=list(spectra),
        columns=columns(found),
        rows=[(layer.name, cells(layer)) for layer in found.layers],
        python=found.python(),
    )
