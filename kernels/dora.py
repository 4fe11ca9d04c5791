"""DoRA on a GPU: the norms of the rows of weight + scaling * lora_B @ lora_A, in one launch.

A program takes a tile of rows and walks along K: the update's tile comes from the tensor cores, the
weight is added in registers, squares are summed in float32 in BLOCK_K lanes, which are added and
rooted at the end. Nothing is written but the norms, and an NF4 weight is decoded on the way.

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
from peftkern.kernels.aot import AotCase, tiles
from peftkern.kernels.configs import Problem, TileConfig, block_rank, ceil_div
from peftkern.kernels.launch import code_table, config_for, guard, has_ptx, precision
from peftkern.kernels.lora_linear import refusal_layer
from peftkern.kernels.nf4 import nf4_dequantize
from peftkern.kernels.primitives import dot, narrow, nf4_absmax, nf4_values


@triton.jit
def _rows_of_b(b_ptr, rows, first_rank, N, r, BLOCK_R: tl.constexpr):
    """lora_B at some rows and ranks, zero beyond its ends."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    mask = (rows < N)[:, None] & (ranks < r)[None, :]
    return tl.load(b_ptr + rows[:, None] * r + ranks[None, :], mask=mask, other=0.0)


@triton.jit
def _times_a(b, a_ptr, columns, first_rank, K, r, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """b @ lora_A at some ranks and columns, in float32; products of one 16-bit type are exact."""
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
    """lora_B @ lora_A at some rows and columns; b, its rows of the first tile of ranks.

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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """norm[n] = |w[n] + scaling * b[n] @ a| for some rows."""
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
        squares += total * total
    tl.store(norm_ptr + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)


@triton.jit
def _nf4_dora_norm_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    table_ptr,
    a_ptr,
    b_ptr,
    norm_ptr,
    N,
    K,
    r,
    scaling,
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
    """The same for a packed weight, whose values are rounded to W_TYPE before the sum."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = rows.to(tl.int64) * K
    offset = 0.0
    if NESTED_BLOCKSIZE:
        offset = tl.load(offset_ptr)
    b = _rows_of_b(b_ptr, rows, 0, N, r, BLOCK_R)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):  # K is whole blocks, and BLOCK_K divides them
        byte = (w_row + start)[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        packed = tl.load(packed_ptr + byte, mask=(rows < N)[:, None], other=0)
        absmax = nf4_absmax(
            absmax_ptr,
            nested_absmax_ptr,
            nested_code_ptr,
            offset,
            (w_row + start) // BLOCKSIZE,
            rows < N,
            NESTED_BLOCKSIZE,
        )
        high, low = nf4_values(packed, table_ptr, tl.float32, PTX)
        w = tl.join(high * absmax[:, None], low * absmax[:, None])
        w = narrow(tl.reshape(w, (BLOCK_N, BLOCK_K)), W_TYPE).to(tl.float32)
        columns = start + tl.arange(0, BLOCK_K)
        update = _update(b, a_ptr, b_ptr, rows, columns, N, K, r, SEVERAL, BLOCK_R, PRECISION)
        total = update * scaling + w
        squares += total * total
    tl.store(norm_ptr + rows, tl.sqrt_rn(tl.sum(squares, 1)), mask=rows < N)


def refusal_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *args: object) -> str | None:
    return refusal_layer(weight.dtype, tuple(weight.shape), lora_A, lora_B)


def refusal_nf4_norm(
    w: list[Tensor],
    layout: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    *args: object,
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
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=block_rank(r),
            PRECISION=precision(weight.device),
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
    """Blocks that do not end with rows: the weight is made dense first."""
    weight = stored(w, layout)
    (N, K), r, device = weight.shape, lora_A.shape[0], lora_A.device
    if K % weight.blocksize:
        dense = nf4_dequantize(w, layout, dtype)
        return dora_norm(dense, lora_A, lora_B, scaling)
    norm = torch.empty(N, dtype=torch.float32, device=device)
    config = config_for(Problem("nf4_dora_norm", 1, N, K, r, 8 * dtype.itemsize), device)
    with guard(norm):
        _nf4_dora_norm_kernel[(ceil_div(N, config.block_n),)](
            *weight.pointers,
            code_table(device),
            lora_A.contiguous(),
            lora_B.contiguous(),
            norm,
            N,
            K,
            r,
            scaling,
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            W_TYPE=_TYPES[dtype],
            PTX=has_ptx(device),
            SEVERAL=r > block_rank(r),
            BLOCK_N=config.block_n,
            BLOCK_K=min(config.block_k, weight.blocksize),
            BLOCK_R=block_rank(r),
            PRECISION=precision(device),
            enable_fp_fusion=False,  # absmax is a product and a sum, each rounded
            **config.launch(),
        )
    return norm


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_NAMED = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}


def _arguments(r: int, adapter: str, config: TileConfig, block_k: int) -> dict[str, str | int]:
    """What both kernels take."""
    return {
        "a_ptr": f"*{adapter}",
        "b_ptr": f"*{adapter}",
        "norm_ptr": "*fp32",
        "N": "i32:16",
        "K": "i32:16",
        "r": "i32:16",
        "scaling": "fp32",
        "SEVERAL": r > block_rank(r),
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": block_rank(r),
        "PRECISION": "tf32x3",
    }


def _case(N: int, r: int, dtype: str, adapter: str, transposed: bool = False) -> AotCase:
    config = tiles("dora_norm", 1, N, 4096, r, 32 if dtype == "fp32" else 16)
    arguments = {
        **_arguments(r, adapter, config, config.block_k),
        "w_ptr": f"*{dtype}",
        "stride_wn": 1 if transposed else "i32:16",
        "stride_wk": "i32:16" if transposed else 1,
    }
    name = f"dora_norm/N{N}/r{r}/{dtype}/adapters-{adapter}"
    return AotCase(name + transposed * "/transposed", _dora_norm_kernel, arguments, config)


def _nf4_case(
    N: int, r: int, dtype: str, adapter: str, nested: bool = True, blocksize: int = 64
) -> AotCase:
    config = tiles("nf4_dora_norm", 1, N, 4096, r, 32 if dtype == "fp32" else 16)
    arguments = {
        **_arguments(r, adapter, config, min(config.block_k, blocksize)),
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if nested else "*fp32",
        "nested_absmax_ptr": "*fp32" if nested else None,
        "nested_code_ptr": "*fp32" if nested else None,
        "offset_ptr": "*fp32" if nested else None,
        "table_ptr": "*fp32",
        "BLOCKSIZE": blocksize,
        "NESTED_BLOCKSIZE": 256 if nested else 0,
        "W_TYPE": _NAMED[dtype],
        "PTX": True,
    }
    name = f"nf4_dora_norm/N{N}/r{r}/{dtype}/adapters-{adapter}"
    name += "" if nested else "/plain"
    name += "" if blocksize == 64 else f"/blocks-of-{blocksize}"
    return AotCase(name, _nf4_dora_norm_kernel, arguments, config, fp_fusion=False)


AOT_CASES = (
    _case(1024, 16, "bf16", "fp32"),
    _case(4096, 16, "bf16", "fp32"),
    _case(14336, 16, "bf16", "fp32"),
    _case(14336, 16, "bf16", "bf16"),
    _case(14336, 16, "bf16", "fp32", transposed=True),
    _case(14336, 32, "fp16", "fp32"),
    _case(14336, 64, "bf16", "fp32"),
    _case(14336, 256, "bf16", "fp32"),
    _case(1024, 256, "bf16", "fp32"),
    _case(4096, 256, "fp16", "fp16"),
    _case(14336, 16, "fp32", "fp32"),
    _case(14336, 64, "fp32", "fp32"),
    _case(14336, 256, "fp32", "fp32"),
    _nf4_case(1024, 16, "bf16", "fp32"),
    _nf4_case(4096, 16, "bf16", "fp32"),
    _nf4_case(14336, 16, "bf16", "fp32"),
    _nf4_case(14336, 64, "bf16", "fp32", nested=False),
    _nf4_case(14336, 256, "bf16", "fp32"),
    _nf4_case(512, 16, "bf16", "fp32", blocksize=32),
    _nf4_case(14336, 16, "fp16", "fp16"),
    _nf4_case(14336, 64, "fp32", "fp32"),
)
