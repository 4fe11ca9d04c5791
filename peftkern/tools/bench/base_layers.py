"""Layers of providers, and frozen linear layers as users have them: dense, or bitsandbytes' NF4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """Layer of a provider: `run(x)`, or `run()` of what is no layer.

    adapter: leaves lora_A, lora_B and DoRA's magnitude, or (). collect: names the results of
    `run()`, a single tensor's name is that of the op. no_graph: a reason against a CUDA graph; a
    failed capture can break all that comes later. multiplied: too slow to repeat, so one call is
    timed and its time multiplied by this.
    """

    run: Callable[..., object]
    adapter: tuple[Tensor, ...] = ()
    collect: Callable[[object], Tensors] | None = None
    no_graph: str | None = None
    multiplied: int = 0


def has(package: str) -> bool:
    """Return whether a package is installed; a folder of that name is not enough."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")  # meta: draws no weight to throw away
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def linear4bit(weight: Tensor) -> nn.Module:
    """Quantize to bitsandbytes' layer: NF4, double quantization, compute in weight's dtype."""
    import bitsandbytes as bnb

    layer = _empty_linear4bit(weight.shape, weight.dtype)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        blocksize=64,
    )
    return layer.to(weight.device)


def prequantized(
    packed: Tensor, stats: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> nn.Module:
    """Build bitsandbytes' layer over packed bytes and their `stats`, in its own keys."""
    import bitsandbytes as bnb

    layer = _empty_linear4bit(shape, dtype)
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        packed, stats, device=packed.device, module=layer
    )
    return layer


def _empty_linear4bit(shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    n, k = shape
    return bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
