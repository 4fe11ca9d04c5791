"""Singular values and vectors of scaling * B A on a GPU, for lists of pairs of every shape.

The steps of csrc/include/peftkern/low_rank_svd.h, all in float64: Gram matrices of tiles of rows,
pivoted Cholesky with a second Gram pass where a factor's condition number asks for it, the SVD of
the r x r core by one-sided Jacobi on a pivoted QR (`low_rank_core.py`), one rotation of each
factor. Addresses and sizes come from a table on the device. What depends on the data, the second
pass and the number of sweeps, is decided there: nothing waits for the host.

Launches of a list: 11, or 8 for mode "fast"; more where it mixes dtypes, or ranks up to 16, 32, 64.
Bytes: both factors are read twice (ill-conditioned ones three times), U and V written once; for
every tile of rows a Gram matrix is written and read. FLOPs per element: 2 r for the Gram matrix, 2
r to rotate.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.pointers import address_table
from peftkern.kernels.configs import TileConfig, block_rank, ceil_div
from peftkern.kernels.launch import guard, traits
from peftkern.kernels.low_rank_core import (
    ADDRESS,
    DTYPE_CODE,
    FIRST_TILE,
    LENGTH,
    OUTPUT,
    RANK,
    SECOND_PASS,
    field,
    low_rank_combine_kernel,
    low_rank_core_kernel,
    low_rank_factorize_kernel,
    low_rank_jacobi_kernel,
    square,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANK_MAX = 64  # of the cores: their matrices fill the registers of a program
SWEEPS = 30  # of Jacobi at most; 6 to 12 are usual
_TILES_MAX = 65535  # programs along the second axis of a launch
_TRITON_TYPES = (tl.float32, tl.bfloat16, tl.float16)


def tile_rows(R: int) -> int:
    """Return the rows of a factor that one program takes.

    Fixed, as all tiles here are, by the rank and the device alone: a pair has the same bits in
    every list.
    """
    return 512 if R < 64 else 1024


def tile_config(R: int, tensor_cores: bool) -> TileConfig:
    """Return the tiles of Gram and rotation, `block_m` rows at a time: the largest without spills.

    Where Triton has no tensor-core code for float64, plain fused multiply-adds want smaller tiles:
    those of 64 rows with 4 or 8 warps do not compile for sm100.
    """
    if not tensor_cores:
        return TileConfig(32, R, num_warps=R // 4, num_stages=1)
    return TileConfig(128 if R == 16 else 64, R, num_warps=4 if R == 16 else 8, num_stages=1)


def core_config(R: int) -> TileConfig:
    """Return warps whose registers hold a program's matrices; one warp needs no barriers."""
    return TileConfig(R, R, num_warps={16: 1, 32: 4, 64: 8}[R], num_stages=1)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, out_dtype=tl.float64)


@triton.jit
def _offsets(first, end, length, r, SIDE: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Return offsets [BLOCK, R] and mask of rows of a side: of a [length, r] or [r, length]."""
    rows = (first + tl.arange(0, BLOCK))[:, None]
    ranks = tl.arange(0, R)[None, :]
    inside = (rows < end) & (ranks < r)
    if SIDE == 1:
        return ranks * length + rows, inside
    else:
        return rows * r + ranks, inside


@triton.jit
def _tile(x_ptr, offsets, inside):
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def _factor(table_ptr, pair, count, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Return pointer, length and rank of a factor."""
    x_ptr = field(table_ptr, ADDRESS + SIDE, pair, count).to(tl.pointer_type(DTYPE))
    length = field(table_ptr, LENGTH + SIDE, pair, count)
    return x_ptr, length, field(table_ptr, RANK, pair, count)


@triton.jit(do_not_specialize=["count"])
def _low_rank_gram_kernel(
    table_ptr,
    kappa_ptr,
    factors_ptr,
    partial_ptr,
    count,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,
    OF_Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """Compute B^T B or A A^T of one tile of rows; OF_Q: of the factor times its inverse."""
    pair = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    x_ptr, length, r = _factor(table_ptr, pair, count, SIDE, DTYPE)
    begin = tile * ROWS
    wanted = (begin < length) & (field(table_ptr, DTYPE_CODE + SIDE, pair, count) == CODE)
    factor = SIDE * count + pair
    if OF_Q:
        wanted = wanted & (tl.load(kappa_ptr + factor) > SECOND_PASS)
    if not wanted:
        return
    if OF_Q:
        inverse = tl.load(square(factors_ptr + (4 * factor + 1) * R * R, R))
    end = tl.minimum(begin + ROWS, length)
    gram = tl.zeros((R, R), tl.float64)
    offsets, inside = _offsets(begin, end, length, r, SIDE, BLOCK, R)
    x = _tile(x_ptr, offsets, inside)
    for first in range(begin, end, BLOCK):
        offsets, inside = _offsets(first + BLOCK, end, length, r, SIDE, BLOCK, R)
        coming = _tile(x_ptr, offsets, inside)  # on its way while x is multiplied
        q = _dot(x, inverse) if OF_Q else x
        gram += _dot(tl.trans(q), q)
        x = coming
    index = field(table_ptr, FIRST_TILE + SIDE, pair, count) + tile
    tl.store(square(partial_ptr + index * R * R, R), gram)


@triton.jit(do_not_specialize=["count"])
def _low_rank_rotate_kernel(
    table_ptr,
    combined_ptr,
    out_ptr,
    count,
    CODE: tl.constexpr,
    DTYPE: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """Compute a tile of the rows of U, or of the columns of Vh."""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * ROWS
    x_ptr, length, r = _factor(table_ptr, pair, count, SIDE, DTYPE)
    wanted = (begin < length) & (field(table_ptr, DTYPE_CODE + SIDE, pair, count) == CODE)
    if not wanted:
        return
    other = field(table_ptr, LENGTH + 1 - SIDE, pair, count)
    width = tl.minimum(tl.minimum(length, other), r)
    out_ptr += field(table_ptr, OUTPUT + SIDE, pair, count)
    combined = tl.load(square(combined_ptr + (2 * pair + SIDE) * R * R, R))
    end = tl.minimum(begin + ROWS, length)
    offsets, inside = _offsets(begin, end, length, r, SIDE, BLOCK, R)
    x = _tile(x_ptr, offsets, inside)
    for first in range(begin, end, BLOCK):
        offsets, inside = _offsets(first + BLOCK, end, length, r, SIDE, BLOCK, R)
        coming = _tile(x_ptr, offsets, inside)
        offsets, inside = _offsets(first, end, length, width, SIDE, BLOCK, R)
        tl.store(out_ptr + offsets, _dot(x, combined).to(tl.float32), mask=inside)
        x = coming


def refusal(lora_B: list[Tensor], lora_A: list[Tensor]) -> str | None:
    """Return why the kernels cannot decompose these pairs, None if they can."""
    if torch.version.hip:
        return "Triton does not compile products of float64 matrices for AMD"
    for tensor in (*lora_B, *lora_A):
        if tensor.dtype not in DTYPES:
            return f"the dtype is {tensor.dtype}"
        if tensor.device != lora_B[0].device:
            return f"tensors are on {lora_B[0].device} and {tensor.device}"
    r = max(A.shape[0] for A in lora_A)
    if r > RANK_MAX:
        return f"the rank is {r}, more than {RANK_MAX}"
    length = max(max(B.shape[0], A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True))
    if length > _TILES_MAX * tile_rows(block_rank(1)):
        return f"a factor of length {length} has more than {_TILES_MAX} tiles"
    return None


class _Pair(NamedTuple):
    """A pair in the order of the table's rows, from the addresses to `index`."""

    lora_B: Tensor
    lora_A: Tensor
    length_B: int
    length_A: int
    code_B: int
    code_A: int
    U_at: int
    Vh_at: int
    r: int
    S_at: int
    scaling: int
    index: int

    @property
    def width(self) -> int:
        return min(self.length_B, self.length_A, self.r)


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decompose lists of pairs; without `vectors` only the rotation is left out, S is the same."""
    device = lora_B[0].device
    groups: dict[int, list[_Pair]] = {}
    U_at = Vh_at = S_at = 0
    for index, (B, A, factor) in enumerate(zip(lora_B, lora_A, scaling, strict=True)):
        B, A = B.contiguous(), A.contiguous()
        sizes = (B.shape[0], A.shape[1])
        codes = (DTYPES.index(B.dtype), DTYPES.index(A.dtype))
        bits = struct.unpack("q", struct.pack("d", factor))[0]
        pair = _Pair(B, A, *sizes, *codes, U_at, Vh_at, len(A), S_at, bits, index)
        S_at += pair.width
        if vectors:
            U_at, Vh_at = U_at + sizes[0] * pair.width, Vh_at + sizes[1] * pair.width
        if pair.r:
            groups.setdefault(block_rank(pair.r), []).append(pair)
    U, S, Vh = (torch.empty(n, dtype=torch.float32, device=device) for n in (U_at, S_at, Vh_at))
    rank, info = (torch.zeros(len(lora_B), dtype=torch.int64, device=device) for _ in range(2))
    with guard(lora_B[0]):
        for R, pairs in groups.items():
            group = _Group(R, pairs)
            combined = group.cores(S, rank, info, mode == "accurate")
            if vectors:
                group.rotate(combined, (U, Vh))
    return U, S, Vh, rank, info


class _Group:
    """Pairs whose ranks fill blocks of one size: their table, and the launches over them."""

    def __init__(self, R: int, pairs: list[_Pair]) -> None:
        rows = list(zip(*pairs, strict=True))
        factors = [*rows[0], *rows[1]]
        lengths = [*rows[2], *rows[3]]
        tiles = [ceil_div(length, tile_rows(R)) for length in lengths]
        self.R, self.count, self.tiles = R, len(pairs), sum(tiles)
        self.longest = [max(side) for side in rows[2:4]]
        self.codes = [sorted(set(side)) for side in rows[4:6]]
        self.device = factors[0].device
        first_tiles = [0, *itertools.accumulate(tiles)][:-1]
        numbers = [*itertools.chain(*rows[2:]), *first_tiles]
        self.table = address_table(factors, self.device, numbers)

    def cores(self, S: Tensor, rank: Tensor, info: Tensor, accurate: bool) -> Tensor:
        """Fill S, rank and info; return [count, 2, R, R], by which the factors are multiplied."""
        R, count, table = self.R, self.count, self.table
        kappa = self._float64(2, count)
        norms = self._float64(2, count, R)
        factors = self._float64(2, count, 2, 2, R, R)  # (root, inverse) of the first, second pass
        partial = self._float64(self.tiles, R, R)
        vectors, combined = (self._float64(count, 2, R, R) for _ in range(2))
        passes = (table, kappa, norms, factors)
        options = {"R": R, **core_config(R).launch()}
        for second in (False, True) if accurate else (False,):
            for side in range(2):
                self._over_tiles(
                    _low_rank_gram_kernel, side, (kappa, factors, partial), OF_Q=second
                )
            low_rank_factorize_kernel[(2 * count,)](
                *passes, partial, count, SECOND=second, ROWS=tile_rows(R), **options
            )
        low_rank_core_kernel[(count,)](*passes, vectors, info, count, ACCURATE=accurate, **options)
        low_rank_jacobi_kernel[(count,)](table, vectors, info, count, SWEEPS=SWEEPS, **options)
        results = (vectors, combined, S, rank, info)
        low_rank_combine_kernel[(count,)](*passes, *results, count, ACCURATE=accurate, **options)
        return combined

    def rotate(self, combined: Tensor, outputs: tuple[Tensor, Tensor]) -> None:
        for side, out in enumerate(outputs):
            self._over_tiles(_low_rank_rotate_kernel, side, (combined, out))

    def _over_tiles(self, kernel: Any, side: int, tensors: Sequence[Tensor], **constants) -> None:
        """Launch over the tiles of a side once for each of its dtypes, as a rule one."""
        tiles = ceil_div(self.longest[side], tile_rows(self.R))
        config = tile_config(self.R, traits(self.device).float64_cores)
        for code in self.codes[side] if tiles else ():
            kernel[(self.count, tiles)](
                self.table,
                *tensors,
                self.count,
                CODE=code,
                DTYPE=_TRITON_TYPES[code],
                SIDE=side,
                ROWS=tile_rows(self.R),
                BLOCK=config.block_m,
                R=self.R,
                **constants,
                **config.launch(),
            )

    def _float64(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self.device)
