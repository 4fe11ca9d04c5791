"""Files of safetensors written piece by piece, at the places that a header gives them.

safetensors' own writer takes all tensors of a file at once. Here the header comes first, since
shapes alone decide it, and threads fill in the rest in any order.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.tools.checkpoints.checkpoint import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPIED_AT_ONCE = 1 << 24  # so that Ctrl-C, and the bar, do not wait for a whole table
_ALIGNMENT = 8  # of the data, as safetensors writes it
_START_WRITING = 2  # Linux's SYNC_FILE_RANGE_WRITE


class CutOff(OSError):
    """End of a source before the bytes that its header promises."""


@dataclass(frozen=True)
class Slot:
    """A tensor of a file to be written, and where it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(slots: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, list[Slot]]:
    """Return a file's header, with the eight bytes of its length, and its tensors at their places.

    Wider dtypes come first, as safetensors has it, so that every tensor is aligned; those of one
    width stay in their order.
    """
    ordered = sorted(slots, key=lambda slot: -slot.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for slot in ordered:
        end = begin + slot.nbytes
        entry = {"dtype": DTYPE_NAMES[slot.dtype], "shape": list(slot.shape)}
        entries[slot.name] = {**entry, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    placed, begin = [], len(header)
    for slot in ordered:
        placed.append(Slot(slot.name, slot.dtype, slot.shape, begin))
        begin += slot.nbytes
    return header, placed


def read_into(file: int, tensor: Tensor, offset: int) -> None:
    """Fill a contiguous tensor from an open file.

    Raises: CutOff if the file ends before that; OSError.
    """
    data = _bytes(tensor)
    while data:
        count = os.preadv(file, [data], offset)
        if not count:
            raise CutOff("cut off")
        data, offset = data[count:], offset + count


def write_from(file: int, tensor: Tensor, offset: int) -> None:
    """Write a contiguous tensor to an open file."""
    data = _bytes(tensor)
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def start_writeback(file: int, offset: int, count: int) -> None:
    """Ask the kernel to begin to write bytes of an open file to the disk, so that fsync waits less.

    A hint: nothing happens where there is no such call. An error of the disk is fsync's to report.
    """
    if (call := _sync_file_range()) is not None:
        call(file, offset, count, _START_WRITING)


@functools.cache
def _sync_file_range() -> Any:
    """Return the function of the C library, which `os` lacks."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def copy_range(source: int, target: int, start: int, offset: int, count: int) -> None:
    """Copy bytes between open files, within the kernel where that can do it.

    Raises: CutOff if the source ends before that; OSError, also for a full disk.
    """
    while count:
        most = min(count, _COPIED_AT_ONCE)
        try:
            done = os.copy_file_range(source, target, most, start, offset)
        except (AttributeError, OSError):  # another file system, or none of Linux
            done = os.pwrite(target, os.pread(source, most, start), offset)
        if not done:
            raise CutOff("cut off")
        start, offset, count = start + done, offset + done, count - done


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
