"""The command line as a user meets it: real processes, their output, their exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peftkern

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "peftkern", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_version_is_the_package_s():
    done = run("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{peftkern.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["version", "--loud"], "No such option: --loud"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, complaint):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_is_shown_when_asked_and_when_nothing_is():
    asked, nothing = run("--help"), run()
    assert asked.returncode == 0
    assert "version" in asked.stdout
    assert nothing.returncode == 2
    assert "version" in nothing.stdout + nothing.stderr
