"""A PEFT layer in float64 beside the same layer under PEFT and under peftkern."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft_models import K, N, layer_of, lora_net
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear


def dense_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The base weight [N, K] in float64, with the rounding that computing in `dtype` implies."""
    if isinstance(base, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        return weight.to(dtype).double()
    if isinstance(base, NF4Linear):
        return peftkern.dequantize_nf4(base.nf4, dtype).double()
    weight = base.weight.detach()
    return (weight if isinstance(base, nn.Linear) else weight.t()).to(dtype).double()


def oracle_for(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same adapters in float64 over a dense float64 base."""
    layer = layer_of(model)
    base = layer.base_layer
    dense = nn.Linear(K, N, bias=base.bias is not None).double().requires_grad_(False)
    dense.weight.copy_(dense_weight(base, dtype))
    if base.bias is not None:
        dense.bias.copy_(base.bias.detach())
    configs = dict(model.peft_config)
    first = next(iter(configs))
    twin = lora_net(dense, **adapter_settings(configs[first]))
    for name in list(configs)[1:]:
        twin.add_adapter(
            name, LoraConfig(target_modules=["proj"], **adapter_settings(configs[name]))
        )
    twin.base_model.set_adapter(layer.active_adapters)
    twin.double()
    weights = {n: p.detach().double() for n, p in model.state_dict().items() if "lora_" in n}
    twin.load_state_dict(weights, strict=False)
    layer_of(twin).scaling.update(layer.scaling)
    trained = {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n}
    for n, p in twin.named_parameters():
        p.requires_grad_(trained.get(n, False))
    return twin.train(model.training)


def adapter_settings(config: LoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "use_dora")
    return {name: getattr(config, name) for name in names}


def outputs_and_gradients(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (3, 5, K)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
