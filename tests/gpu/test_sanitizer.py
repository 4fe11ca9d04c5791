"""The compiled kernels on a GPU under compute-sanitizer: `make gpu PART=sanitize`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from gpu_runs import NEEDS_GPU
from paths import ROOT

from peftkern.backends.cuda.module import refusal_device

SECONDS = 240  # of one tool
CALLS = " or ".join(("values", "norms", "codec", "layouts", "importance", "svd_shapes", "products"))


def sanitizer() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes if home]
    folders += [f"{home}/compute-sanitizer" for home in homes if home]
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


pytestmark = [
    *NEEDS_GPU,
    pytest.mark.slow,
    pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not on this machine"),
]


def watched(tool: str, *command: str) -> str:
    """What the command printed, in which the tool found nothing; every tensor is an allocation of
    its own, so that a byte beyond its end belongs to nobody."""
    process = subprocess.Popen(
        [sanitizer(), "--tool", tool, "--error-exitcode", "86", sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it watches outlives it
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-4000:]
    nothing = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert nothing in said, said[-4000:]
    return said


@pytest.mark.skipif(
    torch.cuda.is_available() and refusal_device(torch.device("cuda")) is not None,
    reason="the CUDA kernels are not built",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_cuda_kernels(tool):
    assert "every kernel ran" in watched(tool, "tests/support/cuda_sanitizer_cases.py")


def test_triton_kernels():
    files = [f"tests/gpu/test_{name}.py" for name in ("lora_linear", "dora", "adalora", "rosa")]
    options = ["-q", "-x", "-p", "no:xdist", "-m", "gpu and not slow", "-k", CALLS]
    assert " passed" in watched("memcheck", "-m", "pytest", *options, *files)
