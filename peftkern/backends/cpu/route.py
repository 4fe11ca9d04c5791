"""The sort of pairs of token and expert in C++: one call in the place of a dozen of torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import library, refusal_device
from peftkern.backends.pointers import CPU, each, fresh
from peftkern.backends.reference.route import negative

refusal = refusal_device


def route(
    top_k_index: Tensor, top_k_weights: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, (T, top) = top_k_index.contiguous(), top_k_index.shape
    weights = index.new_empty(0) if top_k_weights is None else top_k_weights.contiguous()
    pairs = T * top
    rows = torch.empty(pairs, dtype=torch.int32, device="cpu")
    offsets = torch.empty(num_experts, dtype=torch.int32, device="cpu")
    inverse = torch.empty((T, top), dtype=torch.int64, device="cpu")
    row_weights = torch.empty(weights.numel(), dtype=weights.dtype, device="cpu")
    index_at, weights_at = each(
        CPU,
        ("top_k_index", index, index.dtype, pairs),
        ("top_k_weights", None if top_k_weights is None else weights, weights.dtype, pairs),
    )
    smallest = library().route(
        *(T, top, num_experts, index_at, index.dtype is torch.int64),
        *(weights_at, weights.itemsize),
        *map(fresh, (rows, offsets, inverse, row_weights)),
    )
    if smallest < 0:
        raise negative(smallest)
    return rows, offsets, inverse, row_weights
