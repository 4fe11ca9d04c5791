"""Python in a process of its own: as a user runs it, or with some packages missing."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from paths import ROOT, SUPPORT
from tolerances import HANG_SECONDS

SITE = Path(sysconfig.get_path("purelib"))
OF_TESTS = ("TRITON_INTERPRET", "COLUMNS")  # set for them alone


def environment(**more: str) -> dict[str, str]:
    """A user's, in which the package is found as it is here."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_TESTS}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", **more}


def run_python(
    *arguments: object, cwd: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**more),
        timeout=HANG_SECONDS,
    )


def run_code(code: str, *arguments: object, **more: str) -> str:
    """Run code that finds the package and tests/support; what it prints, if it ends well."""
    path = os.pathsep.join([str(SUPPORT), str(ROOT)])
    done = run_python("-c", code, *arguments, **{"PYTHONPATH": path, **more})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def killed(run: Callable[[], object]) -> bool:
    """Run in a fork of this process, which has imported everything; whether a signal ended it."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        torch.set_num_threads(1)  # OpenMP's threads have not come along
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def without(folder: Path, *names: str) -> Path:
    """`folder`, new, with a link to each package of this environment but those."""
    folder.mkdir()
    for entry in SITE.iterdir():
        if entry.name.split("-")[0] not in names:
            (folder / entry.name).symlink_to(entry)
    return folder


def run_python_over(
    site: Path, *arguments: object, folders: tuple[Path, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """With the packages of `site` alone, and peftkern from here or from one of `folders`."""
    path = os.pathsep.join(map(str, [*folders, ROOT, site]))
    return run_python("-S", *arguments, cwd=site.parent, **{"PYTHONPATH": path, **more})
