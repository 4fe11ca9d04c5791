"""DoRA on a GPU: the norms of the rows of weight + scaling * lora_B @ lora_A, in one launch.

A program takes a tile of rows and walks along K: the update's tile comes from the tensor cores, the
weight is added in registers, squares are summed in float32 in BLOCK_K lanes, which are added and
rooted at the end. Nothing is written but the norms, and a 4-bit weight is decoded on the way.

Bytes: 2 N K of a 16-bit weight (0.516 N K packed) once, and 4 r (N + K) of the factors; lora_A is
read again by every program, from the L2 cache: 4 r K N / BLOCK_N, as many as the weight's at r = 16
and 32 rows. 4096x4096 is 34 MB (packed 9 MB): 7 us (2 us) at an H200's 4.8 TB/s. Torch by blocks of
rows moves 18 N K. FLOPs: 2 N K r, three times that on the tensor cores for float32 factors, so a
large rank or a packed weight is bound by arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.formats.table import stored
from peftkern.kernels.configs import Problem, block_rank, ceil_div
from peftkern.kernels.interpreter import dot, narrow
from peftkern.kernels.launch import code_table, config_for, guard, traits, whole_blocks
from peftkern.kernels.low_rank_update import refusal_layer
from peftkern.kernels.nf4 import nf4_dequantize
from peftkern.kernels.primitives import nf4_rows, nf4_shared

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _rows_of_b(b_ptr, rows, first_rank, N, r, BLOCK_R: tl.constexpr):
    """Load lora_B at some rows and ranks, zero out of bounds."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    mask = (rows < N)[:, None] & (ranks < r)[None, :]
    return tl.load(b_ptr + rows[:, None] * r + ranks[None, :], mask=mask, other=0.0)


@triton.jit
def _times_a(b, a_ptr, columns, first_rank, K, r, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """Compute b @ lora_A at some ranks and columns in float32; 16-bit products are exact."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    mask = (ranks < r)[:, None] & (columns < K)[None, :]
    a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :], mask=mask, other=0.0)
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return dot(b, a, PRECISION)


@triton.jit
def _update(
    b,
    a_ptr,
    b_ptr,
    rows,
    columns,
    N,
    K,
    r,
    SEVERAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute lora_B @ lora_A at some rows and columns; b: lora_B's rows of the first rank tile.

    SEVERAL tiles of ranks: the others are read, from a cache, for each tile of columns.
    """
    update = _times_a(b, a_ptr, columns, 0, K, r, BLOCK_R, PRECISION)
    if SEVERAL:
        for first_rank in range(BLOCK_R, r, BLOCK_R):
            more = _rows_of_b(b_ptr, rows, first_rank, N, r, BLOCK_R)
            update += _times_a(more, a_ptr, columns, first_rank, K, r, BLOCK_R, PRECISION)
    return update


@triton.jit
def _dora_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    norm_ptr,
    N,
    K,
    r,
    stride_wn,
    stride_wk,
    scaling,
    SEVERAL: tl.constexpr,
    BEYOND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute norm[n] = |w[n] + scaling * b[n] @ a| for some rows. BEYOND: tiles end behind K."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = w_ptr + rows.to(tl.int64)[:, None] * stride_wn
    b = _rows_of_b(b_ptr, rows, 0, N, r, BLOCK_R)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        w = tl.load(
            w_row + columns.to(tl.int64)[None, :] * stride_wk,
            mask=(rows < N)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        update = _update(b, a_ptr, b_ptr, rows, columns, N, K, r, SEVERAL, BLOCK_R, PRECISION)
        total = update * scaling + w.to(tl.float32)
        if BEYOND:  # an Inf of b times the zeros there is NaN
            total = tl.where(columns[None, :] < K, total, 0.0)
        squares += total * total
    tl.store(norm_ptr + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)


@triton.jit
def _nf4_dora_norm_kernel(
    packed_ptr,
    scale_ptr,
    aux_ptr,
    code2_ptr,
    offset_ptr,
    table_ptr,
    a_ptr,
    b_ptr,
    norm_ptr,
    N,
    K,
    r,
    scaling,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_TYPE: tl.constexpr,
    PTX: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the same for a packed weight, whose values are rounded to W_TYPE before the sum."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = rows.to(tl.int64) * K
    shared = nf4_shared(aux_ptr, offset_ptr, FORMAT, NESTED_BLOCKSIZE)
    weight = (packed_ptr, scale_ptr, aux_ptr, code2_ptr, shared)
    b = _rows_of_b(b_ptr, rows, 0, N, r, BLOCK_R)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):  # K is whole blocks, and BLOCK_K divides them
        w = nf4_rows(
            weight,
            table_ptr,
            w_row + start,
            rows < N,
            FORMAT,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            PTX,
            BLOCK_K,
        )
        w = narrow(w, W_TYPE).to(tl.float32)
        columns = start + tl.arange(0, BLOCK_K)
        update = _update(b, a_ptr, b_ptr, rows, columns, N, K, r, SEVERAL, BLOCK_R, PRECISION)
        total = update * scaling + w
        squares += total * total
    tl.store(norm_ptr + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)


def refusal_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> str | None:
    return refusal_layer(weight.dtype, tuple(weight.shape), lora_A, lora_B)


def refusal_nf4_norm(
    layout: list[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor
) -> str | None:
    return refusal_layer(dtype, tuple(layout[3:]), lora_A, lora_B)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    (N, K), r = weight.shape, lora_A.shape[0]
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    config = config_for(Problem("dora_norm", 1, N, K, r, 8 * weight.element_size()), weight.device)
    with guard(weight):
        _dora_norm_kernel[(ceil_div(N, config.block_n),)](
            weight,
            lora_A.contiguous(),
            lora_B.contiguous(),
            norm,
            N,
            K,
            r,
            *weight.stride(),
            scaling,
            SEVERAL=r > block_rank(r),
            BEYOND=K % config.block_k != 0,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=block_rank(r),
            PRECISION=traits(weight.device).precision,
            **config.launch(),
        )
    return norm


def nf4_dora_norm(
    w: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """Compute the norms; a weight whose blocks do not end with rows is dequantized first."""
    weight = stored(w, layout)
    (N, K), r, device = weight.shape, lora_A.shape[0], lora_A.device
    if K % weight.blocksize:
        dense = nf4_dequantize(w, layout, dtype)
        return dora_norm(dense, lora_A, lora_B, scaling)
    norm = torch.empty(N, dtype=torch.float32, device=device)
    config = config_for(Problem("nf4_dora_norm", 1, N, K, r, 8 * dtype.itemsize), device)
    on = traits(device)
    with guard(norm):
        _nf4_dora_norm_kernel[(ceil_div(N, config.block_n),)](
            *weight.pointers,
            code_table(device, layout[0]),
            lora_A.contiguous(),
            lora_B.contiguous(),
            norm,
            N,
            K,
            r,
            scaling,
            FORMAT=layout[0],
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            W_TYPE=_TYPES[dtype],
            PTX=on.ptx,
            SEVERAL=r > block_rank(r),
            BLOCK_N=config.block_n,
            BLOCK_K=whole_blocks(config.block_k, *layout[:2], K),
            BLOCK_R=block_rank(r),
            PRECISION=on.precision,
            enable_fp_fusion=False,  # absmax is a product and a sum, each rounded
            **config.launch(),
        )
    return norm
