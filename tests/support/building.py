"""Running build tools, and reading what they make."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

from paths import ROOT

KERNEL_OBJECTS = Path("CMakeFiles", "peftkern_cpu_kernels.dir", "csrc", "cpu")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """With the tools beside this Python, and unless `env` says so without CUDA, which has tests of
    its own: it takes long to compile.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PEFTKERN_CUDA": "0", "PATH": path} | env
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )


def run_checked(*command: str | Path, cwd: Path = ROOT) -> str:
    answer = run(*command, cwd=cwd)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def symbols(path: Path, *options: str) -> list[str]:
    return run_checked("nm", "-C", "--defined-only", *options, path).splitlines()


def libraries(path: Path) -> set[str]:
    return set(re.findall(r"NEEDED\s+(\S+)", run_checked("objdump", "-p", path)))
