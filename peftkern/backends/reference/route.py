"""Oracle of the sort of pairs of token and expert, in plain torch: what GPUs and graphs run."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.formats.nf4 import ArgumentError


def route(
    top_k_index: Tensor, top_k_weights: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort pairs by expert, tokens in order within each; ids from num_experts on are one, the last.

    Args: top_k_index int32|int64 [T, top]; top_k_weights [T, top] or None.
    Returns: rows int32 [T * top], the token of each sorted row; offsets int32 [num_experts], the
        ends of the experts' rows; inverse int64 [T, top], the sorted row of each pair; the weight
        of each sorted row, [0] without weights.
    Raises: ArgumentError on a CPU on a negative id; elsewhere the device asserts it.
    """
    ids, order = top_k_index.reshape(-1).clamp(max=num_experts).sort(stable=True)
    if len(ids):
        _check_first(ids[0])
    ends = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    offsets = torch.searchsorted(ids, ends, right=True, out_int32=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    rows = order.div(max(1, top_k_index.shape[1]), rounding_mode="floor").int()
    if top_k_weights is None:
        row_weights = top_k_index.new_empty(0)
    else:
        row_weights = top_k_weights.reshape(-1).index_select(0, order)
    return rows, offsets, inverse.view(top_k_index.shape), row_weights


def _check_first(smallest: Tensor) -> None:
    """Check the smallest id; a GPU is not waited for."""
    if torch.compiler.is_compiling() or not smallest.is_cpu:
        torch._assert_async(smallest >= 0, "top_k_index: expected ids of experts, got a negative")
    elif smallest < 0:
        raise negative(int(smallest))


def negative(smallest: int) -> ArgumentError:
    """Return the error for the smallest id of a call."""
    return ArgumentError(f"top_k_index: expected ids from 0 on, got {smallest}")
