"""The compatibility matrix: its checks hold here, and its table keeps the rows that did not run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import ModuleType

import pytest
from paths import ROOT, TESTS


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
    assert lines == [f"{name}: ok" for name in check.CHECKS]


def test_check_that_fails_is_told_in_one_line(capsys, monkeypatch):
    check = script("check")

    def fail() -> None:
        raise ValueError("the first line\nand others")

    def leave() -> None:
        print("what a trainer says")
        raise check.NotServed("too old")

    checks = {"this": fail, "that": lambda: None, "those": leave}
    monkeypatch.setattr(check, "CHECKS", checks)
    assert check.main() == 1
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == ["this: ValueError: the first line", "that: ok", "those: not served: too old"]
    del checks["this"]
    assert check.main() == 0


def test_document_says_since_when_experts_are_served():
    check = script("check")
    fused, frozen = (
        ".".join(map(str, since)) for since in (check.SERVED_SINCE, check.FROZEN_SERVED_SINCE)
    )
    said = f"fused experts are served from {fused} on, frozen ones in 4 bits from {frozen} on"
    assert said in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (("a: ok", "b: absent"), "ok"),
        (("a: ok", "b: not served: old", "c: not served: old"), "ok; experts not served: old"),
        (("a: not served: old", "b: not served: new"), "ok; experts not served: old; new"),
        (("a: not served: old", "b: absent", "c: ValueError: no"), "c: ValueError: no"),
        (("a: ok",), "Segmentation fault"),
    ],
)
def test_answer_of_a_row(matrix, tmp_path, monkeypatch, said, result):
    """Which is what the check printed, unless nothing went wrong."""
    status = 0 if result.startswith("ok") else 1
    error = "" if said[-1].endswith("no") else "Segmentation fault"

    def run(command, folder):
        printed = "".join(f"{line}\n" for line in ('{"torch": "2.8.0"}', *said))
        right = command[1] != matrix.CHECK
        return subprocess.CompletedProcess(command, 0 if right else status, printed, error)

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix.shutil, "which", lambda name: name)
    assert matrix.answer_of(matrix.ROWS[0], tmp_path / "a.whl", tmp_path) == result


def test_row_without_its_wheel_says_how_to_build_it(matrix, tmp_path):
    with pytest.raises(SystemExit, match=r"no wheel in .*: ci/wheels.sh python3.10"):
        matrix.find_wheel(tmp_path, "3.10")
