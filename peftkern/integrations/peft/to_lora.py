"""PEFT's `convert_to_lora` on live models: any additive adapter as LoRA of a scaling of 1.

config, state_dict = convert_to_lora(model, rank=16)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import PREFIX, rank_fields
from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.integrations.peft.adapter_tools import factors_of, singular_form
from peftkern.methods.low_rank_algebra import best_pair, dora_weight, keeping, truncate
from peftkern.methods.rank_rules import RankRule

__all__ = ["convert_to_lora"]


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter of a live PEFT model to a LoRA adapter, as PEFT's function does.

    Every layer's update becomes its best approximation of an int `rank`, or of the least rank that
    keeps a float `rank` as share of the squared singular values. Scaling is 1, lora_A has
    orthonormal rows. LoRA's updates take no m x n matrix; others are formed one layer at a time.

    Where PEFT is right the result is the same up to rounding and the signs of singular vectors. It
    differs where PEFT is not:

    - DoRA: the update is that of the whole layer, m / |W + D| (W + D) - W, whose rank is full; PEFT
      leaves out the magnitudes m. Merged layers are refused.
    - aLoRA, Arrow and other variants whose update is not one of the weight alone: refused.
    - lora_bias is refused, as bias is by both; PEFT leaves it out.
    - LoRA over a 4-bit or 8-bit linear layer is converted; PEFT refuses it.
    - A rank above that of a LoRA update is filled up with zeros instead of noise.
    - compile_kwargs has no effect, and there is no warning that LoRA is converted to LoRA.

    Returns: the config and the tensors as `save_pretrained` names them: write them with
        safetensors' save_file and the config's save_pretrained.
    Raises: TypeError or ValueError as PEFT does.
    """
    _check_rank(rank)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    layers = {n: m for n, m in model.named_modules() if _has_adapter(m, adapter_name)}
    _check_supported(layers, config, adapter_name)
    pairs = dict(_low_rank(layers, rank, adapter_name))
    for name, layer in layers.items():
        if name not in pairs:
            pairs[name] = _dense(name, layer, rank, adapter_name)
    found = _new_config(config, rank)
    state_dict, ranks = {}, {}
    for name in layers:
        lora_B, lora_A = pairs[name]
        short = name.removeprefix(PREFIX)
        ranks[short] = lora_A.shape[0]
        if ranks[short] == rank and not isinstance(found.target_modules, str):
            found.target_modules.add(short)
        state_dict[f"{name}.lora_A.weight"] = lora_A.contiguous()
        state_dict[f"{name}.lora_B.weight"] = lora_B.contiguous()
    for field, value in rank_fields(ranks, found.r).items():
        setattr(found, field, value)
    if config is not None and getattr(config, "modules_to_save", None):
        found.modules_to_save = copy.copy(config.modules_to_save)
        state_dict |= _saved_modules(model, adapter_name)
    return found, state_dict


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank: expected a share in (0, 1] where it is a float, got {rank}")
    if rank < 1 and not isinstance(rank, float):
        raise ValueError(f"rank: expected at least 1, got {rank}")


def _has_adapter(module: nn.Module, name: str) -> bool:
    names = module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ()
    return any(name in getattr(module, held) for held in names)


def _check_supported(
    layers: dict[str, BaseTunerLayer], config: PeftConfig | None, adapter_name: str
) -> None:
    """Raise as PEFT does for what cannot be converted, and for what it converts wrongly."""
    if not layers:
        raise TypeError(f"model: expected layers with an adapter {adapter_name!r}, got none")
    for name, layer in layers.items():
        variant = getattr(layer, "lora_variant", {}).get(adapter_name)
        quantized = isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear)
        able = getattr(layer, "supports_lora_conversion", lambda name: False)  # older PEFT
        if not (quantized or able(adapter_name)):
            raise TypeError(f"{name}: {type(layer).__name__} cannot be converted to LoRA")
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            kind = type(variant).__name__
            raise TypeError(f"{name}: the update of {kind} is no update of the weight alone")
        if variant is not None and layer.merged:
            raise ValueError(f"{name}: DoRA's update is of the weight as it was: unmerge first")
    bias = getattr(config, "bias", "none")
    if bias not in (None, False, "none") or getattr(config, "lora_bias", False):
        raise ValueError(f"bias: expected an adapter without, got bias={bias} or lora_bias")


def _low_rank(
    layers: dict[str, BaseTunerLayer], rank: int | float, adapter_name: str
) -> Iterator[tuple[str, LoraFactors]]:
    """Yield the factors of every plain LoRA layer, by the SVD of its pair."""
    plain: dict[torch.device, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, LoraLayer) and adapter_name not in layer.lora_variant:
            pair = factors_of(layer, adapter_name)
            if pair is not None:
                plain.setdefault(pair[0].device, []).append(name)
    rule = RankRule("rank" if isinstance(rank, int) else "energy", rank)
    for names in plain.values():
        pairs = [factors_of(layers[name], adapter_name) for name in names]
        lora_B, lora_A = ([factor.detach() for factor in side] for side in zip(*pairs, strict=True))
        scaling = [layers[name].scaling[adapter_name] for name in names]
        for name, B, A, pair in zip(
            names,
            lora_B,
            lora_A,
            truncate(lora_B, lora_A, scaling, rule, names=names)[0],
            strict=True,
        ):
            pair = _filled(name, pair, rank, (B.shape[0], A.shape[1]))
            yield name, LoraFactors(*(factor.to(B.dtype) for factor in pair))


def _filled(name: str, pair: LoraFactors, rank: int | float, shape: tuple[int, int]) -> LoraFactors:
    """Return the pair with lora_A orthonormal, filled up with zeros to an int rank."""
    lora_B, lora_A = singular_form(pair)
    if not isinstance(rank, int):
        return LoraFactors(lora_B, lora_A)
    if rank > min(shape):
        raise ValueError(f"rank: expected at most {min(shape)}, as {name} has, got {rank}")
    more = rank - lora_A.shape[0]
    return LoraFactors(F.pad(lora_B, (0, more)), F.pad(lora_A, (0, 0, 0, more)))


def _dense(name: str, layer: BaseTunerLayer, rank: int | float, adapter_name: str) -> LoraFactors:
    """Return the factors of a layer whose update is formed densely."""
    if hasattr(layer, "miss_fn"):  # whose update is already a product, of a shape of its own
        from peft.tuners.lora.conversion import _convert_miss_module_to_lora

        lora_A, lora_B, _ = _convert_miss_module_to_lora(layer, rank, adapter_name)
        return LoraFactors(lora_B, lora_A)
    if getattr(layer, "lora_variant", {}):
        update, dtype = _dora_update(layer, adapter_name), layer.lora_B[adapter_name].weight.dtype
    else:
        update = layer.get_delta_weight(adapter_name)
        dtype, update = update.dtype, update.float()
    if isinstance(layer.get_base_layer(), Conv1D):
        update = update.T
    pair, *_ = best_pair(update, rank if isinstance(rank, int) else keeping(rank))
    pair = _filled(name, pair, rank, tuple(update.shape))
    return LoraFactors(*(factor.to(dtype) for factor in pair))


def _dora_update(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Return m / |W + D| (W + D) - W in float32, norms over rows, as the layer keeps its weight."""
    base = layer.get_base_layer()
    own = getattr(base, "dequantize", None)  # peftkern's NF4 layers
    weight = (own() if callable(own) else dequantize_module_weight(base)).float()
    lora_B, lora_A = (factor.float() for factor in factors_of(layer, adapter_name))
    update = (lora_B @ lora_A).mul_(layer.scaling[adapter_name])
    turned = getattr(layer, "fan_in_fan_out", False)
    rows = weight.T if turned else weight
    found = dora_weight(rows, update, layer.lora_magnitude_vector[adapter_name].weight) - rows
    return found.T if turned else found


def _new_config(config: PeftConfig | None, rank: int | float) -> LoraConfig:
    """Return the config of the result, whose patterns are still to come."""
    fields = {"r": rank if isinstance(rank, int) else 1}  # others are in the patterns
    if config is None:
        return LoraConfig(**fields, target_modules=[])
    for name in ("base_model_name_or_path", "layers_pattern", "layers_to_transform"):
        if hasattr(config, name):
            fields[name] = getattr(config, name)
    return LoraConfig(**fields, target_modules=copy.copy(config.target_modules))


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                found[f"{name}.{key}"] = tensor
    return found
