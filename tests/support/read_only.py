"""A file system that nobody writes to, root neither: the kernel's Landlock, for one process."""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, of every processor alike
_VERSION, _BENEATH, _NO_NEW_PRIVILEGES = 1, 1, 38
_WRITES = 0b1_1111_1111_0010  # of version 1: to write to, make or remove a file, folder or link
_libc = ctypes.CDLL(None, use_errno=True)


def available() -> bool:
    """Return whether this kernel has Landlock, and whoever runs this process allows it."""
    return _libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION) > 0


def refuse_writes(*but: str) -> None:
    """Refuse all writes of this thread, and of what it starts, but those into some folders."""
    rules = _libc.syscall(_CREATE, struct.pack("Q", _WRITES), ctypes.c_size_t(8), 0)
    for path in but:
        folder = os.open(path, os.O_PATH)
        _succeed(_libc.syscall(_ADD, rules, _BENEATH, struct.pack("=Qi", _WRITES, folder), 0))
        os.close(folder)
    _succeed(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _succeed(_libc.syscall(_RESTRICT, rules, 0))
    os.close(rules)


def _succeed(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
