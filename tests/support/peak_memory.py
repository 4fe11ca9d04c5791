"""Peak memory of a call in this process, and the largest tensor that is made in it.

Only what the system has to give is seen: tensors of a megabyte or more always, smaller ones where
the allocator has kept nothing that fits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LargestTensor(TorchDispatchMode):
    """Counts the values of the largest tensor that any op makes, views apart.

    floating: of tensors of floats alone.
    """

    def __init__(self, floating: bool = False) -> None:
        super().__init__()
        self.numel, self._floating = 0, floating

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(one.alias_info is not None for one in func._schema.returns):
            tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            counted = (t.numel() for t in tensors if t.is_floating_point() or not self._floating)
            self.numel = max(self.numel, *counted, 0)
        return result
