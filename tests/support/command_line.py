"""`peftkern` as a user runs it."""

from __future__ import annotations

import subprocess

import pytest
from processes import run_python

from peftkern.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess:
    return run_python("-m", "peftkern", *arguments)


def refused(capfd: pytest.CaptureFixture, complaint: str, *arguments: object) -> None:
    """Bad input is one line that names it, and status 2."""
    capfd.readouterr()
    assert main([*map(str, arguments)]) == 2
    out, error = capfd.readouterr()
    assert out == "" and complaint in error, (out, error)
    assert error.startswith("peftkern: error: ") and len(error.splitlines()) == 1, error
