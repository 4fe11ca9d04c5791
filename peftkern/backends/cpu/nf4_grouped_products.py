"""Products of groups of rows with their own weights out of an NF4 stack, in C++.

No weight is made dense: a group's is decoded where it is multiplied, once for all of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.crossovers import few_rows
from peftkern.backends.cpu.module import isa_and_threads, library
from peftkern.backends.pointers import CPU, dtype_code, each, weight


def forward_product(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    out: Tensor,
) -> None:
    """Write x[rows] @ W[e].T to out [R, N]; zeros for rows of no group.

    Args: x [T, K] float32 or bfloat16; rows int32 [R] or None; offsets int32 [E]; the weights
        [E, N, K], or [E, K, N] if transposed, or one for all groups; out in the dtype of x or
        float32, to which sums are rounded once.
    """
    _product(x, rows, offsets, w, layout, transposed, out)


def backward_product(
    dy: Tensor,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    out: Tensor,
) -> None:
    """Write dy @ W[e] to out [R, K] likewise."""
    _product(dy, None, offsets, w, layout, not transposed, out)


def _product(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    over_rows: bool,
    out: Tensor,
) -> None:
    """Compute x @ M.T for each [N, K] of the stack, or x @ M `over_rows`; all contiguous."""
    *_, N, K = layout
    T, R, E = x.shape[0], out.shape[0], offsets.numel()
    inner, outer = (N, K) if over_rows else (K, N)
    x_at, rows_at, offsets_at, out_at = each(
        CPU,
        ("x", x, x.dtype, T * inner),
        ("rows", rows, torch.int32, R),
        ("offsets", offsets, torch.int32, E),
        ("out", out, out.dtype, R * outer),
    )
    isa, threads = isa_and_threads()
    few = "few_rows_backward" if over_rows else "few_rows"
    library().nf4_grouped_linear(
        *(isa, threads, (R, E, T, offsets_at, rows_at), N, K, weight(w, layout), over_rows),
        *(x_at, dtype_code("x", x), out_at, dtype_code("out", out)),
        few_rows(few, isa, x.dtype),
    )
