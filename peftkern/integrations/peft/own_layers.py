"""The forward of other frameworks' LoRA layers: `serve`'s, over parts that a function reads.

As for PEFT's layers the state is read at each call, and whatever is unusual goes to the forward
that the layer had before, with a counted reason.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import dispatch, trust
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional.arguments import autocast_dtype
from peftkern.integrations.parts import LoRAParts
from peftkern.integrations.peft import casts, read_check, trial, written_inputs
from peftkern.integrations.peft.fallback import (
    GLOBAL_HOOKS,
    Fallback,
    Outlook,
    PatchedForward,
    extra_arguments,
    hooked,
    refused,
    unusual_call,
    unusual_dropout,
    unusual_tensor,
)
from peftkern.integrations.peft.serve import (
    BASE_TYPES,
    BNB_TYPES,
    Adapter,
    frozen_base,
    fused,
    is_slower,
    is_small,
    read_base,
    rows_to_pay,
    unfusable,
)

if BNB_TYPES:
    from peftkern.integrations.peft import bitsandbytes as bnb

UNCHECKED = "_peftkern_unchecked"  # attribute of layers that no check of their parts has seen
SWAPS: dict[type, type] = {}  # {registered class: ours}


class _Weight:
    """A weight and its bias where `read_base` expects a module."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._parameters = {"weight": weight, "bias": bias}


class Remade:
    """Mixin of classes that are made when one is registered: pickle names the original's class."""

    original: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, args, *rest = super().__reduce_ex__(protocol)
        if function is not copyreg.__newobj__:
            return function, args, *rest
        return _made, (self.original, *args[1:]), *rest


def _made(original: type, *args: Any) -> Any:
    """Make an object of the class that serves `original` here, or of itself."""
    kind = SWAPS.get(original, original)
    return kind.__new__(kind, *args)


class OwnLayer(Remade, PatchedForward):
    """Mixin of patched layers of a class that was registered with a function `read`."""

    op = "lora_linear"
    read_parts: Callable[[Any], LoRAParts | str]  # a static method

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if args or not isinstance(self, OwnLayer):
            return PatchedForward.forward(self, *args, **kwargs)
        dispatch.record_fallback(self.op, "input is given by its name")
        return self.original.forward(self, **kwargs)

    def _fused(self, x: Tensor, args: tuple, kwargs: dict, compiling: bool) -> Tensor | Fallback:
        reason = extra_arguments(args, kwargs) if args or kwargs else None
        reason = reason or unusual_call(x, compiling)
        parts = Fallback(reason) if reason is not None else parts_of(self, x.device)
        if isinstance(parts, Fallback):
            return parts
        cast = autocast_dtype(x)
        read = _read(parts, x, cast is not None)
        if isinstance(read, Fallback):
            return read
        dtype, weight, bias = read
        N, K = weight.shape
        four_bit = isinstance(weight, QuantizedWeight)
        small = not four_bit and x.is_cpu and is_small(self, x, N, K)
        if small and (compiling or dispatch.forced_backend() is None):
            return Fallback("small dense product: torch's own operations are as fast")
        adapter = adapter_of(self, parts)
        if adapter is not None:
            reason = unfusable(adapter, x, dtype, cast, True)
        elif not four_bit:
            reason = "no active adapter"
        if reason is not None:
            return Fallback(reason)
        key = _trial_key(self, (N, K), four_bit, adapter, (x.dtype, dtype, cast))
        refusal = trial.refusal(self, x, key, alone=True)
        if refusal is not None:
            return refusal
        base = (casts.cast(x, dtype, self), weight, bias)
        if trust.mode() == "always" and adapter is not None and is_slower(self, adapter, base):
            return Fallback("torch's own operations measured faster for this shape")
        if adapter is not None and base[0] is x and adapter.lora_A.requires_grad:
            p = read_check.dropout_p(parts, self.training)
            if written_inputs.only_ours_saves(x, adapter.lora_A, p, cast):
                return written_inputs.answered(
                    self,
                    x,
                    lambda x: _computed(parts, adapter, (x, *base[1:]), x.dtype, self.training),
                )
        return _computed(parts, adapter, base, x.dtype, self.training)

    def outlook(self) -> Outlook:
        device = next(self.parameters()).device
        parts = parts_of(self, device)
        if isinstance(parts, Fallback):
            return Outlook(device, parts.reason)
        sizes, four_bit = read_check.sizes_of(parts), read_check.is_four_bit(parts)
        adapter = adapter_of(self, parts)
        if adapter is None and not four_bit:
            return Outlook(device, "no active adapter")
        if type(parts.base) in BNB_TYPES:
            reason = bnb.unreadable(parts.base)
            if reason is not None:
                return Outlook(device, reason)
        dense = device.type == "cpu" and not four_bit
        rows = 1
        if dense:
            weight = parts.base.weight if isinstance(parts.base, nn.Module) else parts.base
            rows = rows_to_pay(self, weight, *reversed(sizes))
        return Outlook(device, None, rows, _layer_key(self, sizes, four_bit, adapter))


def parts_of(layer: Any, device: torch.device) -> LoRAParts | Fallback:
    """Read a layer of a registered class whose state our ops express, whatever the input.

    Args: device, of the input.
    """
    for hooks in GLOBAL_HOOKS:
        if hooks:
            return Fallback("global module hooks")
    try:
        parts = read_check.parts(layer, type(layer).read_parts)
    except read_check.WrongPartsError as error:
        return Fallback(str(error))
    if isinstance(parts, str):
        return Fallback(parts)
    base, A, B = parts.base, parts.lora_A, parts.lora_B
    if isinstance(base, nn.Module) and type(base) not in BASE_TYPES:
        return Fallback(f"base is {type(base).__name__}")
    reason = None if A is None else unusual_tensor(lora_A=A, lora_B=B)
    if reason is None and isinstance(parts.dropout, nn.Module):
        reason = unusual_dropout(parts.dropout)
    for part in layer.modules():
        if reason is None and part is not layer:
            reason = hooked(device, **{type(part).__name__: part})
    if reason is None and UNCHECKED in layer.__dict__ and A is not None:
        reason = _check_late(layer)
    return parts if reason is None else Fallback(reason)


def _check_late(layer: Any) -> str | None:
    """Check the parts of a layer that had no adapter to check when it was patched."""
    reason = layer.__dict__[UNCHECKED]
    if reason is None and torch.compiler.is_compiling():
        return "compiled before its parts were checked"
    if reason is None:
        reason = read_check.disagreement(layer, layer.original, type(layer).read_parts)
        layer.__dict__[UNCHECKED] = reason
        if reason is None:
            del layer.__dict__[UNCHECKED]
    return reason


def adapter_of(layer: nn.Module, parts: LoRAParts) -> Adapter | None:
    """Return the adapter among parts as `serve` has it."""
    if parts.lora_A is None:
        return None
    return Adapter(parts.lora_A, parts.lora_B, parts.dropout)


def _read(
    parts: LoRAParts, x: Tensor, autocast: bool
) -> tuple[torch.dtype, Tensor | QuantizedWeight, Tensor | None] | Fallback:
    """Read the base as `read_base` does."""
    base = parts.base
    if isinstance(base, nn.Module):
        return read_base(base, x, autocast)
    if isinstance(base, Tensor):
        return read_base(_Weight(base, parts.bias), x, autocast)
    if x.dtype is not base.dtype and not autocast:
        return Fallback(f"input is {x.dtype}, base weight is {base.dtype}")
    return x.dtype, base, parts.bias


def _computed(
    parts: LoRAParts, adapter: Adapter | None, base: tuple, dtype: torch.dtype, training: bool
) -> Tensor | Fallback:
    """Compute a layer from its parts."""
    try:
        if adapter is None:
            result = frozen_base(*base)
        else:
            p = read_check.dropout_p(parts, training)
            result = fused(base, adapter.lora_A, adapter.lora_B, parts.scaling, p)
    except ArgumentError as error:  # before anything was computed
        return refused(error)
    if type(parts.base) in BNB_TYPES and result.dtype is not dtype:
        return result.to(dtype=dtype)  # bitsandbytes returns its input's dtype
    return result


def _layer_key(
    layer: Any, sizes: tuple[int, int], four_bit: bool, adapter: Adapter | None
) -> tuple:
    kind = f"{'no adapter' if adapter is None else 'LoRA'} in {layer.original.__qualname__}"
    r = 0 if adapter is None else adapter.lora_A.shape[0]
    return ("nf4_lora_linear" if four_bit else "lora_linear", kind, *sizes, r)


def _trial_key(
    layer: Any, sizes: tuple[int, int], four_bit: bool, adapter: Adapter | None, dtypes: tuple
) -> tuple:
    stored, trained = None, False
    if adapter is not None:
        stored = adapter.lora_A.dtype
        trained = adapter.lora_A.requires_grad or adapter.lora_B.requires_grad
    x_dtype, dtype, cast = dtypes
    key = _layer_key(layer, sizes, four_bit, adapter)
    return (*key, x_dtype, dtype, stored, cast, trained)
