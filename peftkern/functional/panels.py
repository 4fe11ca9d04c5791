"""Panels of rows of a weight in float32, decoded one at a time: the matrix is never dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.reference.nf4 import nf4_absmax
from peftkern.formats.nf4 import NF4Weight

_ON_CPU = 1 << 21  # values of a panel: 8 MB, which stay in cache between two products
_ELSEWHERE = 1 << 25  # fewer launches, 128 MB


class Panels:
    """The matrix scale * (weight - minus) [m, n] by panels of rows.

    Each is a dense tensor of any dtype or an NF4Weight; the difference is taken in float32. Panels
    begin where a block of `blocksize` values does.
    """

    def __init__(
        self, weight: Tensor | NF4Weight, minus: Tensor | NF4Weight | None, blocksize: int = 1
    ) -> None:
        self.m, self.n = weight.shape
        self.device, self.scale = weight.device, 1.0
        self._parts = [_Rows(part) for part in (weight, minus) if part is not None]
        steps = [part.step for part in self._parts]
        step = math.lcm(*steps, blocksize // math.gcd(blocksize, self.n))
        size = _ON_CPU if self.device.type == "cpu" else _ELSEWHERE
        self.rows = max(1, size // max(1, step * self.n)) * step
        self._buffers: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their values, which the next panel may overwrite."""
        for start in range(0, self.m, self.rows):
            yield self.at(start)

    def at(self, start: int, own: int = 0) -> tuple[slice, Tensor]:
        """Return the panel that begins at a row, in the `own`-th buffer if it is no view."""
        rows = slice(start, min(start + self.rows, self.m))
        first, *minus = self._parts
        panel = first.read(rows, self._buffer, 2 * own)
        for part in minus:
            values = part.read(rows, self._buffer, 2 * own + 1)
            panel = torch.sub(panel, values, out=self._buffer(2 * own, rows))
        if self.scale != 1.0:
            panel = torch.mul(panel, self.scale, out=self._buffer(2 * own, rows))
        return rows, panel

    def _buffer(self, index: int, rows: slice) -> Tensor:
        while len(self._buffers) <= index:
            shape = (min(self.rows, self.m), self.n)
            self._buffers.append(torch.empty(shape, dtype=torch.float32, device=self.device))
        return self._buffers[index][: rows.stop - rows.start]


class _Rows:
    """Rows of one weight, from a multiple of `step` on."""

    def __init__(self, weight: Tensor | NF4Weight) -> None:
        self.step = 1
        if isinstance(weight, NF4Weight):
            self._absmax = nf4_absmax(weight.tensors, weight.layout)
            self.step = weight.blocksize // math.gcd(weight.blocksize, weight.shape[1])
            self._weight = weight
        else:
            self._weight = weight.detach()

    def read(self, rows: slice, buffer: Callable[[int, slice], Tensor], index: int) -> Tensor:
        """Return rows in float32: a view of a weight that is, else what a buffer then holds."""
        weight = self._weight
        if isinstance(weight, Tensor):
            values = weight[rows]
            if values.dtype is torch.float32:
                return values
            return buffer(index, rows).copy_(values)
        (_, n), blocksize, out = weight.shape, weight.blocksize, buffer(index, rows)
        first, last = rows.start * n, rows.stop * n
        packed = weight.packed[first // 2 : (last + 1) // 2]
        absmax = self._absmax[first // blocksize : -(-last // blocksize)]
        layout = (weight.layout[0], blocksize, 0, rows.stop - rows.start, n)
        ops.nf4_dequantize_out((packed, absmax), layout, out)
        return out
