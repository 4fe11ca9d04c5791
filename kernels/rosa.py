"""RoSA's sparse products on a GPU: dy.T @ x at the entries of a sparse matrix, and y += x @ S.T.

Both read x as columns, x^T [K, M]: an entry then takes whole lines of 128 bytes. From x [M, K] it
would take a sector of 32 bytes for each value of 2, sixteen times as much, or, where a row of x
stays in the L1 cache, 32 addresses for each load of a warp. So torch transposes the activations
first, and pads rows to 16 values: 4 M K bytes in 16 bits, read and written.

sddmm: a program takes some entries, finds their rows by bisecting crow, and adds products up over a
slab of M; partial sums of slabs are added in index order. spmm: a program takes up to 16 rows of S
at some rows of x, so that y is touched in whole sectors, and walks through their entries in one go,
whatever row they are of. Rows are uneven, so entries are also cut at every multiple of a power of
two: there are as many programs as groups and multiples, which the shapes tell, and a program
bisects for its share. Groups that are cut leave float32 sums, which a second launch adds in order.

Bytes from the L2 cache: 2 nnz M in 16 bits, twice that for float32, wherever the entries are (dy's
column of a row comes from the L1 cache again). All programs work on one slab of M (sddmm 1024 rows,
spmm up to 512) before the next: 8 MB (4 MB) of x^T at K = 4096, which stays there. Memory:
transposing, 8 M K (4 M K for spmm), and y read and written, 4 M N, at an H200's 4.3 TB/s:

| 4096x4096, 16 bits | M = 512 | M = 4096 |
|---|---|---|
| L2 cache, density 1%: 0.17, 1.4 GB at about 5.5 TB/s | 31 us | 250 us |
| sddmm: transposing x and dy | 4 us | 31 us |
| spmm: transposing x, y in and out | 4 us | 31 us |
| dense dW instead of sddmm: 2 M N K at 700 TFLOPS, and 8 us to write it | 33 us | 205 us |
| dense W + S instead of spmm, for any M: a copy of W | 16 us | 16 us |

Counted, not measured: dense dW is the faster one from 0.7% of the places on for M = 4096, from 1%
for M = 512, with a tensor of the weight's size; W + S from 230 rows of x on at 1%, from 1150 at
0.1%, where a copy of W may be made at each call.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.configs import ceil_div, next_power
from peftkern.kernels.interpreter import narrow
from peftkern.kernels.launch import guard, traits

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROWS = 16  # of S in a group: a sector of y in 16 bits
_ALIGNED = 16  # values to which rows of the transposed activations are padded
_BLOCK_M = 128  # rows of x in a tile, at most
_BLOCKS_MOST = 4  # tiles of x that a program of spmm takes in turn, to find its entries once
_TILE, _ENTRIES = 1024, 32  # products and entries in a tile, at least
_SLAB = 1024  # rows of x over which a program of sddmm sums
_LEAST_PIECE = 1024  # entries between cuts, at least: finer ones cost more than they balance
_GRID_MOST = 65_535  # programs along the second axis of a grid


@triton.jit
def _start(crow_ptr, row, N, nnz):
    """Return a row's first entry, clamped to [0, nnz] for any crow; from row N on, the end."""
    start = tl.load(crow_ptr + tl.minimum(row, N)).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), nnz)


@triton.jit
def _last_group(
    crow_ptr, target, groups, steps, N, nnz, shift, ROWS: tl.constexpr, NUMBERED: tl.constexpr
):
    """Bisect for the last group of ROWS rows whose start >> shift is at most target.

    NUMBERED: that plus the group's number. 2^steps is more than the groups.
    """
    low = target * 0
    high = low + groups
    for _ in range(steps):
        middle = low + (high - low) // 2
        place = _start(crow_ptr, middle * ROWS, N, nnz) >> shift
        if NUMBERED:
            place += middle
        before = place <= target
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["N", "K", "nnz", "steps"])
def _rosa_sddmm_kernel(
    dy_ptr,
    x_ptr,
    crow_ptr,
    col_ptr,
    sums_ptr,
    M,
    N,
    K,
    nnz,
    slab,
    steps,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute sums[slab, e] = dy[:, row(e)] . x[:, col(e)] over a slab; dy, x are transposed.

    A column out of range is not read: its sum is NaN.
    """
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = entries < nnz
    row = _last_group(crow_ptr, entries, N, steps, N, nnz, 0, 1, False)
    col = tl.load(col_ptr + entries, mask=inside, other=0).to(tl.int64)
    known = (col >= 0) & (col < K)
    dy_row = dy_ptr + row[:, None] * M
    x_row = x_ptr + col[:, None] * M
    sums = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    first = tl.program_id(1) * slab
    for start in range(first, tl.minimum(first + slab, M), BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        mask = (inside & known)[:, None] & (at < M)[None, :]
        dy = tl.load(dy_row + at[None, :], mask=mask, other=0.0)
        x = tl.load(x_row + at[None, :], mask=mask, other=0.0)
        sums += dy.to(tl.float32) * x.to(tl.float32)
    total = tl.where(known, tl.sum(sums, 1), float("nan"))
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * nnz + entries, total, mask=inside)


@triton.jit(do_not_specialize=["nnz", "slabs"])
def _rosa_slabs_kernel(sums_ptr, values_ptr, nnz, slabs, BLOCK_E: tl.constexpr):
    """Add the sums of all slabs into values[e], from the first to the last."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for slab in range(slabs):
        place = sums_ptr + slab * nnz.to(tl.int64) + entries
        total += tl.load(place, mask=entries < nnz, other=0.0)
    tl.store(values_ptr + entries, total, mask=entries < nnz)


@triton.jit
def _add_to_y(y_ptr, sums, rows, at, M, N):
    """Add sums [rows, at] to y[at, rows], rounded once."""
    place = y_ptr + at.to(tl.int64)[None, :] * N + rows[:, None]
    mask = (rows < N)[:, None] & (at < M)[None, :]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + sums
    tl.store(place, narrow(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "K", "nnz", "groups", "steps", "shift"])
def _rosa_spmm_kernel(
    y_ptr,
    x_ptr,
    values_ptr,
    crow_ptr,
    col_ptr,
    sums_ptr,
    M,
    padded,
    N,
    K,
    nnz,
    groups,
    steps,
    shift,
    span,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Multiply one row group's entries between two multiples of 2^shift by `span` rows of x.

    x is transposed, [K, padded]. A group without a cut is added to y. Of one with cuts the first
    part leaves its sums at 2 * (its multiple) + 1, others at 2 * theirs: no other group does. A
    column out of range is not read: its row of S gives NaN.
    """
    item = tl.program_id(0).to(tl.int64)
    group = _last_group(crow_ptr, item, groups, steps, N, nnz, shift, ROWS, True)
    group_start = _start(crow_ptr, group * ROWS, N, nnz)
    group_end = _start(crow_ptr, (group + 1) * ROWS, N, nnz)
    multiple = item - group
    first_multiple = group_start >> shift
    last_multiple = group_end >> shift
    begin = tl.maximum(group_start, multiple << shift)
    end = tl.minimum(group_end, (multiple + 1) << shift)
    cut = first_multiple < last_multiple
    ours = (first_multiple <= multiple) & (multiple <= last_multiple)  # if crow ascends
    if ours & (cut | (begin < end)):
        lanes = tl.arange(0, ROWS)
        rows = group * ROWS + lanes
        # From here on entries are counted from `begin`, in 32 bits.
        count = (end - begin).to(tl.int32)
        col_ptr += begin
        values_ptr += begin
        starts = (_start(crow_ptr, rows, N, nnz) - begin).to(tl.int32)
        slot = 2 * multiple + (multiple == first_multiple).to(tl.int64)
        first_m = tl.program_id(1) * span
        for start_m in range(first_m, tl.minimum(first_m + span, M), BLOCK_M):
            at = start_m + tl.arange(0, BLOCK_M)
            sums = tl.zeros((ROWS, BLOCK_M), tl.float32)
            entries = tl.arange(0, BLOCK_E)
            col = tl.load(col_ptr + entries, mask=entries < count, other=0)
            value = tl.load(values_ptr + entries, mask=entries < count, other=0.0)
            for first in range(0, count, BLOCK_E):
                known = (col >= 0) & (col < K)
                x = tl.load(
                    x_ptr + col.to(tl.int64)[:, None] * padded + at[None, :],
                    mask=((entries < count) & known)[:, None] & (at < padded)[None, :],
                    other=0.0,
                )
                products = tl.where(known, value, float("nan"))[:, None] * x.to(tl.float32)
                ahead = entries + BLOCK_E  # asked for while x is on its way
                col = tl.load(col_ptr + ahead, mask=ahead < count, other=0)
                value = tl.load(values_ptr + ahead, mask=ahead < count, other=0.0)
                last = tl.minimum(first + BLOCK_E, count) - 1
                from_lane = tl.sum((starts <= first).to(tl.int32)) - 1
                to_lane = tl.sum((starts <= last).to(tl.int32))
                for lane in range(from_lane, to_lane):  # rows that have entries here
                    row_start = _start(crow_ptr, group * ROWS + lane, N, nnz) - begin
                    row_end = _start(crow_ptr, group * ROWS + lane + 1, N, nnz) - begin
                    mine = (entries >= row_start.to(tl.int32)) & (entries < row_end.to(tl.int32))
                    part = tl.sum(tl.where(mine[:, None], products, 0.0), 0)
                    sums += tl.where((lanes == lane)[:, None], part[None, :], 0.0)
                entries = ahead
            if cut:
                place = sums_ptr + (slot * ROWS + lanes)[:, None] * padded + at[None, :]
                tl.store(place, sums, mask=(at < padded)[None, :])
            else:
                _add_to_y(y_ptr, sums, rows, at, M, N)


@triton.jit(do_not_specialize=["M", "nnz", "groups", "steps", "shift"])
def _rosa_cuts_kernel(
    y_ptr,
    crow_ptr,
    sums_ptr,
    M,
    padded,
    N,
    nnz,
    groups,
    steps,
    shift,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add to y the sums of the row group whose first cut is this multiple of 2^shift, if any."""
    multiple = tl.program_id(0).to(tl.int64) + 1
    before = (multiple << shift) - 1
    group = _last_group(crow_ptr, before, groups, steps, N, nnz, 0, ROWS, False)
    first_multiple = _start(crow_ptr, group * ROWS, N, nnz) >> shift
    last_multiple = _start(crow_ptr, (group + 1) * ROWS, N, nnz) >> shift
    if (first_multiple == multiple - 1) & (multiple <= last_multiple):
        lanes = tl.arange(0, ROWS)
        at = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (at < padded)[None, :]
        place = sums_ptr + lanes[:, None] * padded + at[None, :]
        slot = 2 * first_multiple + 1
        sums = tl.load(place + slot * ROWS * padded, mask=mask, other=0.0)
        for other in range(multiple, last_multiple + 1):
            sums += tl.load(place + 2 * other * ROWS * padded, mask=mask, other=0.0)
        _add_to_y(y_ptr, sums, group * ROWS + lanes, at, M, N)


def refusal_sddmm(first: Tensor, x: Tensor, *args: object) -> str | None:
    """Return the refusal of rosa_sddmm (dy, x) and rosa_spmm_ (y, x), None if both are taken."""
    if x.dtype not in _DTYPES or first.dtype is not x.dtype:
        return f"the dtypes are {first.dtype} and {x.dtype}"
    rows = math.prod(x.shape[:-1])
    if rows > _GRID_MOST * _BLOCK_M:
        return f"x has {rows} rows, above {_GRID_MOST * _BLOCK_M}"
    return None


refusal_spmm = refusal_sddmm


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Compute dy.T @ x at the entries, as the reference; an index out of range gives NaN."""
    N, K, nnz = crow.numel() - 1, x.shape[-1], col.numel()
    rows = math.prod(x.shape[:-1])
    values = torch.empty(nnz, dtype=torch.float32, device=x.device)
    if not rows or not nnz:
        return values.zero_()
    dy_t, x_t = _transposed(dy.reshape(rows, N)), _transposed(x.reshape(rows, K))
    M = x_t.shape[1]
    block_m, slabs = _block_m(rows), ceil_div(M, _SLAB)
    sums = values if slabs == 1 else values.new_empty(slabs, nnz)
    with guard(x):
        _rosa_sddmm_kernel[(ceil_div(nnz, _block_e(block_m)), slabs)](
            dy_t,
            x_t,
            crow.contiguous(),
            col.contiguous(),
            sums,
            M,
            N,
            K,
            nnz,
            _SLAB,
            N.bit_length(),
            BLOCK_E=_block_e(block_m),
            BLOCK_M=block_m,
        )
        if slabs > 1:
            _rosa_slabs_kernel[(ceil_div(nnz, _SLAB),)](sums, values, nnz, slabs, BLOCK_E=_SLAB)
    return values


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    """Add x @ S.T to y in place, as the reference; an index out of range gives NaN."""
    N, K, nnz = crow.numel() - 1, x.shape[-1], col.numel()
    M = math.prod(x.shape[:-1])
    if not M or not nnz:
        return
    if order is not None:  # once: every block of rows of x reads the values again
        values = values.index_select(0, order)
    values, crow, col = values.float().contiguous(), crow.contiguous(), col.contiguous()
    target, x_t = y.contiguous(), _transposed(x.reshape(M, K))
    padded, groups, block_m = x_t.shape[1], ceil_div(N, _ROWS), _block_m(M)
    blocks, count = ceil_div(M, block_m), traits(x.device).processors
    blocks_each = min(max(1, groups * blocks // (8 * count)), _BLOCKS_MOST)
    shift = _shift(nnz, ceil_div(blocks, blocks_each), count)
    cuts = nnz >> shift
    sums = x_t.new_empty(2 * (cuts + 1) if cuts else 0, _ROWS, padded, dtype=torch.float32)
    sizes = (M, padded, N, K, nnz, groups, groups.bit_length(), shift, blocks_each * block_m)
    with guard(x):
        _rosa_spmm_kernel[(groups + cuts, ceil_div(blocks, blocks_each))](
            target,
            x_t,
            values,
            crow,
            col,
            sums,
            *sizes,
            ROWS=_ROWS,
            BLOCK_E=_block_e(block_m),
            BLOCK_M=block_m,
        )
        if cuts:
            sizes = (M, padded, N, nnz, groups, groups.bit_length(), shift)
            _rosa_cuts_kernel[(cuts, blocks)](
                target, crow, sums, *sizes, ROWS=_ROWS, BLOCK_M=block_m
            )
    if target is not y:
        y.copy_(target)


def _transposed(x: Tensor) -> Tensor:
    """Return x[M, K] as [K, M], its rows padded with zeros so that each begins aligned."""
    M, K = x.shape
    if M % _ALIGNED == 0:
        return x.t().contiguous()
    padded = x.new_empty(K, ceil_div(M, _ALIGNED) * _ALIGNED)
    padded[:, M:].zero_()
    padded[:, :M].copy_(x.t())
    return padded


def _block_m(M: int) -> int:
    """Return the rows of x in a tile."""
    return min(max(_ALIGNED, next_power(M)), _BLOCK_M)


def _block_e(block_m: int) -> int:
    """Return the entries in a tile, for its rows of x."""
    return max(_TILE // block_m, _ENTRIES)


def _shift(nnz: int, blocks: int, count: int) -> int:
    """Return log2 of the entries between cuts.

    A quarter of what each of `count` processors has to do: one long row delays none for long.
    """
    share = ceil_div(nnz * blocks, 4 * count)
    return min(next_power(max(share, _LEAST_PIECE)).bit_length() - 1, 30)  # a piece fits 32 bits
