"""The tables of docs/multi-gpu.md are those of the rows, which contradict nothing."""

from __future__ import annotations

from rows import CHECKPOINTS, PAGE, ROWS, Row, table, with_tables


def test_the_page_has_the_tables_of_the_rows():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run python tests/integrations/engines/rows.py --write"


def test_a_method_has_one_outcome_under_an_engine():
    outcomes = {}
    for row in ROWS:
        assert outcomes.setdefault((row.engine, row.method), row.outcome) == row.outcome, row
    assert len(set(CHECKPOINTS)) == len(CHECKPOINTS)


def test_methods_of_one_outcome_share_a_line():
    rows = (
        Row("A", "LoRA", "served", 2),
        Row("B", "LoRA", "refused: in one piece", 2),
        Row("A", "DoRA", "served", 4),
        Row("A", "experts", "base weight is DTensor", 0),
    )
    assert table(rows).splitlines()[2:] == [
        "| A | LoRA, DoRA | served | 2, 4 |",
        "| A | experts | falls back: `base weight is DTensor` | 1 |",
        "| B | LoRA | refused: in one piece | 2 |",
    ]
