"""Oracle of the products of block Lanczos, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.reference.nf4 import nf4_dequantize

_PIECE = 1 << 18  # values, 1 MB, which stay in a core's cache between two products
_ELSEWHERE = 1 << 25  # fewer launches


def gram_product(
    weight: Tensor, x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = x W^T, z = y W and the squared norms of the rows of W, a piece of W at a time.

    Args: weight [m, n]; x [width, n].
    Returns: y [width, m], z [width, n] and squares [m], the last two [0] if they are not needed:
        float64 if the weight or x is, else float32, in which it accumulates.
    """
    acc = torch.float64 if torch.float64 in (weight.dtype, x.dtype) else torch.float32
    (m, n), x = weight.shape, x.to(acc)
    y, z = x.new_empty(len(x), m), x.new_zeros((len(x), n) if need_z else 0)
    squares = x.new_empty(m if need_squares else 0)
    rows = max(1, (_PIECE if weight.is_cpu else _ELSEWHERE) // max(n, 1))
    for start in range(0, m, rows):
        block = slice(start, start + rows)
        piece = weight[block].to(acc)
        y[:, block] = x @ piece.T
        if need_z:
            z.addmm_(y[:, block], piece)
        if need_squares:
            squares[block] = torch.linalg.vector_norm(piece, dim=1).square()
    return y, z, squares


def nf4_gram_product(
    w: list[Tensor], layout: list[int], x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `gram_product` over a weight dequantized to float32."""
    return gram_product(nf4_dequantize(w, layout, torch.float32), x, need_z, need_squares)
