"""Panels of rows of a weight in float32, decoded one at a time: the matrix is never dense."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.backends.reference.nf4 import unnested
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.table import cut

_ON_CPU = 1 << 20  # values of a panel: 4 MB
_ELSEWHERE = 1 << 25  # fewer launches, 128 MB
_LEAST = 64  # rows of a panel: beside fewer, x and z are most of what `products` moves
_TASKS, _JOINED = 8, 4  # of `product_slices`: what threads share, and panels of one at most
Item, Found = TypeVar("Item"), TypeVar("Found")
Run = Callable[[Callable[[Item], Found], Iterable[Item]], Iterator[Found]]


class Panels:
    """The matrix scale * (weight - minus) [m, n] by panels of rows.

    Each is a dense tensor or a quantized weight; the difference is taken in float32. Panels
    begin where a block of `blocksize` values does.
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        minus: Tensor | QuantizedWeight | None,
        blocksize: int = 1,
    ) -> None:
        self.m, self.n = weight.shape
        self.device, self.scale = weight.device, 1.0
        self._parts = [_Rows(part) for part in (weight, minus) if part is not None]
        steps = [part.step for part in self._parts]
        step = math.lcm(*steps, blocksize // math.gcd(blocksize, self.n))
        size = _ON_CPU if self.device.type == "cpu" else _ELSEWHERE
        self.rows = max(1, -(-_LEAST // step), size // max(1, step * self.n)) * step
        self._buffers = threading.local()

    @property
    def slices(self) -> list[slice]:
        """Rows of every panel."""
        return [slice(i, min(i + self.rows, self.m)) for i in range(0, self.m, self.rows)]

    @property
    def product_slices(self) -> list[slice]:
        """Rows of every call of `products`: panels joined where none is decoded into memory.

        A call costs 1 ms of processor time beside its products, as much as 150 rows of 4096
        columns with 24 vectors (EPYC with AVX2, November 2026).
        """
        count = -(-self.m // self.rows)
        joined = min(max(count // _TASKS, 1), _JOINED) if self._stored else 1
        rows = joined * self.rows
        return [slice(i, min(i + rows, self.m)) for i in range(0, self.m, rows)]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their panel, one after the other."""
        return ((rows, self.read(rows)) for rows in self.slices)

    def read(self, rows: slice, place: int = 0) -> Tensor:
        """Return a panel, which this thread's next of the same place may overwrite."""
        first, *minus = self._parts
        panel = first.read(rows, self._buffer, 2 * place)
        for part in minus:
            values = part.read(rows, self._buffer, 2 * place + 1)
            panel = torch.sub(panel, values, out=self._buffer(2 * place, rows))
        if self.scale != 1.0:
            panel = torch.mul(panel, self.scale, out=self._buffer(2 * place, rows))
        return panel

    def products(
        self, rows: slice, x: Tensor, need_z: bool, need_squares: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y = x W^T, z = y W and the squared norms of the rows W of a panel.

        z and the squares are empty if they are not needed. What is one weight is multiplied as it
        is stored, if it can be. Rows are one of `product_slices`.
        """
        weight = self._parts[0].stored(rows) if self._stored else (self.read(rows),)
        op = "gram_product" if len(weight) == 1 else "nf4_gram_product"
        return ops.run(op, *weight, x, need_z, need_squares)

    @property
    def _stored(self) -> bool:
        """Whether the matrix is one weight that is multiplied as it is stored."""
        first, *minus = self._parts
        return not minus and self.scale == 1.0 and (first.dense or self.device.type == "cpu")

    def release(self) -> None:
        """Free the buffers of all threads, which the next `read` would make again."""
        self._buffers = threading.local()

    def _buffer(self, index: int, rows: slice) -> Tensor:
        buffers = self._buffers.__dict__
        if index not in buffers:
            shape = (min(self.rows, self.m), self.n)
            buffers[index] = torch.empty(shape, dtype=torch.float32, device=self.device)
        return buffers[index][: rows.stop - rows.start]


class _Rows:
    """Rows of one weight, from a multiple of `step` on."""

    def __init__(self, weight: Tensor | QuantizedWeight) -> None:
        self.step, self.dense = 1, isinstance(weight, Tensor)
        self._weight: Tensor | tuple[Sequence[Tensor], Sequence[int]]
        if isinstance(weight, Tensor):
            self._weight = weight.detach()
        else:
            self._weight = unnested(weight.tensors, weight.layout)
            self.step = weight.blocksize // math.gcd(weight.blocksize, weight.shape[1])

    def stored(self, rows: slice) -> tuple[Any, ...]:
        """Return rows as ops take them: a tensor alone, or the tensors and the layout."""
        weight = self._weight
        if isinstance(weight, Tensor):
            return (weight[rows],)
        _, blocksize, _, _, n = weight[1]
        blocks = slice(rows.start * n // blocksize, -(-rows.stop * n // blocksize))
        return cut(*weight, blocks, (rows.stop - rows.start, n))

    def read(self, rows: slice, buffer: Callable[[int, slice], Tensor], index: int) -> Tensor:
        """Return rows in float32: a view of a weight that is, else what a buffer then holds."""
        found = self.stored(rows)
        if not self.dense:
            out = buffer(index, rows)
            ops.nf4_dequantize_out(*found, out)
            return out
        values = found[0]
        return values if values.dtype is torch.float32 else buffer(index, rows).copy_(values)


_LOCK = threading.Lock()
_precisions: list[tuple[str, ...]] = []  # found by the calls of `full_float32` that go on
_counts: list[int] = []  # of threads, found by those of `parallel`


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 as float32, whatever was set for the speed of a training.

    The setting is the process's: of calls that overlap the last to end restores what the first
    found.
    """
    with _LOCK:
        _precisions.append(_precision())
        _set_precision(("highest",) if len(_precisions[-1]) == 1 else ("ieee", "ieee"))
    try:
        yield
    finally:
        with _LOCK:
            _set_precision(_precisions.pop())


def _precision() -> tuple[str, ...]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8
        return (torch.get_float32_matmul_precision(),)
    backends = (torch.backends.mkldnn, torch.backends.cuda)
    return tuple(backend.matmul.fp32_precision for backend in backends)


def _set_precision(values: tuple[str, ...]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision(values[0])
        return
    for backend, value in zip((torch.backends.mkldnn, torch.backends.cuda), values, strict=True):
        backend.matmul.fp32_precision = value


@contextlib.contextmanager
def parallel(device: torch.device) -> Iterator[Run]:
    """Yield a `map` whose calls run on as many threads as torch has, each of which has one.

    So BLAS and LAPACK give the same bits for any number of threads. A GPU's map is Python's own.
    """
    if device.type != "cpu":
        yield map
        return
    with _LOCK:
        threads = torch.get_num_threads()
        if threads == 1 and _counts:  # a thread that began while another one's call went on
            threads = _counts[0]
        _counts.append(threads)
        torch.set_num_threads(1)  # of this thread, and the default of those that start later
    try:
        if threads == 1:
            yield map
            return
        # A call that ends meanwhile raises that default again.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def run(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
                begun: collections.deque[Future[Found]] = collections.deque()
                for item in items:
                    begun.append(pool.submit(contextvars.copy_context().run, function, item))
                    if len(begun) > 2 * threads:  # results that wait are memory
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()

            yield run
    finally:
        with _LOCK:
            _counts.remove(threads)
            torch.set_num_threads(threads)
