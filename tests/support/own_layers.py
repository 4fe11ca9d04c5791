"""LoRA layers that are not PEFT's: one like torchtune's, and one whose base is a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from peft_models import K, N
from torch import Tensor, nn

import peftkern


class AdapterModule(Protocol):
    """torchtune's, whose metaclass is not that of nn.Module."""

    def adapter_params(self) -> list[str]: ...


class LoRALinear(nn.Module, AdapterModule):
    """As torchtune's, but for its quantized base."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int = 4,
        alpha: float = 6.0,
        dropout: float = 0.0,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.disabled = rank, alpha, False
        linear = nn.Linear(in_dim, out_dim, bias=use_bias).requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout = nn.Dropout(p=dropout) if dropout > 0.0 else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


def read(layer: LoRALinear) -> peftkern.LoRAParts | str:
    """Read such a layer in ten lines."""
    if layer.disabled:
        return "adapters are disabled"
    return peftkern.LoRAParts(
        layer.weight,
        layer.lora_a.weight,
        layer.lora_b.weight,
        scaling=layer.alpha / layer.rank,
        dropout=layer.dropout,
        bias=layer.bias,
    )


class Over(nn.Module):
    """LoRA over any frozen layer, with the dropout of torch.nn.functional."""

    def __init__(self, base: nn.Module, K: int, N: int, r: int = 4, p: float = 0.0) -> None:
        super().__init__()
        self.base, self.p, self.off = base.requires_grad_(False), p, False
        self.A, self.B = nn.Parameter(torch.randn(r, K) / K), nn.Parameter(torch.randn(N, r) / r)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.off:
            return y
        return y + 0.5 * F.dropout(x, self.p, self.training) @ self.A.T @ self.B.T


def read_over(layer: Over) -> peftkern.LoRAParts:
    """Read such a layer: without an adapter where it is off."""
    if layer.off:
        return peftkern.LoRAParts(layer.base, None, None)
    return peftkern.LoRAParts(layer.base, layer.A, layer.B, scaling=0.5, dropout=layer.p)


def layer(dtype: torch.dtype = torch.float32, filled: bool = True, **options) -> LoRALinear:
    torch.manual_seed(1)
    one = LoRALinear(K, N, **options).to(dtype)
    if filled:
        nn.init.normal_(one.lora_b.weight, std=0.3)
    return one


def results(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients of a call."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = call(x)
    y.square().mean().backward()
    found = [y.detach(), x.grad, *[p.grad for p in module.parameters() if p.grad is not None]]
    module.zero_grad(set_to_none=True)
    return found
