"""The forward of a patched adapter layer: the base and the first adapter as one op.

It looks at the layer's state at every call and keeps nothing of it: the plain case runs here, and
anything unusual goes to PEFT's forward with a reason that `peftkern.stats()` counts.

What PEFT computes, in its order: y = base_layer(x); for each active adapter x is cast to the dtype
of its lora_A and y = y + lora_B(lora_A(dropout(x))) * scaling; y is cast back to the dtype that the
base layer gave. Here the base and the first adapter are one op, which rounds once where PEFT rounds
after the base and again after the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.backends import dispatch, trust
from peftkern.backends.cpu import crossovers
from peftkern.backends.device import has_products
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional import lora_linear, nf4_linear, nf4_lora_linear
from peftkern.functional.arguments import WEIGHT_DTYPES, autocast_dtype
from peftkern.integrations.peft import casts, engines, tensor_parallel, trial, written_inputs
from peftkern.integrations.peft.fallback import (
    GLOBAL_HOOKS,
    Fallback,
    Outlook,
    PatchedForward,
    active_names,
    extra_arguments,
    hooked,
    parameters_of,
    refused,
    unusual_call,
    unusual_tensor,
)
from peftkern.layers import BlockLinear, NF4Linear
from peftkern.layers.quantized_linear import QuantizedLinear
from peftkern.methods.processes import several

BNB_TYPES: tuple[type, ...] = ()
if is_bnb_4bit_available():
    from peftkern.integrations.peft import bitsandbytes as bnb

    BNB_TYPES = bnb.LINEAR_TYPES

DENSE_TYPES = (nn.Linear, Conv1D)
OWN_TYPES = (NF4Linear, BlockLinear)
BASE_TYPES = frozenset((*BNB_TYPES, *DENSE_TYPES, *OWN_TYPES))


class Adapter(NamedTuple):
    """Tensors and dropout module of one adapter."""

    lora_A: Tensor
    lora_B: Tensor
    dropout: nn.Module
    bias: Tensor | None = None  # of lora_B

    @property
    def dropout_p(self) -> float:
        """Probability with which the adapter's input is dropped now."""
        drop = self.dropout
        return drop.p if type(drop) is nn.Dropout and drop.training else 0.0


_SMALL = Fallback("small dense product: PEFT's own operations are as fast")

# x as the base takes it, its weight and its bias
Base = tuple[Tensor, Tensor | QuantizedWeight, Tensor | None]


class PatchedLayer(PatchedForward):
    """Mixin of patched adapter layers, each a subclass of PEFT's class `original`.

    A tuner's own mixin knows how it keeps an adapter: `_is_plain`, `_read_adapter`, `_fuse_first`
    and `_add_adapter`.
    """

    four_bit = False  # whether `original` is PEFT's class for a base of bitsandbytes
    other_base = False  # whether it is one for a base of another library

    def _fused(self, x: Tensor, args: tuple, kwargs: dict, compiling: bool) -> Tensor | Fallback:
        """Return the layer's output, or the reason for PEFT's forward.

        Raises: TruncatedWeightError, where bitsandbytes would read on.
        """
        reason = extra_arguments(args, kwargs) if args or kwargs else None
        if reason is not None:
            return Fallback(reason)
        base_layer = self._modules["base_layer"]
        if tensor_parallel.PLAN in base_layer.__dict__:  # before all that a process measured
            answer = tensor_parallel.answer(self, x)
            if answer is not None:
                return answer
        try:
            on_cpu = x.is_cpu
        except AttributeError:  # no tensor, which PEFT refuses; to ask would be a call
            return Fallback(f"input is {type(x).__name__}")
        if (
            type(base_layer) in DENSE_TYPES
            and not self.other_base
            and on_cpu
            and is_small(self, x, self.out_features, self.in_features, self.lora_variant)
            and (compiling or dispatch.forced_backend() is None)
            # Processes, whose rows may differ, enter the units of an engine alike.
            and (compiling or not (several() and engines.units_of(self._parts(active_names(self)))))
        ):  # asked first: to such a product every call is a loss
            return _SMALL
        reason = unusual_call(x, compiling)
        if reason is not None:
            return Fallback(reason)
        names = active_names(self)
        adapter = read_state(self, names, x.device)
        if isinstance(adapter, Fallback):
            if compiling or unusual_layer(self) is not None:
                return adapter
            units = engines.units_of(self._parts(names))
            return engines.served(self, x, units) if units else adapter
        cast = autocast_dtype(x)
        read_it = self._read_other if self.other_base else read_base
        read = read_it(base_layer, x, cast is not None)
        if isinstance(read, Fallback):
            return read
        dtype, weight, bias = read
        off, unfused = switched_off(self), "no active adapter"
        if adapter is not None:
            unfused = unfusable(adapter, x, dtype, cast, self.cast_input_dtype_enabled)
        asks = compiling or trust.mode() != "always"
        quantized = isinstance(weight, QuantizedWeight)
        if asks and ((off or unfused) is None or quantized):  # else PEFT serves
            key = trial_key(self, x, names, adapter, dtype, cast)
            refusal = trial.refusal(self, x, key, complete=off is None, alone=True)
            if refusal is not None:
                return refusal
        base = (casts.cast(x, dtype, base_layer), weight, bias)
        contested = not asks and unfused is None and self._is_plain(names[0])
        if contested and is_slower(self, adapter, base):
            return Fallback("PEFT's own operations measured faster for this shape")
        if torch.is_grad_enabled() and (off or unfused) is None and base[0] is x:
            read = adapter.lora_A.requires_grad or not self._is_plain(names[0])
            if read and written_inputs.only_ours_saves(x, adapter.lora_A, adapter.dropout_p, cast):
                args = names, adapter
                return written_inputs.answered(
                    self, x, lambda x: self._combine(x, *args, (x, weight, bias), None, None)
                )
        return self._combine(x, names, adapter, base, off, unfused)

    def outlook(self) -> Outlook:
        names = active_names(self)
        parts = self._parts(names)
        device = self._device(self.get_base_layer())
        split = tensor_parallel.split_of(self)
        if split is not None:
            return Outlook(device, split.reason if isinstance(split, Fallback) else None)
        with engines.bare(engines.units_of(parts)):  # as it is when a call has entered them
            base, state = self.get_base_layer(), read_state(self, names, device)
            if isinstance(state, Fallback):
                reason = engines.in_a_call(state.reason, self, parts)
            else:  # of a weight in shards nothing is told
                reason = None if engines.is_sharded(self, parts) else self._base_refusal(base)
        dense = device.type == "cpu" and type(base) in DENSE_TYPES and not self.other_base
        unread = reason is not None or isinstance(state, Fallback)
        key = None if unread else layer_key(self, names, state)
        rows = 1
        if dense:
            sizes = self.in_features, self.out_features, bool(self.lora_variant)
            rows = rows_to_pay(self, base.weight, *sizes)
        return Outlook(device, reason, rows, key)

    def _device(self, base: nn.Module) -> torch.device:
        return base.weight.device

    def _base_refusal(self, base: nn.Module) -> str | None:
        """Return the reason to call the base, whatever the input."""
        if type(base) in BNB_TYPES:
            return bnb.unreadable(base)
        return switched_off(self) if type(base) in DENSE_TYPES else None

    def _combine(
        self,
        x: Tensor,
        names: list[str],
        adapter: Adapter | None,
        base: Base,
        off: str | None,
        unfused: str | None,
    ) -> Tensor | Fallback:
        """Compute the base with its active adapters, the first in one op if nothing is against it.

        Args: off, the reason for the base alone; unfused, the one against that op.
        """
        try:
            if unfused is not None:
                result = frozen_base(*base)
            elif off is None:
                result = self._fuse_first(names[0], adapter, base)
            else:
                result = self._fuse_disabled(names[0], adapter, base)
        except ArgumentError as error:  # before anything was computed: PEFT has its own word for it
            return refused(error)
        if result is None:
            return Fallback(off or unfused)
        if type(self._modules["base_layer"]) in BNB_TYPES and result.dtype is not x.dtype:
            result = result.to(dtype=x.dtype)  # bitsandbytes returns its input's dtype
        if off is not None:
            return result
        out_dtype = result.dtype
        if unfused is None:
            if adapter.bias is not None:  # LoraConfig(lora_bias=True)
                result = result + adapter.bias * self.scaling[names[0]]
            names = names[1:]
        for name in names:
            result, x = self._add_adapter(result, x, name, base)
        return result if result.dtype is out_dtype else result.to(dtype=out_dtype)

    def _fuse_disabled(self, name: str, adapter: Adapter, base: Base) -> Tensor | None:
        """Compute the base of a layer without its adapters, in the bits of an update of zero.

        On a CPU the product without an update has them. Elsewhere that depends on the kernel, so
        that the update is made zero. DoRA agrees to rounding only: its magnitude is PEFT's norm,
        and it is divided by ours.
        """
        if dispatch.runs_on_cpu(base[0]) or not self._is_plain(name):
            return frozen_base(*base)
        zero = torch.zeros_like(adapter.lora_B)
        return fused(base, adapter.lora_A.detach(), zero, self.scaling[name], 0.0)

    def _adapter_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast as PEFT does; its 4-bit layers ask about CUDA's autocast whatever the device."""
        if self.four_bit and torch.is_autocast_enabled():
            return x
        return self._cast_input_dtype(x, dtype)

    def _parts(self, names: list[str]) -> list[engines.Part]:
        """Return the modules that PEFT calls with these adapters active, in its order."""
        return [engines.Part("base_layer", self._modules, "base_layer")]

    def _is_plain(self, name: str) -> bool:
        """Return whether an adapter is LoRA and nothing more: neither DoRA nor AdaLoRA."""
        raise NotImplementedError

    def _read_adapter(self, names: list[str], device: torch.device) -> Adapter | Fallback:
        """Read the first active adapter; a fallback also for what `_add_adapter` cannot add."""
        raise NotImplementedError

    def _fuse_first(self, name: str, adapter: Adapter, base: Base) -> Tensor:
        """Compute the base and its first adapter in one op."""
        raise NotImplementedError

    def _add_adapter(
        self, result: Tensor, x: Tensor, name: str, base: Base
    ) -> tuple[Tensor, Tensor]:
        """Add an adapter by PEFT's operations; returns the sum, and its input as PEFT has it."""
        raise NotImplementedError


def fused(
    base: Base, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, dropout_p: float
) -> Tensor:
    """Compute a base and a low-rank update in one op."""
    x, weight, bias = base
    linear = nf4_lora_linear if isinstance(weight, QuantizedWeight) else lora_linear
    return linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout_p=dropout_p)


def frozen_base(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """Compute the base alone; None where torch has an operation of its own for that."""
    return nf4_linear(x, weight, bias) if isinstance(weight, QuantizedWeight) else None


def trial_key(
    layer: Any,
    x: Tensor,
    names: list[str],
    adapter: Adapter | None,
    dtype: torch.dtype,
    cast: torch.dtype | None,
) -> tuple:
    """Return all that a trial's outcome depends on, but for the rows and the device.

    Args: dtype, of the base's input; cast, the dtype of autocast, None where it is off.
    """
    stored, trained = None, False
    if adapter is not None:
        stored = adapter.lora_A.dtype
        trained = adapter.lora_A.requires_grad or adapter.lora_B.requires_grad
    return (*layer_key(layer, names, adapter), x.dtype, dtype, stored, cast, trained)


def layer_key(layer: Any, names: list[str], adapter: Adapter | None) -> tuple:
    """Return the part of `trial_key` that no input has a say in."""
    kind, r = "no adapter", 0
    if adapter is not None:
        kind = "LoRA" if layer._is_plain(names[0]) else "variant"
        kind += f" and {len(names) - 1} more" if len(names) > 1 else ""
        r = adapter.lora_A.shape[0]
    base = layer._modules["base_layer"]
    if layer.other_base:
        name = layer._base_kind(base)
    elif isinstance(base, QuantizedLinear):
        name = base._quant.get("format") or base.quant_type
    else:
        name = getattr(base.__dict__.get("quant_state"), "quant_type", "nf4")
    kind += "" if name == "nf4" else f" over {name}"  # its kernels have times of their own
    return (layer.op, kind, layer.out_features, layer.in_features, r)


def read_state(layer: Any, names: list[str], device: torch.device) -> Adapter | Fallback | None:
    """Read the first active adapter of a layer whose state our ops express, whatever the input.

    Args: device, of the input. Returns: None if no adapter is active.
    """
    if (layer.merged_adapters and layer.disable_adapters) or any(GLOBAL_HOOKS):
        return Fallback(unusual_layer(layer))
    base = layer._modules["base_layer"]
    kind = type(base)
    if kind not in BASE_TYPES and not layer.other_base:
        return Fallback(f"base_layer is {kind.__name__}")
    reason = hooked(device, base_layer=base)
    if reason is not None:
        return Fallback(reason)
    return layer._read_adapter(names, device) if names else None


def unusual_layer(layer: Any) -> str | None:
    """Return the reason for PEFT to call a layer's parts one by one, whatever they are.

    Merged adapters that are off it takes out of the weight, which in a unit would be lost.
    """
    if layer.merged_adapters and layer.disable_adapters:
        return "adapters are merged and disabled"
    return "global module hooks" if any(GLOBAL_HOOKS) else None


def switched_off(layer: Any) -> str | None:
    """Return the reason for which a layer gives what its base gives, active adapters or not."""
    if layer.disable_adapters:
        return "adapters are disabled"
    return "adapters are merged" if layer.merged_adapters else None


def rows_to_pay(layer: Any, weight: Tensor, K: int, N: int, dora: bool = False) -> int:
    """Return the rows from which a dense layer on a CPU is not small; 0 if there are none."""
    if dora:
        rows = 1 if crossovers.crossover("dora") <= N * K else 0
    else:
        rows = max(-(-crossovers.crossover("dense") // max(K + N, 1)), 1)
    if layer.training and not has_products(weight.dtype, weight.device):
        products = crossovers.WITHOUT_PRODUCTS["dora" if dora else "dense"]
        paid = max(-(-products // max(K * N, 1)), 1)
        rows = min(rows or paid, paid)
    return rows


def is_small(layer: Any, x: Tensor, N: int, K: int, dora: Any = False) -> bool:
    """Return whether a dense product on a CPU is too small to win back the cost of a call.

    Layer and rows decide alone, in few calls: to such a product each is a loss.
    """
    values = x.numel()
    if dora:
        small = crossovers.crossover("dora") > N * K
    else:
        small = values + (values // K if K else 0) * N < crossovers.crossover("dense")
    if small and layer.training:
        paid = values * N >= crossovers.WITHOUT_PRODUCTS["dora" if dora else "dense"]
        return not paid or has_products(autocast_dtype(x) or x.dtype, x.device)
    return small


def is_slower(layer: Any, adapter: Adapter, base: Base) -> bool:
    """Return whether PEFT was measured faster for this shape; see `dispatch.is_slower`."""
    x, weight, _ = base
    op = "nf4_lora_linear" if isinstance(weight, QuantizedWeight) else "lora_linear"
    return dispatch.is_slower(op, x, tuple(weight.shape), adapter.lora_A.shape[0], layer.training)


def read_base(
    base: nn.Module, x: Tensor, autocast: bool
) -> tuple[torch.dtype, Tensor | QuantizedWeight, Tensor | None] | Fallback:
    """Read the base as it is at this call, or return the reason to call it.

    Returns: the dtype in which it takes x, its weight and its bias.
    """
    kind = type(base)
    if kind in BNB_TYPES:
        return bnb.read_base(base, x)
    if kind in OWN_TYPES:
        return x.dtype, base.quantized_weight, base.bias

    weight, bias = parameters_of(base)
    reason = unusual_tensor(**{"base weight": weight})
    if reason is not None:
        return Fallback(reason)
    if weight.requires_grad and torch.is_grad_enabled():
        if not engines.is_frozen_view(weight, base):
            return Fallback("base weight is trained")
        weight = weight.detach()
    dtype = weight.dtype
    same = x.dtype is dtype and (bias is None or bias.dtype is dtype)
    if dtype not in WEIGHT_DTYPES or not (same or (autocast and x.dtype in WEIGHT_DTYPES)):
        return Fallback(f"input is {x.dtype}, base weight is {dtype}")
    return x.dtype, weight.t() if kind is Conv1D else weight, bias


def unfusable(
    adapter: Adapter, x: Tensor, base_dtype: torch.dtype, cast: torch.dtype | None, cast_input: bool
) -> str | None:
    """Return the reason for which base and first adapter in one op would not be what PEFT does."""
    dtype, x_dtype = adapter.lora_A.dtype, x.dtype
    if adapter.lora_B.dtype is not dtype or dtype not in WEIGHT_DTYPES:
        return f"lora_A is {dtype}, lora_B is {adapter.lora_B.dtype}"
    if cast is not None:
        exact = (x_dtype, torch.float32, cast)
        return None if base_dtype in exact else f"base computes in {base_dtype} under autocast"
    if x_dtype is not base_dtype:
        return f"adapter input is {x_dtype}, base computes in {base_dtype}"
    if dtype is not x_dtype and (dtype is not torch.float32 or not cast_input):
        return f"adapter is {dtype}, its input {x_dtype}"
    return None
