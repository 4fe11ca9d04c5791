"""Dense product y = x @ w.T in Triton: the share of cuBLAS that a short kernel reaches.

An experiment, not a kernel of the library. What fuses a low-rank update into a dense product has to
be built on one of these, so their share of cuBLAS bounds what fusing can gain. Both are persistent:
a program per SM walks over the tiles of y, in groups of rows that share w in L2.
`descriptors` lets the TMA unit copy tiles (sm_90 and newer), `pointers` computes an address for
every element, as on older GPUs.

x [M, K], w [N, K] of one 16-bit dtype, contiguous (descriptors: N and K multiples of 8); y [M, N]
in that dtype; sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.launch import traits
from peftkern.kernels.primitives import dot, narrow


@dataclass(frozen=True)
class Tile:
    """Tile of y, step along K, and launch parameters; named after the tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}"

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# Shared memory on sm_90: (m + n) * k * 2 bytes for each stage, and a tile of y on its way out.
WIDE = Tile(128, 256, 64, warps=8, stages=3)
SQUARE = Tile(128, 128, 64, warps=4, stages=4)


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr = 8):
    """Return a tile's first row and column: so many row tiles come before the next columns."""
    across = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    rows = min(tl.cdiv(M, BLOCK_M) - first, GROUP)
    rest = tile % (GROUP * across)
    return (first + rest % rows) * BLOCK_M, rest // rows * BLOCK_N


@triton.jit
def _descriptors_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # Counted apart, so that the store of a tile need not wait in the pipeline of the next one's
    # loads.
    stored = tl.program_id(0) - PROGRAMS
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row, column = _place(tile, M, N, BLOCK_M, BLOCK_N)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            a = x.load([row, k * BLOCK_K])
            b = w.load([column, k * BLOCK_K])
            sums += dot(a, b.T, "ieee")
        stored += PROGRAMS
        row, column = _place(stored, M, N, BLOCK_M, BLOCK_N)
        y.store([row, column], narrow(sums, y_ptr.dtype.element_ty))


@triton.jit
def _pointers_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    along = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        row, column = _place(tile, M, N, BLOCK_M, BLOCK_N)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        # Past the end the first ones are read again: no mask, and nothing of it is stored.
        x_rows = x_ptr + (rows % M).to(tl.int64)[:, None] * K + along[None, :]
        w_rows = w_ptr + (columns % N).to(tl.int64)[None, :] * K + along[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = tl.load(x_rows + k, mask=along[None, :] < K - k, other=0.0)
            b = tl.load(w_rows + k, mask=along[:, None] < K - k, other=0.0)
            sums += dot(a, b, "ieee")
        y = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(y, narrow(sums, y_ptr.dtype.element_ty), mask=inside)


def _run(kernel, x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    y = x.new_empty(m, n)
    programs = min(traits(x.device).processors, triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n))
    sizes = (m, n, k, programs)
    kernel[(programs,)](x, w, y, *sizes, **tile.constants(), **tile.launch())
    return y


def descriptors(x: Tensor, w: Tensor, tile: Tile = WIDE) -> Tensor:
    """Multiply x @ w.T by tensor descriptors, which the kernel writes into given memory."""

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=x.device)

    triton.set_allocator(scratch)
    return _run(_descriptors_kernel, x, w, tile)


def pointers(x: Tensor, w: Tensor, tile: Tile = WIDE) -> Tensor:
    """Multiply x @ w.T by addresses."""
    return _run(_pointers_kernel, x, w, tile)
