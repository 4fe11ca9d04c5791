"""Tables and lines of the commands show a user's names as they are."""

from __future__ import annotations

import pytest

from peftkern.tools import tables

HOSTILE = "layers[0].:smile:[/bold] [red]proj 1.5"


@pytest.mark.parametrize("whole", [0, 1])
def test_a_name_s_brackets_and_colons_stand(whole, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    console = tables.console()
    tables.section(console, HOSTILE, tables.table("module", "", rows=[(HOSTILE, "2")], whole=whole))
    tables.say(console, f"{HOSTILE} {'word ' * 20}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == HOSTILE and lines[3].split("  ") == [HOSTILE, "2"]
    assert lines[4].startswith(HOSTILE) and len(lines) == 6
    assert not any(line.endswith(" ") for line in lines[4:])


def test_narrow_terminals_break_words_rather_than_lose_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    tables.console().print(tables.table("module", rows=[("abcdefghij" * 4,)], whole=1))
    assert "".join(capsys.readouterr().out.split()) == "module" + "abcdefghij" * 4


def test_numbers_come_closer_before_a_word_breaks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    for width in (7, 8, 9):
        table = tables.table("a" * width, "energy", "abc", rows=[("b", "1.5%", "7")], numbers=True)
        tables.show(tables.console(), table)
    heads = capsys.readouterr().out.splitlines()[::2]
    assert [head.strip("a") for head in heads] == ["  energy  abc", " energy abc", " energy abc"]
