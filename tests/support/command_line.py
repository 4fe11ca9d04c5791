"""`peftkern` as a user runs it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import typer
from processes import run_python

from peftkern.cli import main


def commands_of(app: typer.Typer) -> dict[str, Any]:
    """Return click's commands by name, those of a group as "group command"."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        below = getattr(command, "commands", None)
        found |= {name: command} if below is None else {f"{name} {n}": c for n, c in below.items()}
    return found


def run(*arguments: str) -> subprocess.CompletedProcess:
    return run_python("-m", "peftkern", *arguments)


def told(capfd: pytest.CaptureFixture, *arguments: object, status: int = 0) -> str:
    """What a command prints, run in this process, which has imported already what it needs.

    It ends with this status, and complains of nothing where that is 0; bars of progress, which
    transformers shows, are no complaint.
    """
    capfd.readouterr()
    assert main([*map(str, arguments)]) == status
    out, error = capfd.readouterr()
    complaints = [line for line in error.splitlines() if line.strip() and "%|" not in line]
    assert status or not complaints, error
    return out


def told_json(capfd: pytest.CaptureFixture, *arguments: object, status: int = 0) -> Any:
    return json.loads(told(capfd, *arguments, "--json", status=status))


def refused(capfd: pytest.CaptureFixture, complaint: str, *arguments: object) -> None:
    """Bad input is one line that names it, and status 2."""
    capfd.readouterr()
    assert main([*map(str, arguments)]) == 2
    out, error = capfd.readouterr()
    assert out == "" and complaint in error, (out, error)
    assert error.startswith("peftkern: error: ") and len(error.splitlines()) == 1, error
