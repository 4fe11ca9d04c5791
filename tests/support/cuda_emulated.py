"""The CUDA kernels compiled for a CPU (csrc/tests/cuda_emulation.h), built when first asked for."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import sysconfig
from types import ModuleType

from paths import ROOT


@functools.cache
def load() -> ModuleType:
    """Bring the module up to date and import it.

    Raises: RuntimeError with what the build says if that fails.
    """
    answer = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "cuda_emulated"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        raise RuntimeError(answer.stdout + answer.stderr)
    path = ROOT / "build" / sysconfig.get_config_var("SOABI") / "_cuda_emulated.so"
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
