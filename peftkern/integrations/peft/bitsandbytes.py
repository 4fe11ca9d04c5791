"""bitsandbytes' 4-bit layers: read without running them, their weights kept as they are.

bitsandbytes keeps more than a weight in that layer: the dtype it computes in is chosen at the
first call, and in eval mode on a CPU with AVX512-BF16 it rewrites the weight in place into a layout
of its own. The functions here honor the first; the classes that a patched model has in the place
of bitsandbytes' exclude the second.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import quantize_blockwise
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.formats.nf4 import STATE_KEYS, ArgumentError, NF4Weight, compare_quant_maps
from peftkern.functional import nf4_linear
from peftkern.integrations.peft import casts, trial
from peftkern.integrations.peft.fallback import (
    Fallback,
    PatchedForward,
    parameters_of,
    refused,
    set_class,
    unusual_call,
)
from peftkern.integrations.peft.fingerprint import fingerprint
from peftkern.integrations.peft.prepared import forget, kept, prepare

_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_REPACK_ROWS = 32  # rows that bitsandbytes interleaves in one tile of its CPU layout
rewriting = threading.RLock()  # held by whoever changes a weight that other threads may use


class PatchedBase(PatchedForward):
    """Mixin of what a patched model has in the place of bitsandbytes' layers.

    On a CPU an NF4 or FP4 weight is multiplied by the kernel that multiplies it with an adapter on
    top, so that a model with its adapters disabled agrees with the one whose adapters are zero.
    Weights that are not read go to bitsandbytes, which is told that this CPU has no AVX512-BF16:
    there it would rewrite them in eval mode, and lose their gradients.
    """

    op = "nf4_linear"

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        return False

    @support_avx512bf16_for_cpu.setter
    def support_avx512bf16_for_cpu(self, value: bool) -> None:
        self.__dict__["support_avx512bf16_for_cpu"] = value  # for after `unpatch`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        forget(self.weight)  # its memory is replaced: by `to`, `cuda`, `half` and the like
        return super()._apply(fn, recurse)

    def _fused(self, x: Tensor, args: tuple, kwargs: dict, compiling: bool) -> Tensor | Fallback:
        # Of arguments it takes x alone; under a layer that PEFT answers it is PEFT's.
        if args or kwargs or trial.peer_answers() or not dispatch.runs_on_cpu(x):
            return self.original.forward(self, x, *args, **kwargs)
        reason = unusual_call(x, compiling)
        read = read_base(self, x) if reason is None else Fallback(reason)
        if isinstance(read, Fallback):
            return read
        dtype, weight, bias = read
        kind = "no adapter" if weight.quant_type == "nf4" else f"no adapter, {weight.quant_type}"
        key = (self.op, kind, *weight.shape, 0, x.dtype, dtype)
        refusal = trial.refusal(self, x, key, alone=True)
        if refusal is not None:
            return refusal
        try:
            return nf4_linear(casts.cast(x, dtype, self), weight, bias).to(x.dtype)
        except ArgumentError as error:  # before anything was computed
            return refused(error)


class PatchedLinear4bit(PatchedBase, Linear4bit):
    """bitsandbytes' `Linear4bit` over the library's kernel."""

    original = Linear4bit


class PatchedLinearNF4(PatchedBase, LinearNF4):
    """bitsandbytes' `LinearNF4` over the library's kernel."""

    original = LinearNF4


class PatchedLinearFP4(PatchedBase, LinearFP4):
    """bitsandbytes' `LinearFP4` over the library's kernel."""

    original = LinearFP4


SWAPS = {kind.original: kind for kind in (PatchedLinear4bit, PatchedLinearNF4, PatchedLinearFP4)}
LINEAR_TYPES = (*SWAPS, *SWAPS.values())


def patch_base(module: nn.Module) -> None:
    """Swap the class of one of bitsandbytes' layers."""
    kind = type(module)
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        restore_packing(module)
    set_class(module, SWAPS.get(kind, kind))


def unpatch_base(module: nn.Module) -> None:
    """Undo `patch_base`."""
    if isinstance(module, PatchedBase):
        set_class(module, module.original)


def runs_kernel(base: Linear4bit) -> bool:
    """Return whether a layer will run our kernel by itself when it is swapped."""
    return base.weight.device.type == "cpu" and unreadable(base) is None


class FrozenWeight:
    """Weight and bias of a layer of bitsandbytes, to be put back after adapters were merged.

    No module: what it holds takes no part in the state dict.
    """

    def __init__(self, base: Linear4bit) -> None:
        self.weight = base.weight
        self.quantized = base.weight.__dict__.get("bnb_quantized")
        self.bias = None if base.bias is None else base.bias.data  # merging makes another
        self.merged: tuple[int, ...] = ()

    def mark_quantized(self) -> None:
        """Undo PEFT's merge on the weight it reads, which forgets that it is quantized."""
        if self.quantized is not None:
            self.weight.__dict__["bnb_quantized"] = self.quantized

    def expect(self, merged: Tensor) -> None:
        """Remember what merging has put in the place of the weight."""
        self.merged = _fingerprint(merged)

    def replaced(self, weight: Tensor) -> bool:
        """Return whether that was written to or replaced since, but for a move to a device."""
        return _fingerprint(weight) != self.merged

    def restore(self, base: Linear4bit) -> None:
        """Put both back, on the device where the layer is now."""
        device = base.weight.device
        base.weight = self.weight if self.weight.device == device else self.weight.to(device)
        base.quant_state = base.weight.quant_state
        if self.bias is not None:
            base.bias.data = self.bias.to(device)


def _fingerprint(weight: Tensor) -> tuple[int, ...]:
    return fingerprint([weight.data, weight.quant_state.absmax])


def quant_state_of(base: Linear4bit) -> Any:
    """Return the state of a layer's weight, None if there is none.

    The layer has it as well, and where FSDP has put a plain view in the place of the parameter the
    layer alone, from which bitsandbytes restores it in every forward pass.
    """
    state = getattr(parameters_of(base)[0], "quant_state", None)
    return getattr(base, "quant_state", None) if state is None else state


def read_quant_maps(model: nn.Module) -> None:
    """Compare the tables of all layers at once, so that no forward pass waits for one."""
    states = (quant_state_of(base) for base in model.modules() if type(base) in LINEAR_TYPES)
    compare_quant_maps(getattr(state, "code", None) for state in states)


def in_bytes(model: nn.Module) -> int:
    """Return how many packed weights of a model are stored in a dtype that has no gradients."""
    layers = (module for module in model.modules() if isinstance(module, Linear4bit))
    return sum(not parameters_of(layer)[0].is_floating_point() for layer in layers)


def unreadable(base: Linear4bit) -> str | None:
    """Return the reason for which a weight is not read, whatever the input; None for one that is.

    One that is repacked for CPU inference is put back when it is patched.
    """
    reason = unusual_weight(base)
    if reason is None and not getattr(quant_state_of(base), "packing_format_for_cpu", False):
        try:
            NF4Weight.from_bitsandbytes(parameters_of(base)[0], quant_state_of(base))
        except ArgumentError as error:
            reason = str(error)
    return reason


def unusual_weight(base: Linear4bit) -> str | None:
    """Return the reason for bitsandbytes to read this weight before it is looked at closely."""
    weight, _ = parameters_of(base)
    if hasattr(type(weight), "__tensor_flatten__"):  # DTensor and its like
        return f"base weight is {type(weight).__name__}"
    state = quant_state_of(base)  # pickle keeps the weight's, but not the parameter's class
    if state is None:
        return "quant_state is missing"
    if state.quant_type not in STATE_KEYS:
        return f"quant_type is {state.quant_type}, expected nf4 or fp4"
    if state.__dict__.get("packing_format_for_cpu"):
        return None  # its storage dtype is kept aside
    with torch._C.DisableTorchFunctionSubclass():  # else Params4bit adds 1 us
        dtype = weight.dtype
    storage = getattr(weight, "quant_storage", getattr(base, "quant_storage", dtype))
    if dtype not in _STORAGES or storage is not dtype:
        return f"quant_storage is {storage} over {dtype} data"
    return None


def read_base(
    base: Linear4bit, x: Tensor
) -> tuple[torch.dtype, NF4Weight, Tensor | None] | Fallback:
    """Read the layer as it is now, its weight viewed in place, or the reason to call it.

    Returns: the dtype that the layer computes in, which the first input decides unless it was set;
        the weight; the bias.
    Raises: TruncatedWeightError, where bitsandbytes would read on.
    """
    weight, bias = parameters_of(base)
    state = getattr(weight, "quant_state", None)
    w = None if state is None else kept(weight, state)
    if w is None:
        w = _read_weight(base, x)
        if isinstance(w, Fallback):
            return w
    if len(w.shape) != 2 or w.shape[1] != x.shape[-1]:
        return Fallback("weight is not quantized as [out_features, in_features]")
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return base.compute_dtype or x.dtype, w, bias


def _read_weight(base: Linear4bit, x: Tensor) -> NF4Weight | Fallback:
    """Read a weight that is not known as it is, or the reason for bitsandbytes to do it."""
    reason = unusual_weight(base)
    if reason is not None:
        return Fallback(reason)
    if getattr(base.weight, "quant_state", None) is None:  # as it does, for saving needs it
        fix_4bit_weight_quant_state_from_module(base)
    weight = base.weight
    if weight.quant_state.__dict__.get("packing_format_for_cpu"):  # by others, since it was patched
        if torch.compiler.is_compiling() or not (base.training or x.requires_grad):
            return Fallback("weight is repacked for bitsandbytes' CPU inference")
        restore_packing(base)
    try:
        return prepare(weight, weight.quant_state)
    except ArgumentError as error:  # no weight as its format defines it
        return refused(error)


def restore_packing(base: Linear4bit) -> None:
    """Put a weight that was repacked for CPU inference back into the storage layout, in place.

    The codes come back exactly. absmax does not: bitsandbytes has rounded it to bfloat16, and a
    nested absmax is quantized again here, as bitsandbytes does when it saves such a layer. Its own
    CPU kernel has no gradient, so training on the repacked weight would silently cut the graph.
    """
    with rewriting:  # of several threads the first restores, the others find it done
        if not base.weight.quant_state.packing_format_for_cpu:
            return
        _restore(base.weight)
    warnings.warn(
        "A 4-bit weight had been repacked by bitsandbytes' CPU inference path, which rounds its "
        "absmax to bfloat16; it is back in the storage layout so that gradients pass through it.",
        stacklevel=2,
    )


@torch.no_grad()
def _restore(weight: Any) -> None:
    state = weight.quant_state
    rows, columns = state.shape
    tiles = weight.data.reshape(-1, _REPACK_ROWS)  # low nibbles are the first 32 of 64 codes
    codes = torch.cat([tiles & 0xF, tiles >> 4], dim=1)
    codes = codes.view(rows // _REPACK_ROWS, columns // 2, _REPACK_ROWS, 2).transpose(1, 2)
    codes = codes.reshape(-1, 2)
    packed = ((codes[:, 0] << 4) | codes[:, 1]).reshape(state.original_qshape)
    storage = getattr(state, "original_storage_type", None)

    state.absmax = state.absmax.t().reshape(-1).float()
    state.nested = state.original_nested
    if state.nested:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
    else:
        state.state2 = None
    state.dtype = state.original_dtype
    weight.data = packed if storage is None else packed.view(storage)
    state.packing_format_for_cpu = False  # the last: until then other threads wait for the lock
