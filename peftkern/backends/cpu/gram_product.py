"""Steps of block Lanczos in C++: both products from one reading of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cpu.module import float32, isa_and_threads, library, refusal_dense
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import DTYPE_CODES, address, dtype_code, fresh, weight


def refusal(weight: Tensor, x: Tensor) -> str | None:
    """Refuse float64 and integers."""
    return refusal_dense(weight) or refusal_dense(x)


def refusal_nf4(layout: list[int], x: Tensor) -> str | None:
    """Refuse formats, float64 and integers."""
    return refusal_format("cpu", layout) or refusal_dense(x)


def gram_product(
    dense: Tensor, x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dense = dense.contiguous()
    at = address("weight", dense, dense.dtype, dense.numel())
    return _product(dense.shape, at, dtype_code("weight", dense), x, need_z, need_squares)


def nf4_gram_product(
    w: list[Tensor], layout: list[int], x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    code = DTYPE_CODES[torch.float32]
    return _product(layout[3:], weight(w, layout), code, x, need_z, need_squares)


def _product(
    shape: list[int], at: int | tuple, code: int, x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), width, x = shape, x.shape[0], float32(x)
    y, z, squares = (
        torch.empty(size, dtype=torch.float32, device="cpu")
        for size in ((width, m), (width, n) if need_z else 0, m if need_squares else 0)
    )
    library().gram_product(
        isa_and_threads()[0],
        *(m, n, width),
        *(at, code),
        address("x", x, torch.float32, width * n),
        fresh(y),
        fresh(z if need_z else None),
        fresh(squares if need_squares else None),
    )
    return y, z, squares
