"""Peak memory of a call in this process.

Only what the system has to give is seen: tensors of a megabyte or more always, smaller ones where
the allocator has kept nothing that fits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")
_LIBC = ctypes.CDLL(None)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt
# What it takes by itself once a process has freed tensors of 32 MB.
_LARGEST = 32 << 20


def growth(call: Callable[[], object]) -> int:
    """Return the bytes that a call takes at its peak, above what is resident before.

    Each tensor of a megabyte is mapped and unmapped by itself meanwhile: what glibc keeps else, and
    where it finds no place for the next one, depends on all that came before and on the threads.
    """
    _LIBC.mallopt(_MMAP_THRESHOLD, 1 << 20)
    _LIBC.malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak is what is resident now
        before = _status("VmHWM")
        assert before - _status("VmRSS") < 32 << 20
        call()
        return _status("VmHWM") - before
    finally:
        _LIBC.mallopt(_MMAP_THRESHOLD, _LARGEST)
        _LIBC.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def _status(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
