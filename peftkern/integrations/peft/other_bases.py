"""Frozen layers of HQQ, torchao, GPTQ and AWQ below PEFT's LoRA, read as `BlockWeight`s.

Nothing of these libraries is imported: a layer is told by its class, and its tensors are read as
`formats.int4_layouts` has them. Where their packing differs the codes are packed anew once, when
the model is patched; the layer keeps its own, so that it works without `patch` and saves as ever,
or has them made again (`repacked.Repacked`) whenever they are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import awq, gptq, hqq, torchao
from torch import Tensor, nn

from peftkern.backends.pointers import placements
from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.int4_layouts import (
    AWQ,
    GPTQ,
    HQQ,
    INT8,
    Packing,
    from_awq,
    from_gptq,
    from_hqq,
    from_int8,
)
from peftkern.formats.nf4 import ArgumentError, refuse
from peftkern.integrations.peft.fallback import Fallback, refused
from peftkern.integrations.peft.lora import LoRALayer
from peftkern.integrations.peft.repacked import Repacked, write_originals

Read = Callable[[Any], BlockWeight]


class OtherBase(LoRALayer):
    """Mixin of PEFT's LoRA layers over the layers of another library, as one op."""

    op, other_base = "nf4_lora_linear", True

    def _device(self, base: nn.Module) -> torch.device:
        return next(self._modules["lora_A"].parameters()).device

    def _base_kind(self, base: nn.Module) -> str:
        """Name in a trial's key what kernels the base takes."""
        return _kind(base)

    def _base_refusal(self, base: nn.Module) -> str | None:
        found = _weight_of(base)
        return found.reason if isinstance(found, Fallback) else None

    def _read_other(
        self, base: nn.Module, x: Tensor, autocast: bool
    ) -> tuple[torch.dtype, BlockWeight, Tensor | None] | Fallback:
        """Read the base as `serve.read_base` does."""
        if torch.compiler.is_compiling():
            return Fallback("compiled over a base of another library")
        weight = _weight_of(base)
        if isinstance(weight, Fallback):
            return weight
        if x.dtype is not weight.dtype and not autocast:
            return Fallback(f"input is {x.dtype}, base weight is {weight.dtype}")
        return x.dtype, weight, base.bias


def _weight_of(base: nn.Module) -> BlockWeight | Fallback:
    """Return a layer's weight as it is now, or the reason to call the layer."""
    read, sources = _reader_of(base)
    if read is None:
        return Fallback(f"base_layer is {_kind(base)}")
    try:
        tensors = sources(base)
        return _kept(base, tensors) or _prepared(base, tensors, read)
    except ArgumentError as error:
        return refused(error)
    except (AttributeError, KeyError, TypeError) as error:  # of a version that keeps others
        return refused(refuse("base_layer", f"the fields of {_kind(base)}", repr(error)))


def forget(base: nn.Module) -> None:
    """Drop what is kept of a layer: its codes as they were packed anew. It has its own again."""
    _records.pop(base, None)
    for key, hook in list(base._state_dict_hooks.items()):  # of a layer over such a base
        if hook is write_originals:
            del base._state_dict_hooks[key]
    place = _place_of(base)
    held = None if place is None else place.held.get(place.name)
    if isinstance(held, Repacked):
        place.held[place.name] = held.whole()


def release(layer: OtherBase) -> bool:
    """Let a layer's base go without its own codes, where ours say the same; return whether.

    What reads them gets them made again, bit for bit, and so do state dicts.
    """
    base = layer.get_base_layer()
    place, weight = _place_of(base), _weight_of(base)
    if place is None or isinstance(weight, Fallback):
        return False
    codes = place.held[place.name]
    if not isinstance(codes, Repacked):
        shape, dtype = tuple(codes.shape), codes.dtype
        made = place.packing.unpack(weight.packed, shape)
        if made.dtype is not dtype or not torch.equal(made, codes.detach()):
            return False
        of_parameter = isinstance(codes, nn.Parameter)
        held = Repacked(weight.packed, place.packing, shape, dtype, of_parameter)
        place.held[place.name] = held
        _records[base] = _record(_reader_of(base)[1](base), weight)
    if write_originals not in layer._state_dict_hooks.values():
        layer.register_state_dict_post_hook(write_originals)
    return True


class _Place(NamedTuple):
    """Where a layer has its codes, and how they are packed."""

    held: dict[str, Any]
    name: str
    packing: Packing


def _place_of(base: nn.Module) -> _Place | None:
    """Find the codes of a layer that are packed anew; None of others."""
    read = _reader_of(base)[0]
    if read is _read_hqq and not (base.meta or {}).get("view_as_float"):  # None until it has codes
        held = base._parameters if "W_q" in base._parameters else vars(base)
        return _Place(held, "W_q", HQQ)
    if read is _read_gptq or read is _read_awq:
        held = base._buffers if "qweight" in base._buffers else base._parameters
        return _Place(held, "qweight", GPTQ if read is _read_gptq else AWQ)
    return _Place(vars(base.weight), "qdata", INT8) if read is _read_int8 else None


def _kind(base: nn.Module) -> str:
    weight = base.__dict__.get("_parameters", {}).get("weight")
    own = "" if weight is None or type(base) is not nn.Linear else f" of {type(weight).__name__}"
    return type(base).__name__ + own


class _Record(NamedTuple):
    tensors: list[Tensor]
    placements: list[tuple[Any, ...]]
    versions: list[int]
    weight: BlockWeight


_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


def _kept(base: nn.Module, tensors: list[Tensor]) -> BlockWeight | None:
    """Return a weight as it was prepared, None if its tensors are others now, or were written to.

    As in `prepared`, of which this is the form for layers whose weight is no single parameter.
    """
    record, tensors = _records.get(base), list(map(_stored, tensors))
    if record is None or len(record.tensors) != len(tensors):
        return None
    same = all(new is old for new, old in zip(tensors, record.tensors, strict=True))
    if same and record.versions == [_version(t) for t in tensors]:
        return record.weight if placements(tensors) == record.placements else None
    return None


def _prepared(base: nn.Module, tensors: list[Tensor], read: Read) -> BlockWeight:
    with torch.inference_mode(False), torch.no_grad():
        weight = read(base)
    if weight.shape != (base.out_features, base.in_features):
        raise ArgumentError(
            f"weight: expected one of [out_features, in_features], got {list(weight.shape)}"
        )
    for released in (t for t in tensors if isinstance(t, Repacked)):
        released.packed = weight.packed  # which was written to
    _records[base] = _record(tensors, weight)
    return weight


def _record(tensors: list[Tensor], weight: BlockWeight) -> _Record:
    tensors = list(map(_stored, tensors))
    return _Record(tensors, placements(tensors), list(map(_version, tensors)), weight)


def _stored(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor: of codes that were released, ours."""
    return tensor.packed if isinstance(tensor, Repacked) else tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _reader_of(base: nn.Module) -> tuple[Read | None, Callable[[Any], list[Tensor]]]:
    """Return how a layer is read and the tensors that this depends on; None of others."""
    kind = type(base)
    library = kind.__module__.partition(".")[0]
    if library == "hqq" and kind.__name__ == "HQQLinear":
        return _read_hqq, _of_hqq
    if library == "gptqmodel":
        return _GPTQMODEL.get(kind.__name__), _of_gptqmodel
    if kind is nn.Linear:
        return _TORCHAO.get(type(base.weight).__name__), _of_torchao
    return None, _of_torchao


def _of_hqq(base: Any) -> list[Tensor]:
    meta = base.meta
    if meta.get("quant_scale") or meta.get("quant_zero") or "zero_scale" in meta:
        raise ArgumentError("meta: expected plain scales and zero points, got quantized ones")
    if meta.get("nbits") != 4:
        raise ArgumentError(f"nbits: expected 4, got {meta.get('nbits')}")
    return [base.W_q, meta["scale"], meta["zero"]]


def _read_hqq(base: Any) -> BlockWeight:
    meta = base.meta
    W_q = base.W_q.data
    return from_hqq(
        W_q.view(meta["unpack_view_dtype"]) if meta["view_as_float"] else W_q,
        meta["scale"],
        meta["zero"],
        shape=tuple(meta["shape"]),
        group_size=meta["group_size"],
        dtype=meta.get("compute_dtype", torch.float16),
        packing=meta["packing"],
        axis=meta["axis"],
    )


def _of_gptqmodel(base: Any) -> list[Tensor]:
    return [base.qweight, base.qzeros, base.scales, *([base.g_idx] if _has_order(base) else [])]


def _has_order(base: Any) -> bool:
    return getattr(base, "g_idx", None) is not None


def _check_gptqmodel(base: Any) -> None:
    """Refuse what its layers may do besides: an input that is rotated, an adapter of its own."""
    for name in ("planar", "adapter", "rotation"):
        if getattr(base, name, None):
            raise ArgumentError(f"{name}: expected none, got {getattr(base, name)}")


def _read_gptq(base: Any) -> BlockWeight:
    _check_gptqmodel(base)
    g_idx = base.g_idx if _has_order(base) else None
    less_one = base.qzero_format() == 1
    tensors = (base.qweight, base.qzeros, base.scales, g_idx)
    return from_gptq(*tensors, zeros_less_one=less_one, bits=base.bits)


def _read_awq(base: Any) -> BlockWeight:
    _check_gptqmodel(base)
    return from_awq(base.qweight, base.qzeros, base.scales, bits=base.bits)


# Those that keep the tensors of the checkpoint; others pack them anew for one kernel.
_GPTQMODEL = {"TorchLinear": _read_gptq, "AwqTorchLinear": _read_awq}


def _of_torchao(base: Any) -> list[Tensor]:
    weight = base.weight
    own = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    return [part for part in (*own, getattr(weight, "per_tensor_scale", None)) if part is not None]


def _read_nvfp4(base: Any) -> BlockWeight:
    weight = base.weight
    if weight.is_swizzled_scales:
        raise ArgumentError("is_swizzled_scales: expected False, got True")
    if weight.act_quant_kwargs is not None:
        raise ArgumentError("act_quant_kwargs: expected None, got quantized activations")
    scale, total = weight.scale.contiguous(), weight.per_tensor_scale
    options = {"tensor_scale": None if total is None else total.float().reshape(1)}
    shape = tuple(weight.shape)
    return BlockWeight("nvfp4", weight.qdata, scale, shape, weight.dtype, 16, **options)


def _read_int8(base: Any) -> BlockWeight:
    weight = base.weight
    if weight.target_dtype is not torch.int4:
        raise ArgumentError(f"target_dtype: expected torch.int4, got {weight.target_dtype}")
    if weight.activation_quantization is not None:
        raise ArgumentError("activation_quantization: expected None, got quantized activations")
    return from_int8(weight.qdata, weight.scale, weight.zero_point, dtype=weight.dtype)


_TORCHAO = {"NVFP4Tensor": _read_nvfp4, "IntxUnpackedToInt8Tensor": _read_int8}


class PatchedGPTQLoraLinear(OtherBase, gptq.GPTQLoraLinear):
    """PEFT's `lora.GPTQLoraLinear` with the base layer and its first adapter as one op."""

    original = gptq.GPTQLoraLinear


class PatchedAwqLoraLinear(OtherBase, awq.AwqLoraLinear):
    """PEFT's `lora.AwqLoraLinear` with the base layer and its first adapter as one op."""

    original = awq.AwqLoraLinear


class PatchedTorchaoLoraLinear(OtherBase, torchao.TorchaoLoraLinear):
    """PEFT's `lora.TorchaoLoraLinear` with the base layer and its first adapter as one op."""

    original = torchao.TorchaoLoraLinear


SWAPS: dict[type, type] = {
    kind.original: kind
    for kind in (PatchedGPTQLoraLinear, PatchedAwqLoraLinear, PatchedTorchaoLoraLinear)
}

if hasattr(hqq, "HqqLoraLinear"):  # PEFT has it where HQQ is installed

    class PatchedHqqLoraLinear(OtherBase, hqq.HqqLoraLinear):
        """PEFT's `lora.HqqLoraLinear` with the base layer and its first adapter as one op."""

        original = hqq.HqqLoraLinear

    SWAPS[hqq.HqqLoraLinear] = PatchedHqqLoraLinear
