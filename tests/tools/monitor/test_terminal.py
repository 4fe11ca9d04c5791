"""Charts of blocks."""

from __future__ import annotations

import math

import pytest
from monitor_runs import read, start, step, write

from peftkern.tools.monitor import terminal


def test_values_are_as_high_as_their_share_of_the_bounds():
    assert terminal.plot([1, 2, 3], [0.0, 0.5, 1.0], (1, 3), (0.0, 1.0), (3, 1)) == ["▁▅█"]
    assert terminal.plot([1, 3], [0.0, 1.0], (1, 4), (0.0, 1.0), (3, 2)) == ["  █", "▁▁█"]
    assert terminal.plot([1, 2], [math.nan, 7.0], (1, 2), (7.0, 7.0), (2, 1), terminal.ASCII) == [
        " +"
    ]


def test_a_column_shows_the_mean_of_its_steps_and_repeats_until_the_next():
    assert terminal.plot(range(8), [0.0, 1.0] * 4, (0, 7), (0.0, 1.0), (2, 1)) == ["▅▅"]
    assert terminal.plot([0, 9], [1.0, 0.0], (0, 9), (0.0, 1.0), (10, 1)) == ["█████████▁"]


@pytest.mark.parametrize("columns", ["20", "300"])
def test_any_width_will_do(tmp_path, capfd, monkeypatch, columns):
    run = read(write(tmp_path / "run.jsonl", start(), step(1), step(2)))
    monkeypatch.setenv("COLUMNS", columns)
    terminal.show([run, run])
    assert "█" in capfd.readouterr().out
