"""Low-rank updates on a GPU: the steps shared by layers over every kind of weight.

Forward is skinny-first: `update_forward` reads x once, writes S = dropout(x) @ lora_A.T and fills y
with the update and the bias. Backward: `gradients_sb` makes partial dS and dB of one read of dy
(two reads where the rank makes partial dS the larger traffic), `gradients_xa` partial dA and the
update's share of dx of one read of x and one write of dx. `update_epilogue` adds partial sums, the
update and the bias. Dropout's mask is drawn again from its seed, never stored. A rank above 64
takes several tiles, each of which reads its activations anew.

Bytes, M x K -> N in 2 bytes and r = 16: forward 2 M (K + N), backward 2 M (N + 2 K), and the
partial sums in float32: 4 r (M N / 128 + N M / slab + K M / slab), twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.dropout import keep_scale, keep_threshold
from peftkern.kernels.configs import RANK_MOST, Problem, block_rank, ceil_div, slab
from peftkern.kernels.interpreter import dropped, narrow
from peftkern.kernels.launch import Plan, config_for, launch, planned, rows_of, traits
from peftkern.kernels.primitives import as_factor, dot_factor, dot_update, join_sums, keep_mask

Sizes, Scales, Flags = tuple[int, ...], tuple[float, ...], tuple[bool, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANK_MAX = 256
SIZE_MAX = 65535 * 64  # programs that CUDA takes on an axis, columns of the least tile
ROWS_MAX = 2**30
PARTIAL_BYTES = 128 << 20  # of partial dS at most: a step's peak memory holds them


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_forward_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    seed_ptr,
    s_ptr,
    y_ptr,
    M,
    N,
    K,
    r,
    s_scale,
    scaling,
    threshold,
    EXPAND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shrink some rows to S = s_scale * (x * keep) @ A.T; expand to scaling * S @ B.T + bias.

    EXPAND is for ranks of one tile: a program of one tile of several cannot know the others' S.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = (rows < M)[:, None]
    in_rank = ranks < r
    row = rows.to(tl.int64)[:, None]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    coarse = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    fine = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + row * K + columns[None, :], mask=in_rows & (columns < K)[None, :], other=0.0
        )
        a = tl.load(
            a_ptr + ranks[None, :] * K + columns[:, None],
            mask=in_rank[None, :] & (columns < K)[:, None],
            other=0.0,
        )
        if HAS_DROPOUT:
            x = dropped(x, keep_mask(seed, rows, start, threshold, BLOCK_K))
        coarse, fine = dot_factor(x, a, coarse, fine, PRECISION)
    s = join_sums(coarse, fine) * s_scale
    if tl.program_id(1) == 0:
        tl.store(s_ptr + row * r + ranks[None, :], s, mask=in_rows & in_rank[None, :])
    if EXPAND:
        s *= scaling
        for start in range(tl.program_id(1) * BLOCK_N, N, tl.num_programs(1) * BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            b = tl.load(
                b_ptr + columns[None, :] * r + ranks[:, None],
                mask=(columns < N)[None, :] & in_rank[:, None],
                other=0.0,
            )
            y = dot_update(s, b, y_ptr.dtype.element_ty, PRECISION)
            if HAS_BIAS:
                y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[
                    None, :
                ]
            tl.store(
                y_ptr + row * N + columns[None, :],
                narrow(y, y_ptr.dtype.element_ty),
                mask=in_rows & (columns < N)[None, :],
            )


@triton.jit(do_not_specialize=["M", "slab"])
def _lora_backward_sb_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    r,
    slab,
    scaling,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Reduce columns of dy in a slab: partial dS [tile, M, r], dB [slab, N, r] and dbias."""
    tile = tl.program_id(0)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_columns = columns < N
    in_rank = (ranks < r)[None, :]
    if NEED_DS:
        b = tl.load(
            b_ptr + columns[:, None] * r + ranks[None, :],
            mask=in_columns[:, None] & in_rank,
            other=0.0,
        )
    coarse = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    fine = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.program_id(1) * slab
    for start in range(first, tl.minimum(first + slab, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row = rows.to(tl.int64)[:, None]
        in_rows = (rows < M)[:, None]
        dy = tl.load(
            dy_ptr + row * N + columns[None, :], mask=in_rows & in_columns[None, :], other=0.0
        )
        if NEED_DS:
            zero = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            ds, ds_fine = dot_factor(dy, b, zero, zero, PRECISION)
            ds = join_sums(ds, ds_fine) * scaling
            place = (tile.to(tl.int64) * M + row) * r + ranks[None, :]
            tl.store(ds_ptr + place, ds, mask=in_rows & in_rank)
        if NEED_DB:
            s = tl.load(s_ptr + row * r + ranks[None, :], mask=in_rows & in_rank, other=0.0)
            s = as_factor(s, b_ptr.dtype.element_ty, dy.dtype)
            coarse, fine = dot_factor(tl.trans(dy), s, coarse, fine, PRECISION)
        if NEED_DBIAS and tl.program_id(2) == 0:
            dbias += tl.sum(dy.to(tl.float32), 0)
    part = tl.program_id(1).to(tl.int64) * N + columns
    if NEED_DB:
        db = join_sums(coarse, fine) * scaling
        tl.store(
            db_ptr + part[:, None] * r + ranks[None, :], db, mask=in_columns[:, None] & in_rank
        )
    if NEED_DBIAS:
        tl.store(dbias_ptr + part, dbias, mask=in_columns & (tl.program_id(2) == 0))


@triton.jit(do_not_specialize=["M", "slab", "threshold"])
def _lora_backward_xa_kernel(
    x_ptr,
    a_ptr,
    ds_ptr,
    seed_ptr,
    dx_ptr,
    da_ptr,
    M,
    K,
    r,
    slab,
    keep_scale,
    threshold,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Form dropout'(dS @ A) (for ranks of one tile) and partial dA [slab, r, K] of some rows."""
    first_column = tl.program_id(0) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_columns = columns < K
    in_rank = (ranks < r)[None, :]
    if NEED_DX:
        a = tl.load(
            a_ptr + ranks[:, None] * K + columns[None, :],
            mask=(ranks < r)[:, None] & in_columns[None, :],
            other=0.0,
        )
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    coarse = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    fine = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    first = tl.program_id(1) * slab
    for start in range(first, tl.minimum(first + slab, M), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row = rows.to(tl.int64)[:, None]
        in_rows = (rows < M)[:, None]
        in_tile = in_rows & in_columns[None, :]
        ds = tl.load(ds_ptr + row * r + ranks[None, :], mask=in_rows & in_rank, other=0.0)
        if HAS_DROPOUT:
            keep = keep_mask(seed, rows, first_column, threshold, BLOCK_K)
        if NEED_DX:
            dx = dot_update(ds, a, dx_ptr.dtype.element_ty, PRECISION)
            if HAS_DROPOUT:
                dx *= keep.to(tl.float32) * keep_scale
            tl.store(
                dx_ptr + row * K + columns[None, :],
                narrow(dx, dx_ptr.dtype.element_ty),
                mask=in_tile,
            )
        if NEED_DA:
            x = tl.load(x_ptr + row * K + columns[None, :], mask=in_tile, other=0.0)
            if HAS_DROPOUT:
                x = dropped(x, keep)
            ds = as_factor(ds, a_ptr.dtype.element_ty, x.dtype)
            coarse, fine = dot_factor(tl.trans(x), ds, coarse, fine, PRECISION)
    if NEED_DA:
        da = join_sums(coarse, fine) * keep_scale
        part = tl.program_id(1).to(tl.int64) * r + ranks[None, :]
        tl.store(da_ptr + part * K + columns[:, None], da, mask=in_columns[:, None] & in_rank)


@triton.jit(do_not_specialize=["M", "splits", "s_splits", "threshold"])
def _epilogue_kernel(
    part_ptr,
    s_part_ptr,
    factor_ptr,
    bias_ptr,
    seed_ptr,
    s_ptr,
    out_ptr,
    M,
    N,
    r,
    splits,
    s_splits,
    stride_rank,
    stride_column,
    s_scale,
    update_scale,
    threshold,
    HAS_PARTS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    STORE_S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add up out = keep * update_scale * S @ factor + parts + bias, S = s_scale * its parts."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    row = rows.to(tl.int64)[:, None]
    in_rows = (rows < M)[:, None]
    in_tile = in_rows & (columns < N)[None, :]
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_UPDATE:
        for first_rank in range(0, r, BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R)
            in_s = in_rows & (ranks < r)[None, :]
            s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for i in range(s_splits):
                s_place = (tl.cast(i, tl.int64) * M + row) * r + ranks[None, :]
                s += tl.load(s_part_ptr + s_place, mask=in_s, other=0.0)
            s *= s_scale
            if STORE_S:
                tl.store(s_ptr + row * r + ranks[None, :], s, mask=in_s & (first_column == 0))
            factor = tl.load(
                factor_ptr + ranks[:, None] * stride_rank + columns[None, :] * stride_column,
                mask=(ranks < r)[:, None] & (columns < N)[None, :],
                other=0.0,
            )
            out += dot_update(s * update_scale, factor, out_ptr.dtype.element_ty, PRECISION)
    if HAS_DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), rows, first_column, threshold, BLOCK_N)
        out *= keep.to(tl.float32)
    if HAS_PARTS:
        for i in range(splits):
            place = (tl.cast(i, tl.int64) * M + row) * N + columns[None, :]
            out += tl.load(part_ptr + place, mask=in_tile, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + row * N + columns[None, :], narrow(out, out_ptr.dtype.element_ty), mask=in_tile
    )


def refusal(
    activations: Tensor,
    shape: tuple[int, int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    keep: Tensor | None,
) -> str | None:
    """Return the refusal of a LoRA linear layer of weight [N, K], None if the kernels take it."""
    reason = refusal_layer(activations.dtype, shape, lora_A, lora_B)
    if reason is not None:
        return reason
    if activations.numel() // activations.shape[-1] > ROWS_MAX:
        return f"there are more than {ROWS_MAX} rows"
    if keep is not None and keep.dtype is not torch.int64:
        return "dropout's mask is given, and the kernels draw it from a seed"
    return None


def refusal_layer(
    dtype: torch.dtype, shape: tuple[int, int], lora_A: Tensor | None, lora_B: Tensor | None
) -> str | None:
    """Return the refusal of a weight [N, K] and its factors, whatever is done with them."""
    if dtype not in DTYPES:
        return f"the dtype is {dtype}"
    if 0 in shape:
        return "the weight is empty"
    if max(shape) > SIZE_MAX:
        return f"the weight has {max(shape)} rows or columns, above {SIZE_MAX}"
    if lora_A is not None:
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            if factor.dtype not in DTYPES:
                return f"the dtype of {name} is {factor.dtype}"
        r = lora_A.shape[0]
        if not 1 <= r <= RANK_MAX:
            return f"the rank is {r}, not 1 to {RANK_MAX}"
    return None


def update_forward(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return scaling * S @ lora_B.T + bias in the dtype of x [M, K], and S, dropout(x) @ lora_A.T.

    A rank of one tile takes one launch; of several, `update_epilogue` multiplies S by lora_B.
    """
    M, (N, r) = x.shape[0], lora_B.shape
    y, lora_B = x.new_empty(M, N), lora_B.contiguous()
    if M and r <= RANK_MOST:
        S = x.new_empty((M, r), dtype=torch.float32)
        update = {"lora_B": lora_B, "bias": bias, "scaling": scaling, "y": y}
        _launch_forward(x, lora_A, S, keep_scale(keep, dropout_p), keep, dropout_p, **update)
        return y, S
    S = shrink(x, lora_A, keep_scale(keep, dropout_p), keep, dropout_p)
    if M:
        update_epilogue(None, S[None], lora_B.t(), bias, None, 0.0, (1.0, scaling), None, y)
    return y, S


def shrink(
    x: Tensor, factor: Tensor, scale: float, keep: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Return S = scale * (x * keep) @ factor.T in float32, for x [M, K] and factor [r, K]."""
    S = x.new_empty((x.shape[0], factor.shape[0]), dtype=torch.float32)
    if x.shape[0]:
        _launch_forward(x, factor, S, scale, keep, dropout_p)
    return S


def _launch_forward(
    x: Tensor,
    factor: Tensor,
    S: Tensor,
    scale: float,
    keep: Tensor | None,
    dropout_p: float,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    y: Tensor | None = None,
) -> None:
    """Launch the forward kernel: fill S, and y if it is given."""
    bias = None if bias is None else bias.contiguous()
    (M, K), r, N = x.shape, factor.shape[0], 1 if y is None else y.shape[1]
    flags = (y is not None, bias is not None, keep is not None)
    sizes = (M, N, K, r, 8 * x.element_size())
    plan = _forward_plan(x.device, sizes, (scale, scaling, dropout_p), flags)
    launch(plan, x, x, factor.contiguous(), lora_B, bias, keep, S, y)


@planned
def _forward_plan(device: torch.device, sizes: Sizes, scales: Scales, flags: Flags) -> Plan:
    (M, N, K, r, bits), (expand, bias, dropout) = sizes, flags
    scale, scaling, dropout_p = scales
    config = config_for(Problem("lora_forward", M, N, K, r, bits), device)
    return Plan(
        _lora_forward_kernel,
        (ceil_div(M, config.block_m), config.splits, ceil_div(r, block_rank(r))),
        (M, N, K, r, scale, scaling, keep_threshold(dropout_p)),
        EXPAND=expand,
        HAS_BIAS=bias,
        HAS_DROPOUT=dropout,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=block_rank(r),
        PRECISION=traits(device).precision,
        **config.launch(),
    )


def gradients_sb(
    dy: Tensor, S: Tensor | None, lora_B: Tensor, scaling: float, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dS = scaling * dy @ lora_B (float32), dB = scaling * dy.T @ S, dbias, as wanted."""
    need_dS, need_dB, need_dbias = needs[0] or needs[1], needs[2], needs[3]
    (M, N), r = dy.shape, lora_B.shape[1]
    if M == 0:
        return (
            dy.new_zeros((0, r), dtype=torch.float32) if need_dS else None,
            lora_B.new_zeros(lora_B.shape) if need_dB else None,
            dy.new_zeros(N) if need_dbias else None,
        )
    sizes = (M, N, r, 8 * dy.element_size())
    plan = _backward_sb_plan(dy.device, sizes, scaling, (need_dS, need_dB, need_dbias))
    tiles, slabs, _ = plan.grid
    dS = None
    partial_bytes = 4 * tiles * M * r
    if need_dS and (2 * partial_bytes > dy.nbytes or partial_bytes > PARTIAL_BYTES):
        # Partial sums, written and read, would be more bytes than a second read of dy, or too many.
        dS = shrink(dy, lora_B.t(), scaling)
        need_dS = False
        plan = _backward_sb_plan(dy.device, sizes, scaling, (need_dS, need_dB, need_dbias))
    parts = partial_sums(need_dS, dy, tiles, M, r)
    dB = partial_sums(need_dB, dy, slabs, N, r)
    dbias = partial_sums(need_dbias, dy, slabs, N)
    if need_dS or need_dB or need_dbias:
        S = S.reshape(M, r) if need_dB else None
        launch(plan, dy, dy, lora_B.contiguous(), S, parts, dB, dbias)
    dS = dS if parts is None else added(parts, tiles, torch.float32)
    return dS, added(dB, slabs, lora_B.dtype), added(dbias, slabs, dy.dtype)


@planned
def _backward_sb_plan(device: torch.device, sizes: Sizes, scaling: float, flags: Flags) -> Plan:
    (M, N, r, bits), (need_dS, need_dB, need_dbias) = sizes, flags
    config = config_for(Problem("lora_backward_sb", M, N, 1, r, bits), device)
    rows = slab(M, config.block_m, config.splits)
    return Plan(
        _lora_backward_sb_kernel,
        (ceil_div(N, config.block_n), ceil_div(M, rows), ceil_div(r, block_rank(r))),
        (M, N, r, rows, scaling),
        NEED_DS=need_dS,
        NEED_DB=need_dB,
        NEED_DBIAS=need_dbias,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_rank(r),
        PRECISION=traits(device).precision,
        **config.launch(),
    )


def gradients_xa(
    x: Tensor | None,
    lora_A: Tensor,
    dS: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the update's share of dx [M, K] in `dtype`, dA = dS.T @ dropout(x), as wanted."""
    need_dx, need_dA = needs
    if not (need_dx or need_dA):
        return None, None
    (r, K), M = lora_A.shape, dS.shape[0]
    dx = dS.new_empty((M, K), dtype=dtype) if need_dx else None
    if M == 0:
        return dx, lora_A.new_zeros(lora_A.shape) if need_dA else None
    if r > RANK_MOST and need_dx:
        scales = (1.0, keep_scale(keep, dropout_p))
        update_epilogue(
            None, dS[None], lora_A.contiguous(), None, keep, dropout_p, scales, None, dx
        )
        need_dx = False
        if not need_dA:
            return dx, None
    rows = rows_of(x, K) if need_dA else None
    sizes = (M, K, r, 8 * (rows if need_dA else dx).element_size())
    scales, flags = (keep_scale(keep, dropout_p), dropout_p), (need_dx, need_dA, keep is not None)
    plan = _backward_xa_plan(dS.device, sizes, scales, flags)
    slabs = plan.grid[1]
    dA = partial_sums(need_dA, dS, slabs, r, K)
    launch(plan, dS, rows, lora_A.contiguous(), dS, keep, dx if need_dx else None, dA)
    return dx, added(dA, slabs, lora_A.dtype)


@planned
def _backward_xa_plan(device: torch.device, sizes: Sizes, scales: Scales, flags: Flags) -> Plan:
    (M, K, r, bits), (need_dx, need_dA, dropout) = sizes, flags
    scale, dropout_p = scales
    config = config_for(Problem("lora_backward_xa", M, 1, K, r, bits), device)
    step = slab(M, config.block_m, config.splits)
    return Plan(
        _lora_backward_xa_kernel,
        (ceil_div(K, config.block_k), ceil_div(M, step), ceil_div(r, block_rank(r))),
        (M, K, r, step, scale, keep_threshold(dropout_p)),
        NEED_DX=need_dx,
        NEED_DA=need_dA,
        HAS_DROPOUT=dropout,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_rank(r),
        PRECISION=traits(device).precision,
        **config.launch(),
    )


def update_epilogue(
    parts: Tensor | None,
    s_parts: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    scales: tuple[float, float],
    S: Tensor | None,
    out: Tensor,
) -> None:
    """Fill out = keep * scales[1] * S @ factor + parts.sum(0) + bias, and S if it is given.

    S = scales[0] * s_parts.sum(0).
    """
    M, N = out.shape
    r = 0 if factor is None else factor.shape[0]
    bias = None if bias is None else bias.contiguous()
    splits = (0 if parts is None else parts.shape[0], s_parts.shape[0] if r else 0)
    splits += factor.stride() if r else (0, 0)
    flags = (parts is not None, S is not None, bias is not None, keep is not None)
    sizes = (M, N, r, 8 * out.element_size())
    plan = _epilogue_plan(out.device, sizes, splits, (*scales, dropout_p), flags)
    launch(plan, out, parts, s_parts, factor, bias, keep, S, out)


@planned
def _epilogue_plan(
    device: torch.device, sizes: Sizes, splits: Sizes, scales: Scales, flags: Flags
) -> Plan:
    (M, N, r, bits), (parts, store_S, bias, dropout) = sizes, flags
    s_scale, scale, dropout_p = scales
    config = config_for(Problem("epilogue", M, N, 1, r, bits), device)
    return Plan(
        _epilogue_kernel,
        (ceil_div(M, config.block_m), ceil_div(N, config.block_n)),
        (M, N, r, *splits, s_scale, scale, keep_threshold(dropout_p)),
        HAS_PARTS=parts,
        HAS_UPDATE=r > 0,
        STORE_S=store_S,
        HAS_BIAS=bias,
        HAS_DROPOUT=dropout and r > 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_rank(r),
        PRECISION=traits(device).precision,
        **config.launch(),
    )


def partial_sums(wanted: bool, like: Tensor, parts: int, *shape: int) -> Tensor | None:
    """Return memory for partial sums [parts, *shape], or for the sum itself of one part."""
    if not wanted:
        return None
    return like.new_empty(shape if parts == 1 else (parts, *shape), dtype=torch.float32)


def added(sums: Tensor | None, parts: int, dtype: torch.dtype) -> Tensor | None:
    """Add partial sums in order: torch reduces the first dimension deterministically."""
    if sums is None:
        return None
    total = sums if parts == 1 else sums.sum(0)
    return total if total.dtype is dtype else total.to(dtype=dtype)
