"""The table of reasons is the code's: every reason and warning has a row, every row is said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from peftkern.backends.reasons import TABLE, WARNINGS, cure

FOLDERS = ("peftkern/backends", "kernels", "peftkern/integrations")
# Functions there that return other words, or parts of a reason.
NO_REASONS = {
    *("_driver", "_effect", "_first_line", "_meant", "accepted", "chosen", "cure", "fastest"),
    *("forced_backend", "installed_version", "kept_forward", "layer_of", "nearest", "serving"),
    *("_cpu_field", "_wrong"),
}
JUDGES = {"correctness.py", "error_rule.py", "grouped_correctness.py"}  # say how a result is wrong
TARGETS = {
    "reason",
    "demoted",
    "skipped[]",
    "found[]",
    "NOT_SEEN",
    "UNMEASURED",
    "IN_FLIGHT",
}  # what gets one
CALLS = {  # which argument is one
    "Fallback": 0,
    "WrongPartsError": 0,
    "record_fallback": 1,
    "demote": 1,
}
ASSEMBLED = {"{}: {}", "{}{}", ""}  # a back end and its reason, an error and its cure
ERRORS = ("ArgumentError", "RepackedWeightError")
OF_ERRORS = {"{argument}", "{name}Error", "quant_state"}  # rows for errors that are caught


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def texts(node: ast.expr | None) -> Iterator[str]:
    """Strings that an expression may be, {} for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        yield "".join(map(str, parts))
    elif isinstance(node, ast.IfExp):
        yield from (*texts(node.body), *texts(node.orelse))
    elif isinstance(node, (ast.BoolOp, ast.Tuple)):
        for value in node.values if isinstance(node, ast.BoolOp) else node.elts:
            yield from texts(value)


def last_name(node: ast.expr) -> str:
    """`reason` of reason, self.reason and reason[name]."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return getattr(node, "attr", getattr(node, "id", ""))


def into(node: ast.expr) -> str:
    return last_name(node) + "[]" * isinstance(node, ast.Subscript)


def reasons(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every reason that a module may say."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            if "str | None" in ast.unparse(node.returns) and node.name not in NO_REASONS:
                for found in ast.walk(node):
                    if isinstance(found, ast.Return):
                        yield from ((found.lineno, text) for text in texts(found.value))
        elif isinstance(node, ast.Assign) and into(node.targets[0]) in TARGETS:
            yield from ((node.lineno, text) for text in texts(node.value))
        elif isinstance(node, ast.Call) and last_name(node.func) in CALLS:
            which = CALLS[last_name(node.func)]
            if len(node.args) > which:
                yield from ((node.lineno, text) for text in texts(node.args[which]))


def said(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every warning that a module gives, or writes to the log."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            yield from ((node.lineno, text) for text in texts(node.args[0]))
        elif isinstance(node, ast.Assign) and last_name(node.targets[0]) in ("told", "said"):
            yield from ((node.lineno, text) for text in texts(node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "report.warnings.append":
            yield from ((node.lineno, text) for text in texts(node.args[0]))


def template(key: str) -> str:
    return re.sub(r"\{\w+\}", "{}", key)


def compare(rows: list[str], found: dict[str, str]) -> None:
    known = {template(row) for row in rows}
    assert len(known) == len(rows), "two rows for one reason"
    missing = {text: place for text, place in found.items() if text not in known}
    assert missing == {}, "without a row in peftkern/backends/reasons.py"
    assert known - set(found) == set(), "rows that nothing says any more"


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_reason_has_a_cure_and_every_row_a_reason() -> None:
    found = {}
    for path in files(*FOLDERS):
        if path.name in JUDGES or path.name == "reasons.py":
            continue
        for line, text in reasons(ast.parse(path.read_text(encoding="utf-8"))):
            found[text] = place(path, line)
    found = {text: where for text, where in found.items() if text not in ASSEMBLED}
    rows = [row for group in TABLE.values() for row in group]
    of_errors = [row for row in rows if row.partition(":")[0] in OF_ERRORS]
    compare([row for row in rows if row not in of_errors], found)
    assert len(of_errors) == len(OF_ERRORS)


def test_every_warning_has_a_cure_and_every_row_a_warning() -> None:
    found = {}
    for path in files("peftkern"):
        if {"tools", "cli", "packages.py"} & set(path.relative_to(ROOT).parts):
            continue  # of the command line, and an error
        for line, text in said(ast.parse(path.read_text(encoding="utf-8"))):
            if text.strip("{} "):
                found[text] = place(path, line)
    compare(list(WARNINGS), found)


def test_what_an_argument_is_refused_with_has_a_cure() -> None:
    """An ArgumentError becomes a fallback, without what came."""
    count = 0
    for path in files("peftkern/functional", "peftkern/formats"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and last_name(node.func) in ERRORS:
                for text in texts(node.args[0]):
                    count += 1
                    reason = text.format(*["x"] * text.count("{}")).partition(", got ")[0]
                    assert cure(reason) is not None, place(path, node.lineno)
    assert count > 5


@pytest.mark.parametrize("row", [row for group in TABLE.values() for row in group])
def test_a_reason_finds_its_own_row(row: str) -> None:
    reason = re.sub(r"\{\w+\}", "x", row)
    (own,) = (group[row] for group in TABLE.values() if row in group)
    assert cure(reason) == own
    assert cure(f"triton: {reason}") == own


def test_a_reason_that_nobody_gives_has_no_cure() -> None:
    assert cure("nothing of that kind") is None
