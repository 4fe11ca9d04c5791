"""Peers as users have them: real PEFT layers over bitsandbytes or dense weights.

A pool holds several copies of one layer, together larger than the caches, because a model never
meets the same weight twice in a row. All copies hold the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftkern
from peftkern.backends.dropout import philox_keep
from peftkern.functional.arguments import draw_keep
from peftkern.layers import NF4Linear
from peftkern.tools.bench.base_layers import linear, linear4bit, prequantized
from peftkern.tools.bench.cases import SCALING, Problem
from peftkern.tools.bench.data import grouped_mm, nf4_values64

SEED = 5  # of the random numbers of a checked call


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
    """Build bitsandbytes' layer, or ours with the same weight where there is no bitsandbytes."""
    if bitsandbytes_missing(weight.device) is None:
        return linear4bit(weight)
    with peftkern.use_backend(None):  # even if the case forces a back end
        return NF4Linear.from_linear(linear(weight))


def nf4_layer(weight: peftkern.NF4Weight, bias: nn.Parameter | None = None) -> nn.Module:
    """Build bitsandbytes' layer over this weight, or ours where bitsandbytes does not run."""
    if bitsandbytes_missing(weight.device) is not None:
        return NF4Linear._from_nf4(weight, bias, True)
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
    use_dora: bool = False,
) -> list:
    """Build PEFT's LoRA layers over copies of `layer`; fp32 adapters by default, B not zero.

    `adapters`: A and B, drawn if not given.
    """
    torch.manual_seed(1)
    kind = {"lora_dropout": dropout, "use_dora": use_dora}
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
    model.train(train)
    return pool


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


def forward(layers: list, xs: list[Tensor], autocast: bool = False) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def call(i: int) -> Tensor:
        x = xs[i % len(xs)]
        with _autocast(x, autocast):
            return layers[i % len(layers)](x)

    return call


def forward_backward(
    layers: list, xs: list[Tensor], dy: Tensor, modules: list | None = None, autocast: bool = False
) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a call for the output and the gradients of x and of both adapters, as in training.

    `modules`: the owners of the adapters, where the layers are functions of them.
    """
    modules = layers if modules is None else modules

    def call(i: int) -> tuple[Tensor, ...]:
        module, x = modules[i % len(modules)], xs[i % len(xs)]
        with _autocast(x, autocast):
            y = layers[i % len(layers)](x)
        wanted = [x]
        if hasattr(module, "lora_A"):
            wanted += [module.lora_A["default"].weight, module.lora_B["default"].weight]
        return y.detach(), *torch.autograd.grad(y, wanted, dy)

    return call


def _autocast(x: Tensor, wanted: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, x.dtype) if wanted else contextlib.nullcontext()


def kept(x: Tensor, dropout: float, patched: bool, adapter_dtype: torch.dtype) -> Tensor | None:
    """Return the mask of dropout in the first call after torch.manual_seed(SEED)."""
    if dropout == 0.0:
        return None
    torch.manual_seed(SEED)
    x = x.detach()
    if patched:
        keep = draw_keep(x, dropout)
        return keep if keep.dtype is torch.bool else philox_keep(keep, *x.shape, dropout)
    return F.dropout(torch.ones_like(x, dtype=adapter_dtype), dropout) != 0


def nf4_weight64(layer: nn.Module) -> Tensor:
    """Dequantize a layer's weight in float64 and plain torch."""
    weight = layer.nf4 if isinstance(layer, NF4Linear) else None
    if weight is None:
        weight = peftkern.NF4Weight.from_bitsandbytes(layer.weight)
    return nf4_values64(weight, 0, weight.numel).view(weight.shape)


def lora_oracle(
    x: Tensor,
    weight64: Tensor,
    layer: nn.Module | None,
    dy: Tensor | None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """Compute `forward` (no dy) or `forward_backward` in float64; no layer: no LoRA."""
    x = x.detach().double()
    y = x @ weight64.T
    dy = None if dy is None else dy.double()
    if layer is None:
        return (y,) if dy is None else (y, dy @ weight64)
    factor = 1.0 if keep is None else keep.double() / (1.0 - dropout)
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling["default"]
    dropped = x * factor
    s = scaling * (dropped @ a.T)
    y += s @ b.T
    if dy is None:
        return (y,)
    ds = scaling * (dy @ b)
    return y, dy @ weight64 + (ds @ a) * factor, ds.T @ dropped, dy.T @ s
