"""Report of what was lost when updates were cut to lower ranks, for a terminal and for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftkern.methods.low_rank_algebra import Loss, total_error
from peftkern.tools import tables
from peftkern.tools.adapters.inspect import finite, labels


def as_dict(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """Return the losses of all updates and in total; null stands for what is not known."""
    error = total_error(list(losses.values()))
    records = {
        key: {**loss._asdict(), "lost_energy": loss.share, "error": loss.error}
        for key, loss in losses.items()
    }
    return {
        "total": {"error": finite(error), "lost_energy": finite(error**2)},
        "updates": {
            key: {name: finite(value) for name, value in record.items()}
            for key, record in records.items()
        },
    }


def show(
    losses: Mapping[str, Loss], per_layer: bool = False, change: Mapping[str, float] | None = None
) -> None:
    """Print a table: a row for each kind of module, or for each update, and one for all.

    change: of extracted updates, |W_tuned - W_base|_F / |W_base|_F of each.
    """
    last = "next/top" if change is None else "change"
    columns = ("rank", "kept", "lost energy", "error", last)
    columns = columns if per_layer else ("updates", *columns[:-1], "worst", last)
    table = tables.table("module", *columns, numbers=True)
    kinds = labels(losses)
    groups: dict[str, list[str]] = {}
    for key in losses:
        groups.setdefault(key if per_layer else kinds[key], []).append(key)
    if len(groups) > 1:
        groups["all"] = list(losses)
    for name, keys in groups.items():
        cells = _cells([losses[key] for key in keys])
        if change is not None:
            cells["change"] = f"{max(change[key] for key in keys):.4f}"
        style = "bold" if name == "all" and len(groups) > 1 else None
        table.add_row(name, *(cells[column] for column in columns), style=style)
    tables.show(tables.console(), table)


def _cells(losses: Sequence[Loss]) -> dict[str, str]:
    """Format the columns of updates together: `worst` is the largest error of one."""
    ratios = [x.following / x.top for x in losses if x.top and x.following is not None]
    return {
        "updates": str(len(losses)),
        "rank": _range(loss.rank for loss in losses),
        "kept": _range(loss.kept for loss in losses),
        "lost energy": f"{total_error(losses) ** 2:.3%}",
        "error": f"{total_error(losses):.4f}",
        "worst": f"{max(loss.error for loss in losses):.4f}",
        "next/top": f"{max(ratios):.1e}" if ratios else "-",
    }


def _range(values: Iterable[int]) -> str:
    values = sorted(values)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"
