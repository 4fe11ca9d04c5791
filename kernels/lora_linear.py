"""LoRA over a dense weight on a GPU: two launches forward, backward one read of each activation.

The base products are cuBLAS's. Forward is skinny-first: one kernel reads x, writes S and fills y
with the update and the bias, and cuBLAS adds x @ weight.T into it (beta = 1, whose read of y hides
under its arithmetic). Base-first would read and write y once more. Backward: one read of dy gives
partial dS and dB (two reads where the rank makes partial dS the larger traffic), one read of x and
one write of dx give partial dA and the update's share of dx, and cuBLAS adds dy @ weight into that.
Dropout's mask is drawn again from its seed, never stored. A rank above 64 takes several tiles, each
of which reads its activations anew.

Bytes beyond the base products, M x K -> N in 2 bytes and r = 16: forward 2 M (K + N), backward
2 M (N + 2 K), and the partial sums in float32: 4 r (M N / 128 + N M / slab + K M / slab), twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.dropout import keep_scale, keep_threshold
from peftkern.kernels.aot import AotCase, tiles
from peftkern.kernels.configs import RANK_LEAST, Problem, TileConfig, block_rank, ceil_div, slab
from peftkern.kernels.launch import config_for, guard, precision, rows_of
from peftkern.kernels.primitives import dot, dot_factor, dropped, join_sums, keep_mask, narrow

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANK_MAX = 256
SIZE_MAX = 65535 * 64  # programs that CUDA takes on an axis, columns of the least tile
ROWS_MAX = 2**30


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
    """S = s_scale * (x * keep) @ A.T for some rows, then scaling * S @ B.T + bias for some columns.

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
            y = dot(s, b.to(tl.float32), PRECISION)
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
    """Columns of dy in a slab of rows: partial dS [tile, M, r], dB [slab, N, r] and dbias."""
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
    """Columns of x in a slab of rows: dropout'(dS @ A) and partial dA [slab, r, K].

    NEED_DX is for ranks of one tile, as EXPAND is.
    """
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
        ).to(tl.float32)
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
            dx = dot(ds, a, PRECISION)
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
    """out = keep * update_scale * S @ factor + sum of parts + bias, S = s_scale * sum of its."""
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
            out += dot(s * update_scale, factor.to(tl.float32), PRECISION)
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
    """Reason against a LoRA linear layer of weight [N, K] on these kernels."""
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
    """Reason against a weight [N, K] and its factors, whatever is done with them."""
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


def refusal_forward(x: Tensor, weight: Tensor, *args: object) -> str | None:
    lora_A, lora_B, _, _, keep, _ = args
    return refusal(x, tuple(weight.shape), lora_A, lora_B, keep)


def refusal_backward(dy: Tensor, *args: object) -> str | None:
    _, _, _, lora_A, lora_B, _, keep, _, _ = args
    return refusal(dy, (lora_B.shape[0], lora_A.shape[1]), lora_A, lora_B, keep)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, weight.shape[1])
    y, S = update_forward(rows, lora_A, lora_B, bias, scaling, keep, dropout_p)
    if y.shape[0]:
        y.addmm_(rows, weight.t())
    return y.view(*x.shape[:-1], y.shape[1]), S.view(*x.shape[:-1], S.shape[1])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = rows_of(dy, lora_B.shape[0])
    dS, dB, dbias = gradients_sb(rows, S, lora_B, scaling, needs)
    need_dx, need_dA = needs[:2]
    dx, dA = gradients_xa(x, lora_A, dS, keep, dropout_p, (need_dx, need_dA), dy.dtype)
    if need_dx:
        if rows.shape[0]:
            dx.addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], lora_A.shape[1])
    empty = dy.new_empty(0)
    return tuple(empty if grad is None else grad for grad in (dx, dA, dB, dbias))


def update_forward(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """scaling * S @ lora_B.T + bias in the dtype of x [M, K], and S = dropout(x) @ lora_A.T."""
    M, (N, r) = x.shape[0], lora_B.shape
    y = x.new_empty((M, N))
    if M == 0:
        return y, x.new_empty((0, r), dtype=torch.float32)
    lora_B = lora_B.contiguous()
    scale = keep_scale(keep, dropout_p)
    if r <= block_rank(r):
        return y, _shrink(x, lora_A, keep, dropout_p, scale, (lora_B, bias, scaling, y))
    S = _shrink(x, lora_A, keep, dropout_p, scale)
    update_epilogue(None, S[None], lora_B.t(), bias, None, 0.0, (1.0, scaling), None, y)
    return y, S


def _shrink(
    x: Tensor,
    lora_A: Tensor,
    keep: Tensor | None,
    dropout_p: float,
    scale: float,
    expand: tuple[Tensor, Tensor | None, float, Tensor] | None = None,
) -> Tensor:
    """S = scale * (x * keep) @ lora_A.T; `expand`: lora_B, bias, scaling, and y to fill too."""
    (M, K), r = x.shape, lora_A.shape[0]
    lora_B, bias, scaling, y = (None, None, 1.0, None) if expand is None else expand
    N = 1 if y is None else y.shape[1]
    S = x.new_empty((M, r), dtype=torch.float32)
    config = _config("lora_forward", M, N, K, r, x)
    grid = (ceil_div(M, config.block_m), config.splits, ceil_div(r, block_rank(r)))
    with guard(x):
        _lora_forward_kernel[grid](
            x,
            lora_A.contiguous(),
            lora_B,
            None if bias is None else bias.contiguous(),
            keep,
            S,
            y,
            M,
            N,
            K,
            r,
            scale,
            scaling,
            keep_threshold(dropout_p),
            EXPAND=y is not None,
            HAS_BIAS=bias is not None,
            HAS_DROPOUT=keep is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=block_rank(r),
            PRECISION=precision(x.device),
            **config.launch(),
        )
    return S


def gradients_sb(
    dy: Tensor, S: Tensor | None, lora_B: Tensor, scaling: float, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dS = scaling * dy @ lora_B (float32), dB = scaling * dy.T @ S and dbias, where wanted."""
    need_dS, need_dB, need_dbias = needs[0] or needs[1], needs[2], needs[3]
    (M, N), r = dy.shape, lora_B.shape[1]
    if M == 0:
        return (
            dy.new_zeros((0, r), dtype=torch.float32) if need_dS else None,
            lora_B.new_zeros(lora_B.shape) if need_dB else None,
            dy.new_zeros(N) if need_dbias else None,
        )
    config = _config("lora_backward_sb", M, N, 1, r, dy)
    tiles, rows = ceil_div(N, config.block_n), slab(M, config.block_m, config.splits)
    slabs = ceil_div(M, rows)
    dS = None
    if need_dS and 8 * r * tiles > N * dy.element_size():
        # Partial sums, written and read, would be more bytes than a second read of dy.
        dS = _shrink(dy, lora_B.t(), None, 0.0, scaling)
        need_dS = False
    parts = _partial(need_dS, (tiles, M, r), dy)
    dB = _partial(need_dB, (slabs, N, r), dy)
    dbias = _partial(need_dbias, (slabs, N), dy)
    if need_dS or need_dB or need_dbias:
        with guard(dy):
            _lora_backward_sb_kernel[(tiles, slabs, ceil_div(r, block_rank(r)))](
                dy,
                lora_B.contiguous(),
                S.reshape(M, r) if need_dB else None,
                parts,
                dB,
                dbias,
                M,
                N,
                r,
                rows,
                scaling,
                NEED_DS=need_dS,
                NEED_DB=need_dB,
                NEED_DBIAS=need_dbias,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_R=block_rank(r),
                PRECISION=precision(dy.device),
                **config.launch(),
            )
    if need_dS:
        dS = _added(parts, torch.float32)
    return dS, _added(dB, lora_B.dtype), _added(dbias, dy.dtype)


def gradients_xa(
    x: Tensor | None,
    lora_A: Tensor,
    dS: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """The update's share of dx [M, K] in `dtype`, and dA = dS.T @ dropout(x), where wanted."""
    need_dx, need_dA = needs
    if not (need_dx or need_dA):
        return None, None
    (r, K), M = lora_A.shape, len(dS)
    dx = dS.new_empty((M, K), dtype=dtype) if need_dx else None
    if M == 0:
        return dx, lora_A.new_zeros(lora_A.shape) if need_dA else None
    chunks = ceil_div(r, block_rank(r))
    if chunks > 1 and need_dx:
        scales = (1.0, keep_scale(keep, dropout_p))
        update_epilogue(
            None, dS[None], lora_A.contiguous(), None, keep, dropout_p, scales, None, dx
        )
        need_dx = False
        if not need_dA:
            return dx, None
    rows = rows_of(x, K) if need_dA else None
    config = _config("lora_backward_xa", M, 1, K, r, rows if need_dA else dx)
    step = slab(M, config.block_m, config.splits)
    slabs = ceil_div(M, step)
    dA = _partial(need_dA, (slabs, r, K), dS)
    with guard(dS):
        _lora_backward_xa_kernel[(ceil_div(K, config.block_k), slabs, chunks)](
            rows,
            lora_A.contiguous(),
            dS,
            keep,
            dx if need_dx else None,
            dA,
            M,
            K,
            r,
            step,
            keep_scale(keep, dropout_p),
            keep_threshold(dropout_p),
            NEED_DX=need_dx,
            NEED_DA=need_dA,
            HAS_DROPOUT=keep is not None,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=block_rank(r),
            PRECISION=precision(dS.device),
            **config.launch(),
        )
    return dx, _added(dA, lora_A.dtype)


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
    """out = keep * scales[1] * S @ factor + parts.sum(0) + bias, S = scales[0] * s_parts.sum(0)."""
    M, N = out.shape
    r = 0 if factor is None else factor.shape[0]
    config = config_for(Problem("epilogue", M, N, 1, r, 8 * out.element_size()), out.device)
    with guard(out):
        _epilogue_kernel[(ceil_div(M, config.block_m), ceil_div(N, config.block_n))](
            parts,
            s_parts,
            factor,
            None if bias is None else bias.contiguous(),
            keep,
            S,
            out,
            M,
            N,
            r,
            0 if parts is None else len(parts),
            len(s_parts) if r else 0,
            factor.stride(0) if r else 0,
            factor.stride(1) if r else 0,
            *scales,
            keep_threshold(dropout_p),
            HAS_PARTS=parts is not None,
            HAS_UPDATE=r > 0,
            STORE_S=S is not None,
            HAS_BIAS=bias is not None,
            HAS_DROPOUT=keep is not None and r > 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=block_rank(r),
            PRECISION=precision(out.device),
            **config.launch(),
        )


def _config(kernel: str, M: int, N: int, K: int, r: int, activations: Tensor) -> TileConfig:
    problem = Problem(kernel, M, N, K, r, 8 * activations.element_size())
    return config_for(problem, activations.device)


def _partial(wanted: bool, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    return like.new_empty(shape, dtype=torch.float32) if wanted else None


def _added(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Partial sums added in their order: torch reduces the first dimension deterministically."""
    if parts is None:
        return None
    total = parts[0] if len(parts) == 1 else parts.sum(0)
    return total.to(dtype)


def _forward_case(M: int, r: int, dtype: str, adapter: str, dropout: bool = False) -> AotCase:
    config = tiles("lora_forward", M, 4096, 4096, r, 32 if dtype == "fp32" else 16)
    arguments = {
        "x_ptr": f"*{dtype}",
        "a_ptr": f"*{adapter}",
        "b_ptr": f"*{adapter}",
        "bias_ptr": f"*{dtype}",
        "seed_ptr": "*i64" if dropout else None,
        "s_ptr": "*fp32",
        "y_ptr": f"*{dtype}",
        "M": "i32",
        "N": "i32:16",
        "K": "i32:16",
        "r": "i32:16",
        "s_scale": "fp32",
        "scaling": "fp32",
        "threshold": "i32",
        "EXPAND": r <= block_rank(r),
        "HAS_BIAS": True,
        "HAS_DROPOUT": dropout,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_rank(r),
        "PRECISION": "tf32x3",
    }
    name = f"lora_forward/M{M}/r{r}/{dtype}/adapters-{adapter}{'/dropout' if dropout else ''}"
    return AotCase(name, _lora_forward_kernel, arguments, config)


def _backward_sb_case(M: int, r: int, dtype: str, adapter: str) -> AotCase:
    config = tiles("lora_backward_sb", M, 4096, 1, r, 32 if dtype == "fp32" else 16)
    arguments = {
        "dy_ptr": f"*{dtype}",
        "b_ptr": f"*{adapter}",
        "s_ptr": "*fp32",
        "ds_ptr": "*fp32",
        "db_ptr": "*fp32",
        "dbias_ptr": "*fp32",
        "M": "i32",
        "N": "i32:16",
        "r": "i32:16",
        "slab": "i32",
        "scaling": "fp32",
        "NEED_DS": block_rank(r) == RANK_LEAST,
        "NEED_DB": True,
        "NEED_DBIAS": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": block_rank(r),
        "PRECISION": "tf32x3",
    }
    name = f"lora_backward_sb/M{M}/r{r}/{dtype}/adapters-{adapter}"
    return AotCase(name, _lora_backward_sb_kernel, arguments, config)


def _backward_xa_case(M: int, r: int, dtype: str, adapter: str, dropout: bool) -> AotCase:
    config = tiles("lora_backward_xa", M, 1, 4096, r, 32 if dtype == "fp32" else 16)
    arguments = {
        "x_ptr": f"*{dtype}",
        "a_ptr": f"*{adapter}",
        "ds_ptr": "*fp32",
        "seed_ptr": "*i64" if dropout else None,
        "dx_ptr": f"*{dtype}",
        "da_ptr": "*fp32",
        "M": "i32",
        "K": "i32:16",
        "r": "i32:16",
        "slab": "i32",
        "keep_scale": "fp32",
        "threshold": "i32",
        "NEED_DX": r <= block_rank(r),
        "NEED_DA": True,
        "HAS_DROPOUT": dropout,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_rank(r),
        "PRECISION": "tf32x3",
    }
    name = f"lora_backward_xa/M{M}/r{r}/{dtype}/adapters-{adapter}{'/dropout' if dropout else ''}"
    return AotCase(name, _lora_backward_xa_kernel, arguments, config)


def _epilogue_case(
    M: int, r: int, dtype: str, adapter: str, forward: bool, parts: bool = True
) -> AotCase:
    config = tiles("epilogue", M, 4096, 1, r, 32 if dtype == "fp32" else 16)
    arguments = {
        "part_ptr": "*fp32" if parts else None,
        "s_part_ptr": "*fp32" if r else None,
        "factor_ptr": f"*{adapter}" if r else None,
        "bias_ptr": f"*{dtype}" if forward else None,
        "seed_ptr": None if forward else "*i64",
        "s_ptr": "*fp32" if forward and r and parts else None,
        "out_ptr": f"*{dtype}",
        "M": "i32",
        "N": "i32:16",
        "r": "i32:16",
        "splits": "i32",
        "s_splits": "i32",
        "stride_rank": 1 if forward else "i32:16",
        "stride_column": "i32:16" if forward else 1,
        "s_scale": "fp32",
        "update_scale": "fp32",
        "threshold": "i32",
        "HAS_PARTS": parts,
        "HAS_UPDATE": r > 0,
        "STORE_S": forward and r > 0 and parts,
        "HAS_BIAS": forward,
        "HAS_DROPOUT": not forward,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_R": block_rank(r),
        "PRECISION": "tf32x3",
    }
    name = f"epilogue/{'forward' if forward else 'backward'}/M{M}/r{r}/{dtype}/adapters-{adapter}"
    name += "" if parts else "/alone"
    return AotCase(name, _epilogue_kernel, arguments, config)


AOT_CASES = (
    _forward_case(1, 16, "bf16", "fp32"),
    _forward_case(512, 16, "bf16", "fp32"),
    _forward_case(8192, 16, "bf16", "fp32", dropout=True),
    _forward_case(8192, 16, "bf16", "bf16"),
    _forward_case(1024, 32, "bf16", "fp32", dropout=True),
    _forward_case(8192, 64, "bf16", "fp32", dropout=True),
    _forward_case(8192, 256, "bf16", "fp32", dropout=True),
    _forward_case(8192, 64, "fp16", "fp32"),
    _forward_case(8192, 64, "fp32", "fp32", dropout=True),
    _forward_case(8192, 256, "fp32", "fp32"),
    _backward_sb_case(512, 16, "bf16", "fp32"),
    _backward_sb_case(8192, 16, "bf16", "bf16"),
    _backward_sb_case(8192, 64, "bf16", "fp32"),
    _backward_sb_case(8192, 64, "fp16", "fp32"),
    _backward_sb_case(8192, 256, "bf16", "fp32"),
    _backward_sb_case(8192, 64, "fp32", "fp32"),
    _backward_sb_case(8192, 256, "fp32", "fp32"),
    _backward_xa_case(512, 16, "bf16", "fp32", False),
    _backward_xa_case(8192, 16, "bf16", "bf16", True),
    _backward_xa_case(8192, 64, "bf16", "fp32", True),
    _backward_xa_case(8192, 256, "bf16", "fp32", True),
    _backward_xa_case(8192, 64, "fp32", "fp32", True),
    _backward_xa_case(8192, 256, "fp32", "fp32", True),
    _epilogue_case(1, 0, "bf16", "fp32", True),
    _epilogue_case(1, 16, "bf16", "fp32", True),
    _epilogue_case(128, 64, "bf16", "fp32", False),
    _epilogue_case(128, 256, "bf16", "fp32", True),
    _epilogue_case(128, 256, "fp32", "fp32", False),
    _epilogue_case(8192, 256, "bf16", "fp32", True, parts=False),
    _epilogue_case(8192, 256, "bf16", "bf16", True, parts=False),
    _epilogue_case(8192, 256, "bf16", "fp32", False, parts=False),
    _epilogue_case(8192, 256, "fp32", "fp32", False, parts=False),
)
