"""The outcomes of a bench script as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from peftkern.benchmark.timer import milliseconds


def table(outcomes: Iterable, title: str, gpu: dict | None) -> Table:
    """A line per peer; on a GPU also the ratio of replayed graphs, and how many kernels run."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("case")
    for name in ("peftkern", "of floor"):
        grid.add_column(name, justify="right")
    grid.add_column("peer")
    for name in ("its time", "ratio", "target", "", "error (ours / its)"):
        grid.add_column(name, justify="right")
    for name in ("in a graph", "launches") if gpu else ():
        grid.add_column(name, justify="right")
    for outcome in outcomes:
        ours, (_, *peers) = outcome.rows["peftkern"], outcome.rows
        targets = {target.peer: target.at_least for target in outcome.spec.targets}
        share = outcome.share_of_floor
        head = [
            outcome.spec.short_name,
            str(ours.timing) if ours.timing else f"[red]WRONG[/]: {ours.wrong}",
            f"{share:.0%}" if share else "",
        ]
        for peer in peers:
            theirs, ratio, least = outcome.rows[peer], outcome.ratio(peer), targets.get(peer)
            mark = ""
            if least is not None:
                met = ratio is not None and ratio >= least
                mark = "[green]✓[/]" if met else "[red]✗[/]"
            both = ours.rms is not None and theirs.rms is not None
            cells = [
                peer,
                f"{milliseconds(theirs.timing.median)} ms" if theirs.timing else "WRONG",
                f"{ratio:.2f}x" if ratio else "",
                f"{least:.3g}x" if least else "",
                mark,
                f"{ours.rms:.1e} / {theirs.rms:.1e}" if both else "",
            ]
            if gpu:
                replayed = outcome.ratio(peer, "graph")
                counts = [len(row.kernels) for row in (ours, theirs) if row.kernels is not None]
                cells += [f"{replayed:.2f}x" if replayed else "", " / ".join(map(str, counts))]
            grid.add_row(*head, *cells)
            head = ["", "", ""]
        grid.add_section()
    return grid
