"""Writer of a merged file: panels of rows, from file to file, by as many threads as torch uses.

What a panel needs stays in the cache of its core: it is read, added to, rounded and written before
the next one. Bytes that stay are copied within the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.functional import dequantize
from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.functional.panels import full_float32, parallel
from peftkern.methods.low_rank_algebra import best_pair
from peftkern.tools.checkpoints.checkpoint import TensorInfo, unchanged
from peftkern.tools.checkpoints.four_bit import FourBit, state
from peftkern.tools.checkpoints.streaming import (
    CutOff,
    Slot,
    copy_range,
    read_into,
    start_writeback,
    write_from,
)
from peftkern.tools.merge.arithmetic import Buffers, Change
from peftkern.tools.merge.plan import Experts, File, Options, Unit
from peftkern.tools.merge.tensors import (
    Panel,
    measure_lost,
    measure_stored,
    merged_panel,
    merged_tensor,
    panels,
    rounded_as_trained,
)

_RUN = 16  # panels of a job
Progress = Callable[[int, str], None]  # finished bytes of the base, and the tensor


@dataclass
class Written:
    """What a file's report needs: changes of the weights that were merged, or are in other 4 bits
    than before, and residuals: the best updates for what 4 bits have lost of weights."""

    changes: dict[str, Change] = field(default_factory=dict)
    residuals: dict[str, LoraFactors] = field(default_factory=dict)


class _Done(NamedTuple):
    name: str
    nbytes: int
    change: Change | None = None
    residual: LoraFactors | None = None


def write_file(path: Path, file: File, options: Options, progress: Progress) -> Written:
    """Write one file; the caller names it when it is on the disk.

    Raises: CheckpointError for a sum that is not finite, or a base that shrinks; OSError.
    """
    written = Written()
    with ExitStack() as stack:
        target = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
        stack.callback(os.close, target)
        os.ftruncate(target, file.nbytes)
        os.pwrite(target, file.header, 0)
        paths = {info.file for unit in file.units for info in unit.infos}
        sources = {path: stack.enter_context(open(path, "rb")).fileno() for path in paths}
        writer = _Writer(target, sources, options)
        with full_float32(), parallel(torch.device("cpu")) as run:
            for done in run(lambda job: job(), writer.jobs(file)):  # in order, and so their sums
                if done.change is not None:
                    change = written.changes.get(done.name, Change())
                    written.changes[done.name] = change + done.change
                if done.residual is not None:
                    written.residuals[done.name] = done.residual
                progress(done.nbytes, done.name)
        os.fsync(target)
    return written


class _Writer:
    """Jobs of one file, for any thread."""

    def __init__(self, target: int, sources: dict[Path, int], options: Options) -> None:
        self.target, self.sources, self.options = target, sources, options
        self.local = local()

    def jobs(self, file: File) -> Iterator[Callable[[], _Done]]:
        for unit in file.units:
            if isinstance(unit, Experts):
                yield from (partial(self.expert, unit, e) for e in range(len(unit.experts)))
            elif unit.copied:
                for info, slot in zip(unit.weight.infos, unit.slots, strict=True):
                    yield partial(self.copy, unit, info, slot)
            elif unit.streamed:
                found = panels(unit)
                while run := tuple(islice(found, _RUN)):
                    yield partial(self.stream, run)
            else:
                yield partial(self.whole, unit)

    def copy(self, unit: Unit, info: TensorInfo, slot: Slot) -> _Done:
        with unchanged(info.file, (CutOff,)):
            copy_range(self.sources[info.file], self.target, info.offset, slot.offset, info.nbytes)
        start_writeback(self.target, slot.offset, slot.nbytes)
        return _Done(unit.name, info.nbytes)

    def stream(self, run: tuple[Panel, ...]) -> _Done:
        """Merge panels of a weight from file to file."""
        unit, weight, buffers = run[0].unit, run[0].unit.weight, self._buffers()
        columns, slot, source = weight.shape[-1], unit.slots[0], self.sources[weight.info.file]
        begin = end = slot.offset + run[0].start * columns * slot.dtype.itemsize
        nbytes, changes = 0, []
        with unchanged(weight.info.file, (CutOff,)):
            for panel in run:
                rows = buffers.take("rows", (panel.last - panel.first, columns), weight.dtype)
                offset = weight.info.offset + panel.start * columns * weight.dtype.itemsize
                read_into(source, rows, offset)
                stored, change = merged_panel(panel, rows, unit.dtype, buffers)
                write_from(self.target, stored, end)
                nbytes, end = nbytes + rows.nbytes, end + stored.nbytes
                changes += [] if change is None else [change]
        start_writeback(self.target, begin, end - begin)
        return _Done(unit.name, nbytes, sum(changes, Change()) if changes else None)

    def whole(self, unit: Unit) -> _Done:
        """Merge a weight in memory: one that is in 4 bits, or will be, or needs all its rows."""
        weight = rounded_as_trained(unit, unit.weight.read())
        merged, change = merged_tensor(unit, weight, self._buffers())
        if unit.four_bit is None:
            self._write(unit, {unit.name: merged})
            return _Done(unit.name, unit.weight.nbytes, change)
        if unit.transposed:
            weight, merged = weight.T.contiguous(), merged.T.contiguous()
        w = unit.four_bit.quantize(merged)
        self._write(unit, state(unit.name, w))
        if unit.edits:
            alone = weight if _has_values_of(unit, unit.four_bit) else unit.four_bit.round(weight)
            change = measure_stored(weight, merged, dequantize(w), alone)
        elif unit.weight.four_bit is not None:
            change = measure_lost(weight, dequantize(w))
        rank = self.options.residual
        residual = best_pair(merged, rank, minus=w)[0] if rank else None
        return _Done(unit.name, unit.weight.nbytes, change, residual)

    def expert(self, unit: Experts, number: int) -> _Done:
        """Merge one expert, of a stack that is or will be in 4 bits, or was in training."""
        before, merged, nbytes = [], [], 0
        for part in unit.experts[number]:
            before.append(rounded_as_trained(part, part.weight.read()))
            total, change = merged_tensor(part, before[-1], self._buffers())
            merged.append(total)
            nbytes += part.weight.nbytes
        if unit.four_bit is None:
            self._write(unit, {unit.name: total}, number)
            return _Done(unit.name, nbytes, change)
        weight, total = (torch.cat(rows) for rows in (before, merged))
        if unit.stack.transposed:
            weight, total = weight.T.contiguous(), total.T.contiguous()
        shape, turned = (1, *unit.stack.shape[1:]), unit.stack.turned
        stack = unit.four_bit.stack(shape, total.dtype, turned=turned)
        stack.set_expert(0, total)
        self._write(unit, stack.state(unit.name), number)
        first, stored, alone = unit.experts[number][0], stack.dequantize(0), weight
        if not unit.edits:
            decoded = first.weight.four_bit is not None
            return _Done(unit.name, nbytes, measure_lost(weight, stored) if decoded else None)
        if not _has_values_of(first, unit.four_bit):
            stack.set_expert(0, weight)
            alone = stack.dequantize(0)
        return _Done(unit.name, nbytes, measure_stored(weight, total, stored, alone))

    def _write(self, unit: Unit | Experts, tensors: dict[str, Tensor], number: int = 0) -> None:
        """Write the tensors of a weight, or of that expert of a stack."""
        for slot in unit.slots:
            tensor = tensors[slot.name].contiguous()
            offset = slot.offset + number * tensor.nbytes
            write_from(self.target, tensor, offset)
            start_writeback(self.target, offset, tensor.nbytes)

    def _buffers(self) -> Buffers:
        if not hasattr(self.local, "buffers"):
            self.local.buffers = Buffers()
        return self.local.buffers


def _has_values_of(unit: Unit, stored: FourBit) -> bool:
    """Return whether the base, or what it was in training, has values of the 4 bits that are
    written."""
    had = unit.trained or unit.weight.four_bit
    return had is not None and had[:2] == stored[:2]
