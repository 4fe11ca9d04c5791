"""Peers as users have them: real PEFT layers over bitsandbytes or dense weights.

A pool holds several copies of one layer, together larger than the caches, because a model never
meets the same weight twice in a row. All copies hold the same numbers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.layers import BlockLinear, NF4Linear
from peftkern.tools.bench.base_layers import prequantized
from peftkern.tools.bench.cases import SCALING, Problem
from peftkern.tools.bench.data import grouped_mm


@functools.cache
def bitsandbytes_missing(device: torch.device) -> str | None:
    """Return why bitsandbytes is no peer on a device, or None: it may lack this CUDA's library."""
    try:
        import bitsandbytes.functional as bnb

        bnb.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # an import error, or one of many kinds from its loader
        return f"bitsandbytes: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


class Layers(nn.Module):
    """Minimal model for get_peft_model, which asks a model whether it is in 4 bits."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.is_loaded_in_4bit = any(type(layer).__name__ == "Linear4bit" for layer in layers)


def nf4_linear(weight: Tensor) -> nn.Module:
    """Quantize to bitsandbytes' layer, double quantization included, or ours without it."""
    with peftkern.use_backend(None):  # even if the case forces a back end
        return nf4_layer(peftkern.quantize_nf4(weight))


def packed_layer(weight: QuantizedWeight) -> nn.Module:
    """Build bitsandbytes' layer over its own formats, ours over the others."""
    if isinstance(weight, NF4Weight):
        return nf4_layer(weight)
    return BlockLinear.from_weight(weight)


def nf4_layer(weight: peftkern.NF4Weight, bias: nn.Parameter | None = None) -> nn.Module:
    """Build bitsandbytes' layer over this weight, or ours where bitsandbytes does not run."""
    if bitsandbytes_missing(weight.device) is not None:
        return NF4Linear._from_stored(weight, bias, True)
    state = weight.state_dict()
    packed = state.pop("weight")
    stats = {name.removeprefix("weight."): tensor for name, tensor in state.items()}
    layer = prequantized(packed, stats, weight.shape, weight.dtype)
    layer.bias = bias
    return layer


def lora_pool(
    layer: nn.Module,
    copies: int,
    *,
    r: int,
    patched: bool,
    train: bool,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    adapters: tuple[Tensor, Tensor] | None = None,
    magnitude: Tensor | None = None,
    use_dora: bool = False,
) -> list:
    """Build PEFT's LoRA layers over copies of `layer`; fp32 adapters by default, B not zero.

    `adapters`: A and B, drawn if not given; `magnitude`: of DoRA.
    """
    torch.manual_seed(1)
    kind = {"lora_dropout": dropout, "use_dora": use_dora or magnitude is not None}
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=r"layers\.\d+", **kind)
    model = get_peft_model(Layers([copy.deepcopy(layer) for _ in range(copies)]), config)
    if patched:
        report = peftkern.patch(model)
        if len(report.patched) != copies:
            raise RuntimeError(f"peftkern.patch left layers out: {report}")
    pool = list(model.base_model.model.layers)
    generator = torch.Generator().manual_seed(2)
    if adapters is None:
        a, b = pool[0].lora_A["default"].weight, pool[0].lora_B["default"].weight
        new_a = torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5
        adapters = new_a, torch.randn(b.shape, generator=generator) * 0.1
    with torch.no_grad():
        for member in pool:
            for part, new in zip((member.lora_A, member.lora_B), adapters, strict=True):
                part["default"].to(adapter_dtype).weight.copy_(new)
            if magnitude is not None:
                member.lora_magnitude_vector["default"].weight.copy_(magnitude)
    model.train(train)
    return pool


def adapter_of(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return the trained parameters of PEFT's layer: A, B, and DoRA's magnitude."""
    groups = (layer.lora_A, layer.lora_B, getattr(layer, "lora_magnitude_vector", {}))
    return tuple(group["default"].weight for group in groups if "default" in group)


class Experts(nn.Module):
    """Experts' layer as transformers runs it: one product over the groups."""

    def __init__(self, weight: Tensor, offsets: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.offsets = offsets

    def forward(self, x: Tensor) -> Tensor:
        return grouped_mm(x, self.weight, self.offsets)


def expert_pool(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list:
    """Build PEFT's wrappers of a stack of experts, which add the update to the weight."""
    layers = [Experts(tensors["weight"], tensors["offsets"]) for _ in range(copies)]
    r, names = problem.r, [f"layers.{i}.weight" for i in range(copies)]
    config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=[], target_parameters=names)
    pool = list(get_peft_model(Layers(layers), config).base_model.model.layers)
    with torch.no_grad():
        for one in pool:
            for name in ("lora_A", "lora_B"):
                getattr(one, name)["default"].weight.copy_(tensors[name])
    return [one.train(problem.mode != "no-grad") for one in pool]


def compiled(layers: list[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """Compile layers that differ only in their numbers: one compilation serves all."""
    torch._dynamo.reset()  # else a second number of rows compiles dynamic shapes
    run = torch.compile(lambda layer, x: layer(x))
    return [functools.partial(run, layer) for layer in layers]
