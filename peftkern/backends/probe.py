"""Probe of Triton: one tiny kernel compiled, launched, awaited and compared, once per device.

Triton needs a C compiler, Python's headers, the driver's library and a writable cache folder when a
kernel first runs; a training under PEFT alone needs none of them. What the probe meets becomes the
reason for which dispatch passes Triton by.
"""

from __future__ import annotations

import importlib
import warnings

import torch

from peftkern.backends import reference, trust
from peftkern.backends.programs import capturing

_NUMEL = 256
# Words of an error, and what helps.
_CURES = (
    ("failed to find c compiler", "install gcc, or set CC"),
    ("no such file or directory: 'gcc'", "install gcc, or set CC"),
    ("python.h", "install Python's headers (python3-dev, python3-devel)"),
    ("libcuda", "put the folder of libcuda.so.1 into LD_LIBRARY_PATH, or run ldconfig"),
    ("ptxas", "install a newer triton, or set TRITON_PTXAS_PATH"),
    ("permission denied", "set TRITON_CACHE_DIR to a folder that can be written"),
    ("read-only file system", "set TRITON_CACHE_DIR to a folder that can be written"),
    ("operation not permitted", "set TRITON_CACHE_DIR to a folder from which programs may run"),
)


_found: dict[torch.device, str | None] = {}
trust.on_reset(_found.clear)


def triton_failure(device: torch.device) -> str | None:
    """Return why Triton's kernels do not run on a GPU, or None; what they do is asked once."""
    if device.type != "cuda" or trust.mode() == "always":
        return None
    if device not in _found:
        if capturing(device):
            return "Triton was not tried before this graph was captured"
        with trust.ledger(device).first_launch(f"probe of triton on {device}"):
            reason = trust.ledger(device).programs.get(f"probe of triton on {device}")
            _found[device] = reason = reason or attempt(device)
        if reason is not None:
            warnings.warn(
                f"peftkern: Triton's kernels do not serve {device}: {reason}. PEFT's own forward, "
                "or plain torch, serves instead.",
                trust.Distrusted,
                stacklevel=2,
            )
    return _found[device]


def attempt(device: torch.device) -> str | None:
    """Dequantize a small weight by Triton's kernel; return cause and cure if that fails."""
    try:
        run = importlib.import_module("peftkern.kernels.nf4").nf4_dequantize
        packed = torch.arange(_NUMEL // 2, device=device, dtype=torch.uint8)
        absmax = torch.arange(1, 1 + _NUMEL // 64, device=device, dtype=torch.float32)
        w, layout = [packed, absmax], [0, 64, 0, _NUMEL // 64, 64]
        got = run(w, layout, torch.float32)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not torch.equal(got, reference.nf4_dequantize(w, layout, torch.float32)):
            return "the result of a test kernel is wrong"
    except Exception as error:  # whatever a compiler, a loader or a driver raises
        return f"{_first_line(error)}{cure(error)}"
    return None


def cure(error: BaseException) -> str:
    """Return what helps against an error, as the end of a sentence; nothing if that is unknown."""
    text = f"{type(error).__name__}: {error}".lower()
    return next((f" ({do})" for words, do in _CURES if words in text), "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
