"""The peers as users have them: real PEFT layers over bitsandbytes or dense weights.

A pool holds several copies of one layer, together larger than the caches, because a model never
meets the same weight twice in a row. All copies hold the same numbers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import peftkern


class Layers(nn.Module):
    """Something for get_peft_model to adapt."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def linear4bit(weight: Tensor, blocksize: int = 64) -> bnb.nn.Linear4bit:
    """bitsandbytes' layer over this weight: NF4, double quantisation, computing in its dtype."""
    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        blocksize=blocksize,
    )
    return layer.to("cpu")


def linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def lora_pool(layer: nn.Module, copies: int, *, r: int, patched: bool, train: bool) -> list:
    """PEFT's LoRA layers over copies of `layer`, with PEFT's default fp32 adapters, B not zero."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=r"layers\.\d+")
    model = get_peft_model(Layers([copy.deepcopy(layer) for _ in range(copies)]), config)
    if patched:
        report = peftkern.patch(model)
        if len(report.patched) != copies:
            raise RuntimeError(f"peftkern.patch left layers out: {report}")
    pool = list(model.base_model.model.layers)
    generator = torch.Generator().manual_seed(2)
    a, b = pool[0].lora_A["default"].weight, pool[0].lora_B["default"].weight
    new_a = torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5
    new_b = torch.randn(b.shape, generator=generator) * 0.1
    with torch.no_grad():
        for member in pool:
            member.lora_A["default"].weight.copy_(new_a)
            member.lora_B["default"].weight.copy_(new_b)
    model.train(train)
    return pool


def forward(layers: list[nn.Module], x: Tensor) -> Callable[[int], Tensor]:
    @torch.no_grad()
    def call(i: int) -> Tensor:
        return layers[i % len(layers)](x)

    return call


def forward_backward(
    layers: list[nn.Module], x: Tensor, dy: Tensor
) -> Callable[[int], tuple[Tensor, ...]]:
    """The output and the gradients of x and of both adapters, as training needs them."""

    def call(i: int) -> tuple[Tensor, ...]:
        layer = layers[i % len(layers)]
        y = layer(x)
        wanted = [x]
        if hasattr(layer, "lora_A"):
            wanted += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return y.detach(), *torch.autograd.grad(y, wanted, dy)

    return call


def nf4_weight64(param: bnb.nn.Params4bit) -> Tensor:
    """The weight that the packed bytes stand for, in float64 and in plain torch."""
    state = param.quant_state
    packed = param.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: state.shape.numel()]
    nested = state.state2
    groups = torch.arange(state.absmax.numel()) // nested.blocksize
    absmax = nested.code.double()[state.absmax.long()] * nested.absmax.double()[groups]
    absmax += state.offset.double()
    blocks = torch.arange(codes.numel()) // state.blocksize
    return (state.code.double()[codes.long()] * absmax[blocks]).view(state.shape)


def lora_oracle(
    x: Tensor, weight64: Tensor, layer: nn.Module | None, dy: Tensor | None
) -> tuple[Tensor, ...]:
    """In float64 what `forward` (no dy) or `forward_backward` give; no layer: without LoRA."""
    x = x.detach().double()
    y = x @ weight64.T
    dy = None if dy is None else dy.double()
    if layer is None:
        return (y,) if dy is None else (y, dy @ weight64)
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling["default"]
    s = scaling * (x @ a.T)
    y += s @ b.T
    if dy is None:
        return (y,)
    ds = scaling * (dy @ b)
    return y, dy @ weight64 + ds @ a, ds.T @ x, dy.T @ s
