"""Frozen linear layers as users have them: dense, or bitsandbytes' NF4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
