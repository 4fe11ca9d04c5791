"""Products over groups of rows on a GPU: the steps of grouped linear layers.

Nothing waits for the host. A launch has as many tiles of rows as any routing could need, R //
BLOCK_M + min(E, R) + 1; a program finds its group by a scan over the offsets. The last group is the
rows past the end, which are zero. `shrink` makes S = x A^T (and dS = scaling * dy B), `product` y =
x W^T + scaling * S B^T + bias, and with the strides of W exchanged dx = dy W + dS A; `reduce` sums
dA, dB and dbias, a group's rows in one program. x is read through `rows`, factors by their strides,
and a 4-bit weight is decoded in the tile loop: nothing of the stack's size is made. Programs of
`product` go through bands of eight tiles of rows, which read the same columns of W in turn.

A row whose index is out of range is not read and gives NaN; raising would wait for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.formats.table import stored
from peftkern.kernels.configs import (
    RANK_LEAST,
    Problem,
    block_rank,
    ceil_div,
    choose,
    grouped_tile,
    next_power,
    rows_of_group,
    slab,
)
from peftkern.kernels.interpreter import dot, narrow
from peftkern.kernels.launch import Plan, code_table, launch, planned, traits, whole_blocks
from peftkern.kernels.low_rank_update import added, partial_sums
from peftkern.kernels.primitives import (
    as_factor,
    dot_factor,
    dot_update,
    join_sums,
    nf4_shared,
    nf4_weight,
)

Sizes, Flags = tuple[int, ...], tuple[bool, ...]
BAND = 8  # tiles of rows


class Stack(NamedTuple):
    """Weights of all groups: tensors of a dense or packed stack, and how products walk it.

    strides: of group (0: one weight for all), output column and summed column, in elements.
    """

    tensors: tuple[Tensor | None, ...] = (None,) * 6
    strides: tuple[int, int, int] = (0, 0, 0)
    form: int = 0
    blocksize: int = 0
    nested_blocksize: int = 0

    @classmethod
    def dense(cls, weight: Tensor | None, transposed: bool) -> Stack:
        """Take weights [E or 1, N, K] ([.., K, N] if transposed); None: there are none."""
        if weight is None:
            return cls()
        group, n, k = weight.stride()
        strides = (group if weight.shape[0] > 1 else 0, n, k)
        return cls((weight, *[None] * 5), _exchanged(strides) if transposed else strides)

    @classmethod
    def packed(cls, w: list[Tensor], layout: list[int], transposed: bool) -> Stack:
        """Take the same, packed."""
        weight = stored(w, layout)
        groups, rows, columns = weight.shape
        strides = (rows * columns if groups > 1 else 0, columns, 1)
        return cls(
            (*weight.pointers, code_table(w[0].device, layout[0])),
            _exchanged(strides) if transposed else strides,
            *layout[:3],
        )

    def backward(self) -> Stack:
        """Exchange output and summed columns: the product by which a gradient goes back."""
        return self._replace(strides=_exchanged(self.strides))

    def inner(self, N: int, K: int) -> str:
        """Name the contiguous columns, "n" or "k", if blocks of codes end with a row of them."""
        name, length = ("k", K) if self.strides[2] == 1 else ("n", N)
        return name if self.blocksize and length % self.blocksize == 0 else ""


def _exchanged(strides: tuple[int, int, int]) -> tuple[int, int, int]:
    group, n, k = strides
    return group, k, n


@triton.jit
def _tile_of_group(offsets_ptr, item, R, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the group of the item-th tile of rows, the tile's first row and the group's end.

    Group E is the rows past the end. Offsets are clamped to [0, R], so no row is out of bounds.
    """
    groups = tl.arange(0, BLOCK_E)
    before = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups <= E), other=0)
    end = tl.load(offsets_ptr + groups, mask=groups < E, other=R)
    size = tl.minimum(tl.maximum(end, 0), R) - tl.minimum(tl.maximum(before, 0), R)
    tiles = tl.where(groups <= E, tl.cdiv(tl.maximum(size, 0), BLOCK_M), 0)
    passed = tl.cumsum(tiles, 0) <= item
    group = tl.sum((passed & (groups <= E)).to(tl.int32))
    item -= tl.sum(tl.where(passed, tiles, 0))
    first, end = _rows_of_group(offsets_ptr, group, R, E)
    return group, first + item * BLOCK_M, tl.where(group <= E, end, 0)


@triton.jit
def _rows_of_group(offsets_ptr, group, R, E):
    """Return a group's first row and the one after its last, clamped to [0, R]."""
    first = tl.load(offsets_ptr + group - 1, mask=(group > 0) & (group <= E), other=0)
    end = tl.load(offsets_ptr + group, mask=group < E, other=R)
    return tl.minimum(tl.maximum(first, 0), R), tl.minimum(tl.maximum(end, 0), R)


@triton.jit
def _source(rows_ptr, rows, in_rows, T, HAS_ROWS: tl.constexpr):
    """Return where rows are in x, and which of them are: an index out of range is not read."""
    if HAS_ROWS:
        index = tl.load(rows_ptr + rows, mask=in_rows, other=-1)
        return index.to(tl.int64), (index >= 0) & (index < T)
    else:
        return rows.to(tl.int64), in_rows


@triton.jit(do_not_specialize=["R", "T", "items"])
def _grouped_product_kernel(
    x_ptr,
    rows_ptr,
    offsets_ptr,
    w_ptr,
    scale_ptr,
    aux_ptr,
    code2_ptr,
    offset_ptr,
    table_ptr,
    s_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    R,
    T,
    items,
    E,
    N,
    K,
    r,
    scale,
    stride_we,
    stride_wn,
    stride_wk,
    stride_fe,
    stride_fr,
    stride_fn,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    INNER: tl.constexpr,
    PTX: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out = x @ W.T + scale * S @ factor + bias for a tile of one group's rows."""
    in_band = BAND * tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // in_band
    within = tl.program_id(0) % in_band
    height = tl.minimum(items - band * BAND, BAND)
    item = band * BAND + within % height
    e, first, end = _tile_of_group(offsets_ptr, item, R, E, BLOCK_M, BLOCK_E)
    if first < end:
        group = e.to(tl.int64)
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        row = rows.to(tl.int64)[:, None]
        first_n = within // height * BLOCK_N
        n = first_n + tl.arange(0, BLOCK_N)
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + group * N + n, mask=(n < N) & (e < E), other=0.0)
            out += bias.to(tl.float32)[None, :]
        if HAS_WEIGHT:
            source, known = _source(rows_ptr, rows, in_rows, T, HAS_ROWS)
            base = group * stride_we
            steps = tl.arange(0, BLOCK_K)
            x_places = source[:, None] * K + steps[None, :]
            if BLOCKSIZE:
                shared = nf4_shared(aux_ptr, offset_ptr, FORMAT, NESTED_BLOCKSIZE)
                weight = (w_ptr, scale_ptr, aux_ptr, code2_ptr, shared)
            else:
                w_places = steps.to(tl.int64)[:, None] * stride_wk
                w_places += base + n.to(tl.int64)[None, :] * stride_wn
            for start in range(0, tl.where(e < E, K, 0), BLOCK_K):
                in_k = steps < K - start
                x = tl.load(
                    x_ptr + x_places + start, mask=known[:, None] & in_k[None, :], other=0.0
                )
                if BLOCKSIZE:
                    w = nf4_weight(
                        weight,
                        table_ptr,
                        base,
                        first_n,
                        start,
                        N,
                        K,
                        stride_wn,
                        stride_wk,
                        FORMAT,
                        BLOCKSIZE,
                        NESTED_BLOCKSIZE,
                        INNER,
                        PTX,
                        BLOCK_N,
                        BLOCK_K,
                    )
                    w = narrow(w, x.dtype)
                else:
                    w = tl.load(
                        w_ptr + w_places + tl.cast(start, tl.int64) * stride_wk,
                        mask=(n < N)[None, :] & in_k[:, None],
                        other=0.0,
                    )
                out += dot(x, w, PRECISION)
            if HAS_ROWS:
                out = tl.where((in_rows & (e < E) & (known == 0))[:, None], float("nan"), out)
        if HAS_UPDATE:
            for first_rank in tl.range(0, tl.where(e < E, r, 0), BLOCK_R, num_stages=1):
                ranks = first_rank + tl.arange(0, BLOCK_R)
                s = tl.load(
                    s_ptr + row * r + ranks[None, :],
                    mask=in_rows[:, None] & (ranks < r)[None, :],
                    other=0.0,
                )
                factor = tl.load(
                    factor_ptr
                    + group * stride_fe
                    + ranks[:, None] * stride_fr
                    + n.to(tl.int64)[None, :] * stride_fn,
                    mask=(ranks < r)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                out += dot_update(s * scale, factor, out_ptr.dtype.element_ty, PRECISION)
        tl.store(
            out_ptr + row * N + n[None, :],
            narrow(out, out_ptr.dtype.element_ty),
            mask=in_rows[:, None] & (n < N)[None, :],
        )


@triton.jit(do_not_specialize=["R", "T", "slab"])
def _grouped_shrink_kernel(
    x_ptr,
    rows_ptr,
    offsets_ptr,
    factor_ptr,
    s_ptr,
    R,
    T,
    E,
    K,
    r,
    slab,
    scale,
    stride_fe,
    stride_fr,
    stride_fk,
    HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute S[slab] = scale * x @ factor.T over a slab of columns, for a tile of one group."""
    e, first, end = _tile_of_group(offsets_ptr, tl.program_id(0), R, E, BLOCK_M, BLOCK_E)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        in_rank = (ranks < r)[None, :]
        source, known = _source(rows_ptr, rows, in_rows, T, HAS_ROWS)
        steps = tl.arange(0, BLOCK_K)
        x_places = source[:, None] * K + steps[None, :]
        places = e.to(tl.int64) * stride_fe + ranks.to(tl.int64)[None, :] * stride_fr
        places += steps.to(tl.int64)[:, None] * stride_fk
        coarse = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        fine = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        first_k = tl.program_id(1) * slab
        last_k = tl.where(e < E, tl.minimum(first_k + slab, K), first_k)
        for start in range(first_k, last_k, BLOCK_K):
            in_k = steps < K - start
            x = tl.load(x_ptr + x_places + start, mask=known[:, None] & in_k[None, :], other=0.0)
            factor = tl.load(
                factor_ptr + places + tl.cast(start, tl.int64) * stride_fk,
                mask=in_rank & in_k[:, None],
                other=0.0,
            )
            coarse, fine = dot_factor(x, factor, coarse, fine, PRECISION)
        s = join_sums(coarse, fine) * scale
        if HAS_ROWS:
            s = tl.where((in_rows & (e < E) & (known == 0))[:, None], float("nan"), s)
        row = tl.program_id(1).to(tl.int64) * R + rows
        tl.store(s_ptr + row[:, None] * r + ranks[None, :], s, mask=in_rows[:, None] & in_rank)


@triton.jit(do_not_specialize=["R", "T"])
def _grouped_reduce_kernel(
    v_ptr,
    rows_ptr,
    offsets_ptr,
    s_ptr,
    gradient_ptr,
    sums_ptr,
    R,
    T,
    E,
    C,
    r,
    scale,
    stride_ge,
    stride_gr,
    stride_gc,
    HAS_ROWS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute gradient = scale * s.T @ v and sums of v over a group, at some columns and ranks."""
    e = tl.program_id(1)
    group = e.to(tl.int64)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_columns = columns < C
    in_rank = (ranks < r)[None, :]
    coarse = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    fine = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    first, end = _rows_of_group(offsets_ptr, e, R, E)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_rows = rows < end
        source, known = _source(rows_ptr, rows, in_rows, T, HAS_ROWS)
        v = tl.load(
            v_ptr + source[:, None] * C + columns[None, :],
            mask=known[:, None] & in_columns[None, :],
            other=0.0,
        )
        if NEED_GRADIENT:
            s = tl.load(
                s_ptr + rows.to(tl.int64)[:, None] * r + ranks[None, :],
                mask=in_rows[:, None] & in_rank,
                other=0.0,
            )
            if HAS_ROWS:
                s = tl.where((in_rows & (known == 0))[:, None], float("nan"), s)
            s = as_factor(s, gradient_ptr.dtype.element_ty, v.dtype)
            coarse, fine = dot_factor(tl.trans(v), s, coarse, fine, PRECISION)
        if NEED_SUMS:
            sums += tl.sum(v.to(tl.float32), 0)
    if NEED_GRADIENT:
        place = group * stride_ge + ranks[None, :] * stride_gr
        tl.store(
            gradient_ptr + place + columns.to(tl.int64)[:, None] * stride_gc,
            narrow(join_sums(coarse, fine) * scale, gradient_ptr.dtype.element_ty),
            mask=in_columns[:, None] & in_rank,
        )
    if NEED_SUMS:
        tl.store(
            sums_ptr + group * C + columns,
            narrow(sums, sums_ptr.dtype.element_ty),
            mask=in_columns & (tl.program_id(2) == 0),
        )


def tiles_of_rows(R: int, E: int, block_m: int) -> int:
    """Return the most tiles that R rows in E groups can take, and those past the end."""
    return R // block_m + min(E, R) + 1


def product(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    stack: Stack,
    S: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
) -> None:
    """Fill out [R, N] = x @ W.T + scale * S @ factor + bias; factor [E, r, N], S [R, r]."""
    (T, K), (R, N), E = x.shape, out.shape, offsets.shape[0]
    if R == 0:
        return
    r, factor_strides = (0, (0, 0, 0)) if factor is None else (factor.shape[1], factor.stride())
    sizes = (R, T, E, N, K, r, 8 * out.element_size())
    coding = (stack.form, stack.blocksize, stack.nested_blocksize, stack.inner(N, K))
    half = r > 0 and out.dtype is torch.float16  # whose update is three products in pieces
    flags = (rows is not None, stack.tensors[0] is not None, bias is not None, half)
    plan = _product_plan(out.device, sizes, stack.strides + factor_strides, coding, scale, flags)
    launch(plan, out, x, rows, offsets, *stack.tensors, S, factor, bias, out)


@planned
def _product_plan(
    device: torch.device,
    sizes: Sizes,
    strides: Sizes,
    coding: tuple[int, int, int, str],
    scale: float,
    flags: Flags,
) -> Plan:
    (R, T, E, N, K, r, bits), (form, blocksize, nested_blocksize, inner) = sizes, coding
    on = traits(device)
    decoding = ("rows" if inner else "values") if blocksize else ""
    config = grouped_tile(rows_of_group(R, E), bits, decoding, on.cores)
    items = tiles_of_rows(R, E, config.block_m)
    has_rows, has_weight, has_bias, half = flags
    block_n = config.block_n // 2 if half and on.cores == "mma" else config.block_n
    block_k = config.block_k
    if inner == "n":
        block_n = whole_blocks(block_n, form, blocksize, N)
    elif inner == "k":
        block_k = whole_blocks(block_k, form, blocksize, K)
    return Plan(
        _grouped_product_kernel,
        (items * ceil_div(N, block_n),),
        (R, T, items, E, N, K, r, scale, *strides),
        HAS_ROWS=has_rows,
        HAS_WEIGHT=has_weight,
        HAS_UPDATE=r > 0,
        HAS_BIAS=has_bias,
        FORMAT=form,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        INNER=inner,
        PTX=on.ptx,
        BAND=BAND,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=RANK_LEAST,
        BLOCK_E=next_power(E + 1),
        PRECISION=on.precision,
        **config.launch(),
    )


def shrink(
    x: Tensor, rows: Tensor | None, offsets: Tensor, factor: Tensor, R: int, scale: float
) -> Tensor:
    """Return S [R, r] = scale * x @ factor.T in float32, for factor [E, r, K]."""
    (T, K), E, r = x.shape, offsets.shape[0], factor.shape[1]
    if R == 0:
        return x.new_empty((0, r), dtype=torch.float32)
    sizes = (R, T, E, K, r, 8 * x.element_size())
    plan = _shrink_plan(x.device, sizes, factor.stride(), scale, rows is not None)
    slabs = plan.grid[1]
    parts = partial_sums(True, x, slabs, R, r)
    launch(plan, x, x, rows, offsets, factor, parts)
    return added(parts, slabs, torch.float32)


@planned
def _shrink_plan(
    device: torch.device, sizes: Sizes, strides: Sizes, scale: float, has_rows: bool
) -> Plan:
    R, T, E, K, r, bits = sizes
    on = traits(device)
    # As a layer of so many rows; splits fill a GPU whose groups are few.
    like = Problem("lora_forward", 16 * rows_of_group(R, E), 1, K, r, bits)
    config = choose(like, on.processors, None, on.cores)
    items, ranks = tiles_of_rows(R, E, config.block_m), ceil_div(r, block_rank(r))
    splits = max(1, min(on.processors // (items * ranks), ceil_div(K, 4 * config.block_k)))
    block_k = min(config.block_k, 64)  # strides of 64 bits take the registers of more
    step = slab(K, block_k, splits)
    return Plan(
        _grouped_shrink_kernel,
        (items, ceil_div(K, step), ranks),
        (R, T, E, K, r, step, scale, *strides),
        HAS_ROWS=has_rows,
        BLOCK_M=config.block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_rank(r),
        BLOCK_E=next_power(E + 1),
        PRECISION=on.precision,
        **config.launch(),
    )


def reduce(
    v: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    S: Tensor | None,
    scale: float,
    gradient: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Fill gradient [E, r, C] = scale * S.T @ v and sums [E, C] of v over each group, if given."""
    (T, C), E, R = v.shape, offsets.shape[0], (v if rows is None else rows).shape[0]
    r, strides = (0, (0, 0, 0)) if gradient is None else (gradient.shape[1], gradient.stride())
    sizes = (R, T, E, C, r, 8 * v.element_size())
    flags = (rows is not None, gradient is not None, sums is not None)
    plan = _reduce_plan(v.device, sizes, strides, scale, flags)
    launch(plan, v, v, rows, offsets, S, gradient, sums)


@planned
def _reduce_plan(
    device: torch.device, sizes: Sizes, strides: Sizes, scale: float, flags: Flags
) -> Plan:
    R, T, E, C, r, bits = sizes
    on = traits(device)
    like = Problem("lora_backward_xa", rows_of_group(R, E), 1, C, max(1, r), bits)
    config = choose(like, on.processors, None, on.cores)
    has_rows, need_gradient, need_sums = flags
    return Plan(
        _grouped_reduce_kernel,
        (ceil_div(C, config.block_k), E, max(1, ceil_div(r, block_rank(r)))),
        (R, T, E, C, r, scale, *strides),
        HAS_ROWS=has_rows,
        NEED_GRADIENT=need_gradient,
        NEED_SUMS=need_sums,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_k,
        BLOCK_R=block_rank(r),
        PRECISION=on.precision,
        **config.launch(),
    )
