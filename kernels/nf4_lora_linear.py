"""LoRA over a 4-bit weight on a GPU.

Few rows: one kernel multiplies x with the packed weight (in bitsandbytes' own layout) and with
lora_A, a second adds the partial sums in a fixed order, the update and the bias. The weight is the
left operand, its even and odd columns are two products (no interleaving), and a block's scale is
applied to its float32 sums; where a tile has several blocks in a row, or blocks have zeros, each
weight is scaled. More rows: dequantize once into scratch in the dtype of the activations, then as
over a dense weight. That scratch comes from torch's caching allocator, which hands the same block
to every layer on a stream, and is safe in a CUDA graph.

Weight bytes: 0.516 per weight fused, against 0.516 + 2 + 2 for dequantizing and cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.dropout import keep_scale, keep_threshold
from peftkern.formats.table import stored
from peftkern.kernels.configs import (
    COLUMNS_LEAST,
    RANK_LEAST,
    Problem,
    ceil_div,
    nf4_fused_rows,
)
from peftkern.kernels.interpreter import dot, dropped, narrow
from peftkern.kernels.launch import (
    Plan,
    code_table,
    config_for,
    launch,
    planned,
    rows_of,
    traits,
    whole_blocks,
)
from peftkern.kernels.lora_linear import update_gradients
from peftkern.kernels.low_rank_update import refusal, update_epilogue, update_forward
from peftkern.kernels.nf4 import nf4_dequantize
from peftkern.kernels.primitives import (
    SCALES,
    dot_factor,
    join_sums,
    keep_mask,
    nf4_codes,
    nf4_shared,
    nf4_tile,
)


@triton.jit(do_not_specialize=["M", "blocks", "threshold"])
def _nf4_forward_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    aux_ptr,
    code2_ptr,
    offset_ptr,
    table_ptr,
    a_ptr,
    seed_ptr,
    y_ptr,
    s_ptr,
    M,
    N,
    K,
    r,
    blocks,
    threshold,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute partial x @ W.T [split, M, N]; programs past N's last tile: x @ A.T [split, M, r]."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    row = rows.to(tl.int64)
    first = split * blocks * BLOCK_K  # a multiple that the compiler sees, so it aligns the loads
    last = tl.minimum(first + blocks * BLOCK_K, K)
    if tile * BLOCK_N < N:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = n.to(tl.int64) * K
        shared = nf4_shared(aux_ptr, offset_ptr, FORMAT, NESTED_BLOCKSIZE)
        weight = (packed_ptr, scale_ptr, aux_ptr, code2_ptr, shared)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(first, last, BLOCK_K):  # K is whole tiles of whole blocks
            byte = (weight_row + start)[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            block = (weight_row + start) // BLOCKSIZE
            packed, scale, zero = nf4_tile(
                weight,
                byte,
                (n < N)[:, None],
                block,
                n < N,
                FORMAT,
                NESTED_BLOCKSIZE,
                BLOCK_K // BLOCKSIZE,
            )
            columns = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + row[:, None] * K + columns[None, :], mask=in_rows[:, None], other=0.0
            )
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            if BLOCK_K > BLOCKSIZE or SCALES[FORMAT] == "scale_zero":
                w_even, w_odd = nf4_codes(packed, zero, table_ptr, tl.float32, FORMAT, PTX)
                total += dot(narrow(w_even * scale, x.dtype), tl.trans(even), PRECISION)
                total += dot(narrow(w_odd * scale, x.dtype), tl.trans(odd), PRECISION)
            else:
                w_even, w_odd = nf4_codes(packed, zero, table_ptr, x.dtype, FORMAT, PTX)
                part = dot(w_even, tl.trans(even), PRECISION)
                part += dot(w_odd, tl.trans(odd), PRECISION)
                total += part * scale
        place = (split.to(tl.int64) * M + row)[None, :] * N + n[:, None]
        tl.store(y_ptr + place, total, mask=in_rows[None, :] & (n < N)[:, None])
    elif HAS_LORA:
        ranks = (tile - tl.cdiv(N, BLOCK_N)) * BLOCK_R + tl.arange(0, BLOCK_R)
        if HAS_DROPOUT:
            seed = tl.load(seed_ptr)
        coarse = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        fine = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + row[:, None] * K + columns[None, :], mask=in_rows[:, None], other=0.0
            )
            a = tl.load(
                a_ptr + ranks[None, :] * K + columns[:, None], mask=(ranks < r)[None, :], other=0.0
            )
            if HAS_DROPOUT:
                x = dropped(x, keep_mask(seed, rows, start, threshold, BLOCK_K))
            coarse, fine = dot_factor(x, a, coarse, fine, PRECISION)
        s_place = (split.to(tl.int64) * M + row)[:, None] * r + ranks[None, :]
        s = join_sums(coarse, fine)
        tl.store(s_ptr + s_place, s, mask=in_rows[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=["M", "blocks"])
def _nf4_backward_kernel(
    dy_ptr,
    packed_ptr,
    scale_ptr,
    aux_ptr,
    code2_ptr,
    offset_ptr,
    table_ptr,
    dx_ptr,
    M,
    N,
    K,
    blocks,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute partial dy @ W [split, M, K]: the sum is over rows of W, so each weight is scaled."""
    first_column = tl.program_id(0) * BLOCK_K
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    row = rows.to(tl.int64)[:, None]
    shared = nf4_shared(aux_ptr, offset_ptr, FORMAT, NESTED_BLOCKSIZE)
    weight = (packed_ptr, scale_ptr, aux_ptr, code2_ptr, shared)
    total_even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    total_odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    first = split * blocks * BLOCK_N
    for start in range(first, tl.minimum(first + blocks * BLOCK_N, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        place = n.to(tl.int64) * K + first_column
        byte = place[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        block = place // BLOCKSIZE
        packed, scale, zero = nf4_tile(
            weight,
            byte,
            (n < N)[:, None],
            block,
            n < N,
            FORMAT,
            NESTED_BLOCKSIZE,
            BLOCK_K // BLOCKSIZE,
        )
        dy = tl.load(dy_ptr + row * N + n[None, :], mask=in_rows & (n < N)[None, :], other=0.0)
        even, odd = nf4_codes(packed, zero, table_ptr, tl.float32, FORMAT, PTX)
        total_even += dot(dy, narrow(even * scale, dy.dtype), PRECISION)
        total_odd += dot(dy, narrow(odd * scale, dy.dtype), PRECISION)
    total = tl.reshape(tl.join(total_even, total_odd), (BLOCK_M, BLOCK_K))
    columns = first_column + tl.arange(0, BLOCK_K)
    tl.store(dx_ptr + (split.to(tl.int64) * M + row) * K + columns[None, :], total, mask=in_rows)


def refusal_forward(
    x: Tensor,
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    keep: Tensor | None,
) -> str | None:
    return refusal(x, tuple(layout[3:]), lora_A, lora_B, keep)


def refusal_backward(
    dy: Tensor,
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    keep: Tensor | None,
) -> str | None:
    return refusal(dy, tuple(layout[3:]), lora_A, lora_B, keep)


def nf4_lora_linear_forward(
    x: Tensor, w: list[Tensor], layout: list[int], *adapter: Any
) -> tuple[Tensor, Tensor]:
    (N, K), (lora_A, _, bias, *_) = layout[3:], adapter
    rows = rows_of(x, K)
    if _fused(rows, N, layout):
        y, S = fused_forward(rows, w, layout, *adapter)
    elif lora_A is None:
        y, S = F.linear(rows, nf4_dequantize(w, layout, x.dtype), bias), None
    else:
        y, S = update_forward(rows, *adapter)
        if rows.shape[0]:
            y.addmm_(rows, nf4_dequantize(w, layout, x.dtype).t())
    S = x.new_empty(0, dtype=torch.float32) if S is None else S.view(*x.shape[:-1], S.shape[1])
    return y.view(*x.shape[:-1], N), S


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    *adapter: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = layout[3:]
    lora_A, _, _, keep, dropout_p, (need_dx, _, _, need_dbias) = adapter
    rows = rows_of(dy, N)
    fused = need_dx and _fused(rows, K, layout)
    dS = dx = dA = dB = dbias = None
    if lora_A is not None:
        dS, dx, dA, dB, dbias = update_gradients(rows, x, S, *adapter, with_dx=not fused)
    elif need_dbias:
        dbias = rows.sum(0)
    if fused:
        dx = fused_backward(rows, w, layout, dS, lora_A, keep, dropout_p)
    elif need_dx and rows.shape[0]:
        dense = nf4_dequantize(w, layout, dy.dtype)
        dx = rows @ dense if dx is None else dx.addmm_(rows, dense)
    elif need_dx:
        dx = dy.new_empty((0, K))
    if need_dx:
        dx = dx.view(*dy.shape[:-1], K)
    return tuple([dy.new_empty(0) if g is None else g for g in (dx, dA, dB, dbias)])


def _fused(rows: Tensor, columns: int, layout: list[int]) -> bool:
    """Check that the packed weight is multiplied as it is: few rows, blocks that end with rows.

    columns: those of the result, tiles of which keep the processors busy.
    """
    _, blocksize, _, _, K = layout
    on = traits(rows.device)
    most = nf4_fused_rows(on.arch, columns, on.processors, on.cores)
    return 0 < rows.shape[0] <= most and K % max(blocksize, COLUMNS_LEAST) == 0


def fused_forward(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None]:
    weight = stored(w, layout)
    (M, K), N, r = x.shape, layout[3], 0 if lora_A is None else lora_A.shape[0]
    bits, dropout = 8 * x.element_size(), keep is not None
    sizes = (M, N, K, r, bits, dropout_p, dropout, *layout[:3])
    plan = _forward_plan(x.device, *sizes)
    splits = plan.grid[2]
    parts = x.new_empty((splits, M, N), dtype=torch.float32)
    s_parts = x.new_empty((splits, M, r), dtype=torch.float32) if r else None
    A, table = lora_A.contiguous() if r else None, code_table(x.device, layout[0])
    launch(plan, x, x, *weight.pointers, table, A, keep, parts, s_parts)
    y = x.new_empty((M, N))
    S = x.new_empty((M, r), dtype=torch.float32) if r else None
    factor = lora_B.contiguous().t() if r else None
    scales = (keep_scale(keep, dropout_p), scaling)
    update_epilogue(parts, s_parts, factor, bias, None, dropout_p, scales, S, y)
    return y, S


@planned
def _forward_plan(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    r: int,
    bits: int,
    dropout_p: float,
    dropout: bool,
    form: int,
    blocksize: int,
    nested_blocksize: int,
) -> Plan:
    config = config_for(Problem("nf4_forward", M, N, K, r, bits), device)
    block_k = whole_blocks(config.block_k, form, blocksize, K)
    blocks = ceil_div(ceil_div(K, block_k), config.splits)
    tiles = ceil_div(N, config.block_n) + ceil_div(r, RANK_LEAST)
    on = traits(device)
    return Plan(
        _nf4_forward_kernel,
        (tiles, ceil_div(M, config.block_m), ceil_div(K, blocks * block_k)),
        (M, N, K, r, blocks, keep_threshold(dropout_p)),
        FORMAT=form,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        HAS_LORA=r > 0,
        HAS_DROPOUT=dropout,
        PTX=on.ptx,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        BLOCK_R=RANK_LEAST,
        PRECISION=on.precision,
        **config.launch(),
    )


def fused_backward(
    dy: Tensor,
    w: list[Tensor],
    layout: list[int],
    dS: Tensor | None,
    lora_A: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    weight = stored(w, layout)
    (M, N), K = dy.shape, layout[4]
    plan = _backward_plan(dy.device, M, N, K, 8 * dy.element_size(), *layout[:3])
    parts = dy.new_empty((plan.grid[2], M, K), dtype=torch.float32)
    launch(plan, dy, dy, *weight.pointers, code_table(dy.device, layout[0]), parts)
    dx = dy.new_empty((M, K))
    s_parts = None if dS is None else dS.unsqueeze(0)
    factor = None if dS is None else lora_A.contiguous()
    scales = (1.0, keep_scale(keep, dropout_p))
    update_epilogue(parts, s_parts, factor, None, keep, dropout_p, scales, None, dx)
    return dx


@planned
def _backward_plan(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    bits: int,
    form: int,
    blocksize: int,
    nested_blocksize: int,
) -> Plan:
    config = config_for(Problem("nf4_backward", M, N, K, 1, bits), device)
    block_k = whole_blocks(config.block_k, form, blocksize, K)
    blocks = ceil_div(ceil_div(N, config.block_n), config.splits)
    on = traits(device)
    return Plan(
        _nf4_backward_kernel,
        (K // block_k, ceil_div(M, config.block_m), ceil_div(N, blocks * config.block_n)),
        (M, N, K, blocks),
        FORMAT=form,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        PTX=on.ptx,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        PRECISION=on.precision,
        **config.launch(),
    )
