"""Dropout masks, stored or as seeds from which every kernel draws them again.

On a CPU the mask is what nn.Dropout would draw, a byte per element. On a GPU a seed of eight bytes
stands for it, so that neither the mask nor the dropped activations are ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_scale(keep: Tensor | None, dropout_p: float) -> float:
    """Return the factor of the kept values, 1 / (1 - p); at p = 1 nothing is kept."""
    return 1.0 if keep is None or dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


def keep_threshold(dropout_p: float) -> int:
    """Return how many of 65,536 equally likely draws are kept: none or all only at p = 1 or 0."""
    threshold = round((1.0 - dropout_p) * 65536)
    return min(max(threshold, 1), 65535) if 0.0 < dropout_p < 1.0 else threshold


def philox_keep(seed: Tensor, rows: int | Tensor, columns: int, dropout_p: float) -> Tensor:
    """Draw the mask, bool [rows, columns], of a seed; rows, how many or the numbers of some.

    Element (row, column) has the 16 bits number column % 8 of Philox4x32 in 7 rounds, with the seed
    as its key and (column // 8, row, 0, 0) as its counter, and is kept if they are below
    `keep_threshold`. Seven rounds are the fewest that pass BigCrush.
    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405
    """
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    row = rows if isinstance(rows, Tensor) else torch.arange(rows, device=seed.device)
    row = row[:, None]
    zero = row.new_zeros(row.shape[0], -(-columns // 8))
    c = [torch.arange(zero.shape[1], device=seed.device) + zero, row + zero, zero, zero]
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # wraps at 64 bits; the shifts below mask
        c = [(b >> 32 & low) ^ c[1] ^ key[0], b & low, (a >> 32 & low) ^ c[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    limit = keep_threshold(dropout_p)
    kept = [half < limit for word in c for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(kept, dim=-1).flatten(1)[:, :columns].contiguous()
