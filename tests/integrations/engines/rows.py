"""What the tests of this folder show of each engine: the table of docs/multi-gpu.md.

python tests/integrations/engines/rows.py  # prints it
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of docs/multi-gpu.md: what a patched layer does under an engine, as its test shows.

    outcome: "served", or the reason as stats() counts it, or "refused: ..." where construction
    raises. processes: of the test; 0: one process.
    """

    engine: str
    method: str
    outcome: str
    processes: int


ROWS: tuple[Row, ...] = ()


def table(rows: tuple[Row, ...] = ROWS) -> str:
    """Markdown, the rows of an engine together."""
    lines = [
        "| Engine | Method | A patched layer | Processes in its test |",
        "| --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: [r.engine for r in rows].index(row.engine)):
        said = row.outcome
        if said != "served" and not said.startswith("refused"):
            said = f"falls back: `{said}`"
        lines.append(f"| {row.engine} | {row.method} | {said} | {row.processes or 1} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
