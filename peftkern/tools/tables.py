"""Consoles and tables of all commands: text as it is, whatever names a user's files hold."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

NARROW = 60  # columns of a terminal


def console(width: int | None = None) -> Console:
    """Make a console of standard output that takes brackets and colons of a name for what they
    are, and colors nothing by itself."""
    return Console(width=width, highlight=False, markup=False, emoji=False)


def say(console: Console, text: str) -> None:
    """Print a paragraph whose lines end without a space, as Rich's own do not."""
    console.print(textwrap.fill(text, console.width))


def table(
    *columns: str,
    rows: Iterable[Sequence[RenderableType]] = (),
    whole: int = 0,
    numbers: bool = False,
) -> Table:
    """Build a table without lines.

    Args: whole, of so many columns words do not break, but on a terminal so narrow that the others
        would have no room; numbers, all columns but the first are at the right.
    """
    whole = whole if Console().width >= NARROW else 0
    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim")
    for place, column in enumerate(columns):
        justify = "right" if numbers and place else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=place < whole)
    for row in rows:
        table.add_row(*row)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table, the columns closer together if they would not fit otherwise."""
    whole = console.measure(table, options=console.options.update_width(10**4)).maximum
    table.collapse_padding = whole > console.width
    console.print(table)


def section(console: Console, title: str, table: Table) -> None:
    """Print a table under a title."""
    console.print()
    console.print(title, style="bold")
    show(console, table)
