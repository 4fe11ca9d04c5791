"""`peftkern bench` in a process, on shapes that take seconds."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import ROOT, SUPPORT
from tolerances import HANG_SECONDS

TINY = ["--device=cpu", "--threads=1", "--shapes=24x64x128", "--r=4", "--seconds=0.1"]
BUDGET = 600.0  # seconds: seven processes import on one core, which others may use as well


def environment() -> dict[str, str]:
    """A user's: without Triton's interpreter, and finding the package as it is here."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COLUMNS")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}


def bench(*arguments: str, columns: int | None = None) -> subprocess.CompletedProcess:
    more = {} if columns is None else {"COLUMNS": str(columns)}
    return subprocess.run(
        [sys.executable, "-m", "peftkern", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=SUPPORT,  # where bench_providers is
        env={**environment(), **more},
        timeout=HANG_SECONDS,
    )
