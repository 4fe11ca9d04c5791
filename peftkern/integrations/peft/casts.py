"""One cast of an input that several layers read: q, k and v, gate and up.

`prepare_model_for_kbit_training` leaves float32 between the layers, so each of them casts the same
x to the dtype that it computes in. Casting x [M, K] once saves each further layer 6 M K bytes of
traffic and 2 M K that autograd would keep. Only the data is shared: were the cast one node of the
graph, the gradients of the layers would be added up in the lower precision.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.integrations.peft import trial

# Values of x from which an autograd function in Python is worth what it saves, by count: 25 MB.
GRADIENT_MINIMUM = 1 << 22


class _Cast(NamedTuple):
    """The last cast. `source` is the reference that drops it when x dies: until then no other
    tensor has the id of x.
    """

    key: tuple[Any, ...]
    source: weakref.ref
    data: Tensor
    readers: set[int]  # ids of the layers that have had it


_last: _Cast | None = None  # assigned whole: a race between threads costs a cast


class _Shared(torch.autograd.Function):
    """x.to(dtype) for which the data is there."""

    @staticmethod
    def forward(ctx, x, data):
        ctx.dtype = x.dtype
        return data.detach()

    @staticmethod
    def backward(ctx, dy):
        return dy.to(ctx.dtype), None


def cast(x: Tensor, dtype: torch.dtype, reader: object, *, copy: bool = False) -> Tensor:
    """Return x.to(dtype, copy=copy), on the data of the last call if that had the same x and dtype.

    The data is dropped with x, with the next cast of another tensor, where x was written to since,
    and when a reader that has had it comes again: what writes past autograd's versions (`.data`, a
    buffer of numpy, a collective) does so between two calls of one layer. Autograd sees a cast for
    each call. Copies are shared whatever their size: a first step has one of each layer's input.
    """
    global _last
    if x.dtype is dtype and not copy:
        return x
    graph = x.requires_grad and torch.is_grad_enabled()
    apart = graph and not copy and x.numel() < GRADIENT_MINIMUM
    if apart or not _keeps(x):
        return x.to(dtype=dtype, copy=copy)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0
    key = (id(x), x._version, dtype, stream)
    last = _last
    if last is not None and last.key == key and id(reader) not in last.readers:
        last.readers.add(id(reader))
        return _Shared.apply(x, last.data) if graph else last.data
    result = x.to(dtype=dtype, copy=copy)
    _last = _Cast(key, weakref.ref(x, _drop), result.detach(), {id(reader)})
    return result


def _keeps(x: Tensor) -> bool:
    """Return whether what is computed of x may be used again in a later call.

    Not while operations are recorded, in a graph of CUDA or by a tracer; nor in inference mode,
    whose tensors autograd does not save and which count no versions; nor in a trial, whose layer
    would have nothing to cast but once.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if x.is_inference() or torch.is_inference_mode_enabled() or trial.measuring():
        return False
    return x.is_cpu or (x.is_cuda and not torch.cuda.is_current_stream_capturing())


def _drop(source: weakref.ref) -> None:
    global _last
    last = _last
    if last is not None and last.source is source:
        _last = None
