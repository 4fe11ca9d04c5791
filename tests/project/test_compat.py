"""The compatibility matrix: its checks hold here, and its table keeps the rows that did not run."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from paths import TESTS


def script(name: str) -> ModuleType:
    path = TESTS / "compat" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"compat_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return script("matrix")


def test_checks_hold_here(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check = script("check")
    assert check.main() == 0, capsys.readouterr().out
    first, *lines = capsys.readouterr().out.splitlines()
    assert set(json.loads(first)) == {"python", *check.VERSIONS}
    assert {f"{name}: ok" for name in check.CHECKS} <= set(lines)


def test_check_that_fails_is_told_in_one_line(capsys, monkeypatch):
    check = script("check")

    def fail() -> None:
        raise ValueError("the first line\nand others")

    monkeypatch.setattr(check, "CHECKS", {"this": fail, "that": lambda: None})
    assert check.main() == 1
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == ["this: ValueError: the first line", "that: ok"]


def test_table_keeps_what_was_not_run_again(matrix, tmp_path, monkeypatch):
    one, other, *_ = matrix.ROWS
    monkeypatch.setattr(matrix, "find_wheel", lambda folder, python: folder / "a.whl")
    monkeypatch.setattr(matrix, "answer_of", lambda row, wheel, folder: "ok")
    out = tmp_path / "results.md"
    assert matrix.main(["--row", str(one), "--out", str(out)]) == 0
    monkeypatch.setattr(matrix, "answer_of", lambda row, wheel, folder: "a | b")
    assert matrix.main(["--row", str(other), "--out", str(out)]) == 1
    results = {key: result for key, (result, _) in matrix.read_table(out).items()}
    assert list(results) == [tuple(matrix.cells(row)) for row in matrix.ROWS]
    assert list(results.values()) == ["ok", "a / b", *["not run yet"] * (len(matrix.ROWS) - 2)]


def test_table_in_the_documents_has_the_rows_of_the_script(matrix):
    found = matrix.read_table(matrix.TABLE)
    assert matrix.TABLE.read_text(encoding="utf-8") == matrix.table_text(found)


def test_row_without_its_wheel_says_how_to_build_it(matrix, tmp_path):
    with pytest.raises(SystemExit, match=r"no wheel in .*: ci/wheels.sh python3.10"):
        matrix.find_wheel(tmp_path, "3.10")
