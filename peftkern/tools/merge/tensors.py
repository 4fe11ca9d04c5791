"""Panels and whole tensors of a merge: what one job of the writer computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.tools.checkpoints.checkpoint import CheckpointError
from peftkern.tools.merge.arithmetic import (
    Added,
    Buffers,
    Change,
    added_to,
    in_panels,
    is_finite,
    measure,
    merge_rows,
    merge_whole,
)
from peftkern.tools.merge.edits import Edit
from peftkern.tools.merge.placement import Place
from peftkern.tools.merge.plan import Unit

_PANEL = 1 << 17  # values: two buffers of float32 and one of 16 bits are 1.3 MB
_FEWEST_ROWS = 16  # a product with fewer rows is summed in another order by some libraries
_MEASURED = 32  # of the panels of a merged tensor, one of so many is compared
_COMPARED = 8  # likewise of one that is in other 4 bits than before, and not merged


class Block(NamedTuple):
    """Rows of a stored matrix that are computed alike; place and edit None: they stay."""

    at: int
    rows: int
    place: Place | None = None
    edit: Edit | None = None
    expert: int | None = None


class Panel(NamedTuple):
    """Rows of a block; measured: rounding is compared there."""

    unit: Unit
    block: Block
    added: Added | None
    first: int
    last: int
    measured: bool

    @property
    def start(self) -> int:
        """Number of its first row in the stored matrix."""
        return self.block.at + self.first


def panels(unit: Unit) -> Iterator[Panel]:
    """Cut a stored matrix, its last dimension the columns, into panels of about one size."""
    columns, merged = unit.weight.shape[-1], 0
    for block in _blocks(unit):
        added = None
        if block.edit is not None:
            added = added_to(block.edit, block.place, block.expert)
        count = max(math.ceil(block.rows * columns / _PANEL), 1)
        step = max(math.ceil(block.rows / count), _FEWEST_ROWS)
        last = 0
        while last < block.rows:
            first, last = last, last + step
            if block.rows - last < _FEWEST_ROWS:
                last = block.rows  # too few rows for a panel of their own
            measured = added is not None and merged % _MEASURED == 0
            yield Panel(unit, block, added, first, last, measured)
            merged += added is not None


def _blocks(unit: Unit) -> Iterator[Block]:
    """Yield the rows of all edits, and those between, in their order."""
    shape, begin = unit.weight.shape, 0
    blocks = []
    for place, edit in unit.edits:
        if len(shape) == 3 and place.expert is None:
            size = shape[1]
            blocks += [Block(e * size, size, place, edit, e) for e in range(shape[0])]
        else:
            blocks.append(Block(place.at, place.rows, place, edit, place.expert))
    end = Block(math.prod(shape[:-1]), 0)
    for block in (*sorted(blocks, key=lambda block: block.at), end):
        if block.at > begin:
            yield Block(begin, block.at - begin)
        if block.rows:
            yield block
        begin = block.at + block.rows


def merged_panel(
    panel: Panel, rows: Tensor, dtype: torch.dtype, buffers: Buffers
) -> tuple[Tensor, Change | None]:
    """Return a panel as it is to be stored, and its change: only its size, if not measured."""
    if panel.added is None:
        if rows.dtype is dtype:
            return rows, None
        stored = buffers.take("result", rows.shape, dtype).copy_(rows)
        _check_cast(panel.unit, rows.dtype, stored)
        return stored, None
    total, stored = merge_rows(rows, panel.first, panel.added, dtype, buffers)
    _check_finite(panel.unit, stored)
    if not panel.measured:
        return stored, Change(merged=rows.numel())
    return stored, measure(rows, total, stored)


def merged_tensor(unit: Unit, weight: Tensor, buffers: Buffers) -> tuple[Tensor, Change | None]:
    """Return a weight in memory with its edits, in the unit's dtype, and its change."""
    dtype = unit.dtype
    if not unit.edits:
        stored = weight.to(dtype)
        _check_cast(unit, weight.dtype, stored)
        return stored, None
    if weight.dim() > 1 and all(in_panels(edit, place) for place, edit in unit.edits):
        merged, change = torch.empty(weight.shape, dtype=dtype), Change()
        rows, results = (t.view(-1, weight.shape[-1]) for t in (weight, merged))
        for panel in panels(unit):
            own = slice(panel.start, panel.block.at + panel.last)
            stored, changed = merged_panel(panel, rows[own], dtype, buffers)
            results[own] = stored
            change += changed or Change()
        return merged, change
    merged, changes = weight.to(dtype, copy=True), []
    for place, edit in unit.edits:
        own = slice(place.at, place.at + place.rows) if weight.dim() else ...
        before = weight[own] if edit.value is None else edit.value.to(weight.dtype)
        total, part = merge_whole(before, edit, dtype)
        _check_finite(unit, part)
        if part.shape == merged[own].shape:
            merged[own] = part
        else:  # a table of another size
            merged = part
        if edit.updates:
            changes.append(measure(before, total, part))
    _check_cast(unit, weight.dtype, merged)
    return merged, sum(changes, Change()) if changes else None


def _check_cast(unit: Unit, before: torch.dtype, stored: Tensor) -> None:
    """Check what a dtype of a smaller range holds of values that no adapter changes."""
    if stored.dtype is not before and torch.finfo(stored.dtype).max < torch.finfo(before).max:
        _check_finite(unit, stored)


def _check_finite(unit: Unit, stored: Tensor) -> None:
    if not is_finite(stored):
        raise CheckpointError(f"{unit.name}: holds NaN or infinity as it is to be written")


def rounded_as_trained(unit: Unit, weight: Tensor) -> Tensor:
    """Return the values that the base had when the adapter was trained."""
    if unit.trained is None:
        return weight
    if unit.transposed:
        return unit.trained.round(weight.T.contiguous()).T.contiguous()
    return unit.trained.round(weight)


def measure_stored(weight: Tensor, merged: Tensor, stored: Tensor, alone: Tensor) -> Change:
    """Compare a weight before, merged, as it is stored, and as it would be without an update."""
    step, change = max(_PANEL // weight.shape[-1], 1), Change()
    parts = (tensor.split(step) for tensor in (weight, merged, stored, alone))
    for before, total, after, plain in zip(*parts, strict=True):
        change += measure(before, total.float(), after, plain)
    return change


def measure_lost(weight: Tensor, stored: Tensor) -> Change:
    """Compare a weight that no update changes with what is stored of it, in one panel of several:
    the rest would take longer than quantizing it."""
    step = max(_PANEL // weight.shape[-1], 1)
    found = [one.split(step)[::_COMPARED] for one in (weight, stored)]
    pairs = zip(*found, strict=True)
    change = sum((measure(w, w.float(), after, after) for w, after in pairs), Change())
    return change._replace(merged=weight.numel())
