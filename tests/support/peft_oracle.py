"""A PEFT layer in float64 beside the same layer under PEFT and under peftkern."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel
from peft_models import K, N, fallbacks, layer_of, lora_net, patched_copy, served_by_us
from tolerances import DORA_DROPPED_MAGNITUDE_RMS, assert_as_accurate_as_torch, errors
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


def dora_net(base: nn.Module, **config: Any) -> PeftModel:
    """A DoRA adapter whose lengths have been trained away from the norms they start at."""
    model = lora_net(base, use_dora=True, **config)
    stretch_magnitudes(model)
    return model


def stretch_magnitudes(model: nn.Module) -> None:
    torch.manual_seed(6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))


def norms_computed() -> int:
    """How often a norm came from our op: once per DoRA adapter and call."""
    calls = peftkern.stats().calls
    return sum(n for (op, _), n in calls.items() if op in ("dora_norm", "nf4_dora_norm"))


def assert_like_peft(
    model: nn.Module, x: Tensor, *, computes_in: torch.dtype, autocast: bool = False
) -> None:
    """Served by our ops, and as near to float64 as PEFT, in values and gradients."""
    twin, layer = patched_copy(model), layer_of(model)
    oracle = outputs_and_gradients(oracle_for(model, computes_in), x.double(), False)
    eager = outputs_and_gradients(model, x, autocast)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, x, autocast)
    dora = sum(model.peft_config[name].use_dora for name in layer.active_adapters)
    assert fallbacks() == {} and norms_computed() == dora and (dora or served_by_us() == 1)
    assert got.keys() == eager.keys() == oracle.keys()
    dropped = any(getattr(d, "p", 0.0) for d in layer.lora_dropout.values())
    for name in eager:
        if "magnitude" in name and dropped and computes_in is not torch.float32 and not autocast:
            # PEFT casts the whole weight to float32 for this product; ours stays in its dtype.
            assert errors(got[name], oracle[name])[0] <= DORA_DROPPED_MAGNITUDE_RMS
        else:
            assert_as_accurate_as_torch(got[name], eager[name], oracle[name], x.dtype, computes_in)
