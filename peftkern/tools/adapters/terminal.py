"""Inspection of an adapter as a terminal shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from peftkern.layers.names import shortened
from peftkern.tools import tables
from peftkern.tools.adapters.inspect import Inspection, Row, Spectrum, labels, method, rows

_SHOWN = 6  # of the other tensors
_STATED = ("updates", "size", "rank", "true", "scaling")  # no column where all rows have the same
COLUMNS = ("size", "rank", "true", "scaling", "|D|", "energy", "stable", "effective")


def show(found: Inspection, per_layer: bool, experts: bool) -> None:
    """Print an inspection: a row for each kind of module, or for each layer, or each expert."""
    console = tables.console()
    kinds = labels(one.key for one in found.spectra)

    def named(one: Spectrum) -> str:
        of = f" {one.expert}" if experts and one.expert is not None else ""
        return f"{one.key}{of}" if per_layer or experts else kinds[one.key]

    listed = rows(found.spectra, named)
    texts = [[str(row.count), *cells(row)] for row in listed]
    columns = dict(zip(("updates", *COLUMNS), zip(*texts, strict=True), strict=True))
    shared = [c for c in _STATED if len(listed) > 1 and len(set(columns[c])) == 1]
    _say(console, [*heading(found), *_every(shared, columns)])
    prefix = shared_start([row.name for row in listed])
    names = [row.name.removeprefix(prefix) for row in listed]
    shown = [column for column in columns if column not in shared]
    cut = zip(names, *(columns[column] for column in shown), strict=True)
    console.print()
    tables.show(console, tables.table(prefix or "module", *shown, rows=cut, numbers=True))
    _say(console, remarks(found))


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:  # a config may hold anything
        tables.say(console, line if line.isprintable() else ascii(line))


def _every(shared: list[str], columns: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """State what all rows share, which then is no column."""
    said = [f"{column} {columns[column][0]}" for column in shared]
    if said:
        yield f"in every row: {', '.join(said)}"


def shared_start(names: Sequence[str]) -> str:
    """Return the components that all names begin with, and end after."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda one: len(set(one)) == 1, zip(*parts, strict=False))
    return "".join(f"{one[0]}." for one in same) if len(names) > 1 else ""


def heading(found: Inspection) -> Iterator[str]:
    """Yield what it is, how large, and what for."""
    config = found.adapter.config
    written = f" of PEFT {config['peft_version']}" if config.get("peft_version") else ""
    dtypes = " and ".join(found.dtypes)
    nbytes = found.nbytes
    size = f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.2f} kB"
    yield f"{method(config)}{written}, {dtypes}, {size}"
    yield f"base: {config.get('base_model_name_or_path') or 'not named'}"
    count = len(found.adapter.updates)
    yield f"{count} update{'s' * (count != 1)}, |D| {_digits(found.norm)} in all"


def remarks(found: Inspection) -> Iterator[str]:
    """Yield what else there is to know, the worst first."""
    for name, count in found.not_finite.items():
        yield f"NOT FINITE: {name}: {count} value{'s' * (count != 1)}"
    for name, shape in found.tables.items():
        yield f"a table of the base inside, which loading puts in its place: {name} {shape}"
    for why in found.refusals:
        yield f"no plain merge: {why}"
    yield from found.adapter.notes
    others = [name for name in found.adapter.extras if name not in found.tables]
    if others:
        count = f"{len(others)} other tensor{'s' * (len(others) != 1)}"
        yield f"{count}: {shortened(others, _SHOWN)}"


def cells(row: Row) -> list[str]:
    """Format the columns of a row, but for its name."""
    sizes = [f"{m}x{n}" for m, n in row.sizes]
    size = sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes"
    ranges = (_range(*row.rank), _range(*row.true_rank), _range(*row.scaling))
    numbers = (_digits(row.norm), f"{row.share:.1%}", f"{row.stable_rank:.2f}")
    return [size, *ranges, *numbers, f"{row.effective_rank:.2f}"]


def _digits(value: float) -> str:
    return f"{value:#.4g}".rstrip(".")


def _range(low: float, high: float) -> str:
    if math.isclose(low, high):
        return f"{low:.4g}"
    return f"{low:.4g}-{high:.4g}"
