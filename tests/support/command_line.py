"""`peftkern` as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT
from tolerances import HANG_SECONDS

from peftkern.cli import main


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "peftkern", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS)


def refused(capfd: pytest.CaptureFixture, complaint: str, *arguments: object) -> None:
    """Bad input is one line that names it, and status 2."""
    capfd.readouterr()
    assert main([*map(str, arguments)]) == 2
    out, error = capfd.readouterr()
    assert out == "" and complaint in error, (out, error)
    assert error.startswith("peftkern: error: ") and len(error.splitlines()) == 1, error
