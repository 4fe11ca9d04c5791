"""Inputs that a model writes to before the backward pass has read them, as `h += layer(h)` does.

A served layer saves x itself, which autograd refuses to read once x was written to. Where PEFT
casts or drops x, it saves what it made of it, and such a model runs. There a layer saves a copy of
its own, too, until a backward pass has shown whether x is written to: if so from then on, if not
never again. x itself is not held beside the copy, so that the first step takes little more memory.

What is known of a layer is kept beside it: no copy, pickle or state dict of the layer has it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.integrations.peft import casts, trial

_PLAIN = (Tensor, nn.Parameter)
_Answer = TypeVar("_Answer")


class _Layer:
    """What is known of a layer's inputs.

    copies: whether it saves copies, None while that is open. read: whether a backward pass has
    reached one of its calls. task: autograd's, in which it was last called; -1 outside of all.
    """

    __slots__ = ("copies", "read", "task")

    def __init__(self) -> None:
        self.copies: bool | None = None
        self.read, self.task = False, -1

    def settle(self) -> None:
        """Save x itself from a call on that follows on a backward pass which found it unwritten.

        A call that computes a forward pass again belongs to the step whose backward pass has begun,
        and what it saves has to be what the first one saved.
        """
        task = torch._C._current_graph_task_id()
        if self.read and (task == -1 or self.task not in (-1, task)):
            self.copies = False
        self.task = task


class _Watch:
    """Hook of a result's gradient that looks whether x was written to since the call."""

    def __init__(self, layer: _Layer, x: Tensor) -> None:
        self.layer, self.version = layer, x._version
        self.x = x.detach()  # has the versions of x
        self.x.data = x.new_empty(0)  # and none of its memory

    def __call__(self, dy: Tensor) -> None:
        self.layer.read = True
        if self.x._version != self.version:
            self.layer.copies = True


_layers: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()


def only_ours_saves(x: Tensor, lora_A: Tensor, dropout_p: float, cast: torch.dtype | None) -> bool:
    """Return whether ours saves x itself for backward where PEFT does not.

    Not under an autocast that casts x (cast: its dtype, None where it is off), which both save.
    """
    if cast is not None and cast is not x.dtype:
        return False
    return dropout_p > 0.0 or lora_A.dtype is not x.dtype or not lora_A.requires_grad


def answered(layer: Any, x: Tensor, compute: Callable[[Tensor], _Answer]) -> _Answer:
    """Return compute(x), or compute of a copy of an x that the model may write to, or does.

    In a graph it always is one, which inductor takes out again where nobody writes to x: what a
    function of autograd has saved is the last value there, whatever was written.
    """
    if not torch.is_grad_enabled():
        return compute(x)
    if torch.compiler.is_compiling():
        return compute(x.clone())
    known = _layers.get(layer)
    if known is None or known.copies is None:
        # Not where operations are recorded; of its own inputs a trial learns nothing.
        if torch._C._len_torch_dispatch_stack() or type(x) not in _PLAIN or trial.measuring():
            return compute(x)
        known = _layers.setdefault(layer, _Layer())
        known.settle()
    if known.copies is False:
        return compute(x)
    copied = casts.cast(x, x.dtype, layer, copy=True)
    if known.copies:
        dispatch.record_fallback(layer.op, "the input is copied, for the model writes to it")
        return compute(copied)
    watch = _Watch(known, x)
    y = compute(copied)
    if isinstance(y, Tensor) and y.requires_grad:
        y.register_hook(watch)
    return y
