"""The packages of this environment without some of them, for a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from paths import ROOT
from tolerances import HANG_SECONDS

SITE = Path(sysconfig.get_path("purelib"))


def without(folder: Path, *names: str) -> Path:
    """`folder`, new, with a link to each package but those."""
    folder.mkdir()
    for entry in SITE.iterdir():
        if entry.name.split("-")[0] not in names:
            (folder / entry.name).symlink_to(entry)
    return folder


def python(
    site: Path, *arguments: str, folders: tuple[Path, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of `site` alone, peftkern from here or from one of `folders`."""
    path = os.pathsep.join(map(str, [*folders, ROOT, site]))
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=HANG_SECONDS,
    )
