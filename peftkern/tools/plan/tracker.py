"""Bytes of live tensors: a dispatch mode that sees every storage come and go.

It stands above FakeTensorMode, so nothing is allocated, or over real tensors. Memory that a kernel
takes and gives back within one op is in no tensor; what is known of it is added here: the copies
that a CPU makes of operands of another dtype, the weight that a GPU makes dense for one product.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peftkern.tools.plan.work import work_of

ACTIVATIONS, CHECKPOINTS, LOGITS = "saved activations", "checkpoints", "logits"
GRADIENTS, TEMPORARIES, FIXED = "gradients", "temporaries", "fixed"
GATHERED, BUFFERS = "gathered weights", "communication buffers"  # of several devices
PARTS = (GRADIENTS, ACTIVATIONS, CHECKPOINTS, LOGITS, GATHERED, BUFFERS, TEMPORARIES)
_CUDA_BLOCK = 512  # to which the caching allocator rounds
_aten = torch.ops.aten


class Tracker(TorchDispatchMode):
    """Dispatch mode that sums live storages by part, and keeps the peak of each segment of a step.

    cuda: count as on a GPU. large: elements from which on a tensor outside of the layers is one of
    the logits. `part` is that of new storages, `segment` the key of `peaks`, or its phase and the
    `moment` if there is one, `doing` what the ops are for that are counted in `work`; None, and
    none is.
    """

    def __init__(self, cuda: bool, large: int) -> None:
        super().__init__()
        self.cuda, self.large = cuda, large
        self.part, self.segment, self.in_layer = FIXED, None, False
        self.moment: Any = None
        self.live: Counter[str] = Counter()
        self.work: Counter[tuple[str, int, int]] = Counter()
        self.doing: str | None = None
        self.peaks: dict[Any, dict[str, int]] = {}
        self._before: Any = None  # the last op
        self._storages: dict[int, list] = {}  # {address: [weak reference, bytes, part]}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # no op: most calls ask where a fake tensor is
            return func(*args)
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            # There are no data: all are as they should be, none is below or amiss, a count is 1.
            return self._before not in (_aten.lt, _aten.any)
        if func is _aten.equal.default:
            return True
        self._before = func.overloadpacket
        out = _run(func, args, kwargs)
        if self.doing is not None:
            flops, nbytes = work_of(func, args, kwargs, out)
            if flops or nbytes:
                self.work[self.doing, flops, nbytes] += 1
        scratch = self._scratch(func, args, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if scratch:
            self.live[TEMPORARIES] += scratch
            self._record()
            self.live[TEMPORARIES] -= scratch
        return out

    def enter(self, segment: Any, part: str, in_layer: bool = False) -> None:
        """Begin a segment, or go on with it."""
        self.segment, self.part, self.in_layer = segment, part, in_layer
        self._record()

    def mark(self, moment: Any) -> None:
        """Begin a moment of a phase, which goes on until the next one; None: there are none."""
        self.moment = moment
        self._record()

    @contextlib.contextmanager
    def filed(self, part: str) -> Iterator[None]:
        """Count what is made in here as of that part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def rounded(self, nbytes: int) -> int:
        """Return the bytes that an allocator gives for so many."""
        return -(-nbytes // _CUDA_BLOCK) * _CUDA_BLOCK if self.cuda else nbytes

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        nbytes = storage.nbytes()
        part = self.part
        if part != FIXED:
            nbytes = self.rounded(nbytes)
        if part in (ACTIVATIONS, TEMPORARIES) and not self.in_layer:
            part = LOGITS if tensor.numel() >= self.large else part
        gone = weakref.ref(storage, lambda _: self._free(address))
        self._storages[address] = [gone, nbytes, part]
        self.live[part] += nbytes
        self._record()

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a storage as of another part."""
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[2] != FIXED:
            self.live[entry[2]] -= entry[1]
            self.live[part] += entry[1]
            entry[2] = part

    def _free(self, address: int) -> None:
        _, nbytes, part = self._storages.pop(address)
        self.live[part] -= nbytes

    def _record(self) -> None:
        if self.segment is None:
            return
        key = self.segment if self.moment is None else (self.segment[0], self.moment)
        found = self.peaks.get(key)
        total = sum(self.live[part] for part in PARTS)
        if found is None or total > sum(found.values()):
            self.peaks[key] = {part: self.live[part] for part in PARTS}

    def _scratch(self, func: Any, args: tuple, out: Any) -> int:
        """Return bytes that an op takes and gives back beside its results."""
        if self.cuda:
            return _dense_weight(func, args)
        if torch.Tag.pointwise not in func.tags or not isinstance(out, Tensor):
            return 0
        given = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if len({a.dtype for a in given}) < 2:
            return 0
        common = torch.result_type(*given[:2])
        copied = [a for a in given if a.dtype != common]
        if out.is_floating_point() and out.dtype != common:
            copied.append(out)
        return sum(a.numel() for a in copied) * common.itemsize


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an op; the fake kernel of grouped products takes bf16 alone, other dtypes have a path."""
    if func is not _aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    wide = args[0].dtype
    a, b = (tensor.to(torch.bfloat16) for tensor in args[:2])
    return func(a, b, *args[2:], **{**kwargs, "out_dtype": None}).to(wide)


def _dense_weight(func: Any, args: tuple) -> int:
    """Return bytes of the weight that a GPU makes dense for one product with NF4."""
    if func.namespace != "peftkern" or "nf4_lora_linear" not in str(func):
        return 0
    layout = next(a for a in args if isinstance(a, list) and all(type(n) is int for n in a))
    return layout[3] * layout[4] * args[0].element_size()
