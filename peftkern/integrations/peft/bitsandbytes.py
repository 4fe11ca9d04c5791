"""Read a `bitsandbytes.nn.Linear4bit` without running it, and keep its weight as it is.

bitsandbytes keeps more than a weight in that layer: the dtype it computes in is chosen at the
first call, and in eval mode on a CPU with AVX512-BF16 it rewrites the weight in place into a layout
of its own. The functions here honour the first; the classes that a patched model has in the place
of bitsandbytes' exclude the second.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from bitsandbytes.functional import quantize_blockwise
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.formats.nf4 import ArgumentError, NF4Weight
from peftkern.functional import nf4_linear
from peftkern.integrations.peft.tensors import parameter, refusal, unusual_call, unusual_input

_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_REPACK_ROWS = 32  # rows that bitsandbytes interleaves in one tile of its CPU layout
rewriting = threading.RLock()  # held by whoever changes a weight that other threads may use


class PatchedBase:
    """What a patched model has of bitsandbytes' layers, each a subclass of its class `original`.

    On a CPU an NF4 weight is multiplied by the kernel that serves it with an adapter on top, so
    that a model with its adapters disabled agrees with the one whose adapters are zero. Other
    weights go to bitsandbytes, which is told that this CPU has no AVX512-BF16: there it would
    rewrite them in eval mode, and lose their gradients. FP4 pays for that in inference.
    """

    original: type

    def __init_subclass__(cls) -> None:
        cls.__name__ = cls.original.__name__  # what repr shows, and PEFT and accelerate ask for

    @property
    def support_avx512bf16_for_cpu(self) -> bool:
        return False

    @support_avx512bf16_for_cpu.setter
    def support_avx512bf16_for_cpu(self, value: bool) -> None:
        self.__dict__["support_avx512bf16_for_cpu"] = value  # for after `unpatch`

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self, PatchedBase):  # a hook has kept this method over `unpatch`
            return type(self).forward(self, x)
        if dispatch.runs_on_cpu(x):
            served = _serve(self, x)
            if isinstance(served, Tensor):
                return served
            dispatch.record_fallback("nf4_linear", served)
        return self.original.forward(self, x)


class PatchedLinear4bit(PatchedBase, Linear4bit):
    """bitsandbytes' `Linear4bit` over the library's kernel."""

    original = Linear4bit


class PatchedLinearNF4(PatchedBase, LinearNF4):
    """bitsandbytes' `LinearNF4` over the library's kernel."""

    original = LinearNF4


class PatchedLinearFP4(PatchedBase, LinearFP4):
    """bitsandbytes' `LinearFP4`, whose weight stays as it is."""

    original = LinearFP4


SWAPS = {kind.original: kind for kind in (PatchedLinear4bit, PatchedLinearNF4, PatchedLinearFP4)}
LINEAR_TYPES = (*SWAPS, *SWAPS.values())


def patch_base(module: nn.Module) -> bool:
    """Swap the class of one of bitsandbytes' layers; whether it is one that is swapped now."""
    kind = type(module)
    if kind not in LINEAR_TYPES:
        return False
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        restore_packing(module)
    module.__class__ = SWAPS.get(kind, kind)
    return True


def unpatch_base(module: nn.Module) -> None:
    """Undo `patch_base`."""
    if isinstance(module, PatchedBase):
        module.__class__ = module.original


def is_served(base: Linear4bit) -> bool:
    """Whether a swapped layer runs our kernel by itself, as it is now."""
    if base.weight.device.type != "cpu" or unusual_weight(base) is not None:
        return False
    try:
        NF4Weight.from_bitsandbytes(base.weight)
    except ArgumentError:
        return False
    return True


def _serve(base: Linear4bit, x: Tensor) -> Tensor | str:
    """The layer's output, or why bitsandbytes has to give it."""
    reason = unusual_call() or unusual_input(x) or unusual_weight(base)
    weight = reason or read_weight(base, x)
    if isinstance(weight, str):
        return weight
    try:
        return nf4_linear(compute_input(base, x), weight, parameter(base, "bias")).to(x.dtype)
    except ArgumentError as error:  # before anything was computed
        return refusal(error)


class FrozenWeight:
    """The weight and bias of a layer of bitsandbytes, to be put back after adapters were merged.

    No module: what it holds takes no part in the state dict.
    """

    def __init__(self, base: Linear4bit) -> None:
        self.weight = base.weight
        self.quantized = base.weight.__dict__.get("bnb_quantized")
        self.bias = None if base.bias is None else base.bias.data  # merging makes another
        self.merged, self.version = base.weight, 0

    def mark_quantized(self) -> None:
        """Undo what PEFT's merge does to the weight it reads: that it is quantized is forgotten."""
        if self.quantized is not None:
            self.weight.__dict__["bnb_quantized"] = self.quantized

    def expect(self, merged: Tensor) -> None:
        """Remember what merging has put in the place of the weight."""
        self.merged, self.version = merged, merged._version

    def replaced(self, weight: Tensor) -> bool:
        """Whether that has been written to or replaced since, other than by a move to a device."""
        if weight is self.merged:
            return weight._version != self.version
        return weight.device == self.merged.device

    def restore(self, base: Linear4bit) -> None:
        """Put both back, on the device where the layer is now."""
        device = base.weight.device
        base.weight = self.weight if self.weight.device == device else self.weight.to(device)
        base.quant_state = base.weight.quant_state
        if self.bias is not None:
            base.bias.data = self.bias.to(device)


def unusual_weight(base: Linear4bit) -> str | None:
    """Why this weight, whatever the input, is for bitsandbytes to read; None if it is NF4."""
    weight = parameter(base, "weight")
    if hasattr(type(weight), "__tensor_flatten__"):  # DTensor and its like
        return f"base weight is {type(weight).__name__}"
    state = getattr(weight, "quant_state", None)  # pickle keeps it, but not the parameter's class
    if state is None:
        return "quant_state is missing"
    if state.quant_type != "nf4":
        return f"quant_type is {state.quant_type}"
    if getattr(state, "packing_format_for_cpu", False):
        return None  # its storage dtype is kept aside
    with torch._C.DisableTorchFunctionSubclass():  # else Params4bit adds 1 us
        dtype = weight.dtype
    storage = getattr(weight, "quant_storage", dtype)
    if dtype not in _STORAGES or storage is not dtype:
        return f"quant_storage is {storage} over {dtype} data"
    return None


def read_weight(base: Linear4bit, x: Tensor) -> NF4Weight | str:
    """The layer's weight as it is now, viewed in place, or why bitsandbytes has to read it itself.

    Raises: TruncatedWeightError, where bitsandbytes would read on.
    """
    weight = parameter(base, "weight")
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # since it was patched, by other code
        if torch.compiler.is_compiling() or not (base.training or x.requires_grad):
            return "weight is repacked for bitsandbytes' CPU inference"
        restore_packing(base)
    if len(state.shape) != 2 or state.shape[1] != x.shape[-1]:
        return "weight is not quantised as [out_features, in_features]"
    try:
        return NF4Weight.from_bitsandbytes(weight)
    except ArgumentError as error:  # no NF4 weight as the format defines it
        return refusal(error)


def compute_input(base: Linear4bit, x: Tensor) -> Tensor:
    """x in the dtype that the layer computes in; the first input decides it unless it was set."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype = base.compute_dtype
    return x if dtype is None or dtype is x.dtype else x.to(dtype)


def restore_packing(base: Linear4bit) -> None:
    """Put a weight that was repacked for CPU inference back into the storage layout, in place.

    The codes come back exactly. absmax does not: bitsandbytes has rounded it to bfloat16, and a
    nested absmax is quantised again here, as bitsandbytes does when it saves such a layer. Its own
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
