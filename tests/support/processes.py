"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import ROOT, SUPPORT
from tolerances import HANG_SECONDS


def run_code(code: str, *arguments: object, **environment: str) -> str:
    """Run code that finds the package and tests/support; what it prints, if it ends well."""
    path = os.pathsep.join([str(SUPPORT), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
