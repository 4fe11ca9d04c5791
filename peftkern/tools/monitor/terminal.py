"""One run, or two side by side, in a terminal of 80 columns: a table, small charts, counts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peftkern.monitor.records import line_of, name_of, value_text
from peftkern.tools import tables
from peftkern.tools.monitor.run import MOVED, Run
from peftkern.tools.monitor.summary import COUNTED, counts, losses_apart, names, state, table

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
ROWS = 4  # of a chart
REFRESH_SECONDS = 1.0


def show(runs: Sequence[Run]) -> None:
    """Print what has been read."""
    console = tables.console()
    console.print(_view(runs, console))


def follow(runs: Sequence[Run]) -> None:
    """Show runs until all have ended; where the output is no terminal, a line for each record.

    Raises: as `Run.read`.
    """
    console = tables.console()
    if not console.is_terminal:
        console.print(_view(runs, console))
        while not all(run.finished for run in runs):
            time.sleep(REFRESH_SECONDS)
            for run in runs:
                for record in run.read():
                    console.print(Text(f"{run.path.name}  ") + line_of(record), soft_wrap=True)
        return
    with Live(_view(runs, console), console=console, auto_refresh=False) as live:
        while not all(run.finished for run in runs):
            time.sleep(REFRESH_SECONDS)
            for run in runs:
                run.read()
            live.update(_view(runs, console), refresh=True)


def plot(
    at: Sequence[int],
    values: Sequence[float],
    span: tuple[int, int],
    bounds: tuple[float, float],
    size: tuple[int, int],
    levels: str = BLOCKS,
) -> list[str]:
    """Draw values over steps as lines of blocks, as high in each column as the mean there.

    span, bounds: steps and values at the edges; size: columns and rows. A column that no step falls
    into repeats the one before; NaN leaves it empty.
    """
    (columns, rows), (begin, end), (low, high) = size, span, bounds
    found: list[list[float]] = [[] for _ in range(columns)]
    for step, value in zip(at, values, strict=True):
        found[min((step - begin) * columns // max(end - begin, 1), columns - 1)].append(value)
    if high == low:
        low, high = low - 1, high + 1
    heights, last = [], math.nan
    for column in found:
        last = sum(column) / len(column) if column else last
        share = (last - low) / (high - low)
        heights.append(1 + round(share * (8 * rows - 1)) if math.isfinite(share) else 0)
    return [
        "".join(levels[min(max(height - 8 * row, 0), 8)] for height in heights)
        for row in reversed(range(rows))
    ]


def _view(runs: Sequence[Run], console: Console) -> Group:
    called, parts = names(runs), []
    for name, run in zip(called, runs, strict=True):
        parts.append(Text.assemble((name, "bold"), f"  {state(run)}"))
    if any(run.points for run in runs):
        levels = ASCII if console.options.ascii_only else BLOCKS
        parts += [_charts(runs, console.width, levels), Text()]
        columns = ["", *called, "ratio"] if runs[1:] else ["", ""]
        parts.append(tables.table(*columns, rows=table(runs)))
        parts += [Text(losses_apart(*runs))] if runs[1:] else []
        for name, run in zip(called, runs, strict=True):
            title = f" of {name}" if runs[1:] else ""
            parts += _ranks(run, console.width, levels, title)
        for of, title in COUNTED.items():
            if rows := counts(runs, of):
                columns = [title, *(called if runs[1:] else [""])]
                parts += [Text(), tables.table(*columns, rows=rows)]
    return Group(*parts)


def _charts(runs: Sequence[Run], width: int, levels: str) -> Table:
    """Draw the charts two beside each other: the same quantity of two runs, on one scale."""
    lead = runs[0]
    memory = (
        "cuda_allocated_bytes" if lead.curve("cuda_allocated_bytes")[0] else "process_rss_bytes"
    )
    speed = "tokens_per_second" if lead.totals["tokens"] else "step_seconds"
    across = 2 if width >= 60 else 1
    cells = []
    for name in (*lead.values()[:1], speed, memory, "fallbacks"):
        curves = [run.curve(name) for run in runs]
        finite = [y for _, ys in curves for y in ys if math.isfinite(y)]
        if not any(finite):
            continue
        bounds = (min(finite) if name in lead.values() else 0.0, max(finite))
        span = (min(at[0] for at, _ in curves if at), max(at[-1] for at, _ in curves if at))
        labels = [value_text(name, bounds[1]), *[""] * (ROWS - 2), value_text(name, bounds[0])]
        title = f"{name_of(name)} per step" if name == "fallbacks" else name_of(name)
        for called, (at, ys) in zip(names(runs), curves, strict=True):
            lines = plot(at, ys, span, bounds, (max(width // across - 12, 8), ROWS), levels)
            text = "\n".join(f"{a:>9} {b}" for a, b in zip(labels, lines, strict=True))
            text = f"\n{title}{f', {called}' if runs[1:] else ''}\n{text}"
            cells.append(Text(text, no_wrap=True, overflow="crop"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for i in range(0, len(cells), across):
        grid.add_row(*cells[i : i + across])
    return grid


def _ranks(run: Run, width: int, levels: str, title: str) -> list[RenderableType]:
    if not run.ranks:
        return []
    rows = []
    at = [step for step, _ in run.ranks]
    span = (at[0], max(at[-1], run.points[-1][0] if run.points else 0))
    curves = run.mean_ranks()
    most = max(max(means) for _, means in curves.values())
    for kind, (at, means) in curves.items():
        (line,) = plot(at, means, span, (0.0, most), (width // 2, 1), levels)
        rows.append([kind, f"{means[0]:.3g} to {means[-1]:.3g}", line])
    return [Text(), tables.table(f"mean rank{title}", "", "", rows=rows), *_masks(run)]


def _masks(run: Run) -> list[RenderableType]:
    """Say what the masks moved, and what the last one kept for what budget."""
    moved = [sum(len(t) for _, m in run.masks for t in getattr(m, k).values()) for k in MOVED]
    if not any(moved):
        return []
    step, last = run.masks[-1]
    said = f"{last.kept:,} triplets kept since step {step:,}"
    if last.budget is not None:
        said += f", budget {last.budget:,.6g}"
    return [Text(f"{said}; {moved[0]:,} were pruned and {moved[1]:,} revived")]
