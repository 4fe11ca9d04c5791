"""Read a `bitsandbytes.nn.Linear4bit` without running it.

bitsandbytes keeps more than a weight in that layer: the dtype it computes in is chosen at the
first call, and in eval mode on a CPU with AVX512-BF16 it rewrites the weight in place into a layout
of its own. The functions here honour the first and recognise the second.
"""

from __future__ import annotations

import warnings

import torch
from bitsandbytes.functional import quantize_blockwise
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from torch import Tensor

from peftkern.nf4 import NF4Weight

LINEAR_TYPES = (Linear4bit, LinearNF4, LinearFP4)

_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_REPACK_ROWS = 32  # rows that bitsandbytes interleaves in one tile of its CPU layout


def unusual_weight(base: Linear4bit) -> str | None:
    """Why this weight, whatever the input, is for bitsandbytes to read; None if it is NF4."""
    weight = base.weight
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

    Raises: ValueError naming the field when the quantisation state is malformed.
    """
    weight = base.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        if not base.training and not x.requires_grad:
            return "weight is repacked for bitsandbytes' CPU inference"
        restore_packing(base)
    if len(state.shape) != 2 or state.shape[1] != x.shape[-1]:
        return "weight is not quantised as [out_features, in_features]"
    return NF4Weight.from_bitsandbytes(weight)


def compute_input(base: Linear4bit, x: Tensor) -> Tensor:
    """x in the dtype that the layer computes in; the first input decides it unless it was set."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return x if base.compute_dtype is None else x.to(base.compute_dtype)


def restore_packing(base: Linear4bit) -> None:
    """Put a weight that was repacked for CPU inference back into the storage layout, in place.

    The codes come back exactly. absmax does not: bitsandbytes has rounded it to bfloat16, and a
    nested absmax is quantised again here, as bitsandbytes does when it saves such a layer. Its own
    CPU kernel has no gradient, so training on the repacked weight would silently cut the graph.
    """
    weight = base.weight
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
    state.packing_format_for_cpu = False
    weight.data = packed if storage is None else packed.view(storage)
    warnings.warn(
        "A 4-bit weight had been repacked by bitsandbytes' CPU inference path, which rounds its "
        "absmax to bfloat16; it is back in the storage layout so that gradients pass through it.",
        stacklevel=2,
    )
