"""Fingerprint of stored weights, by which what is kept beside them is known to be still theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEP = 1 << 18  # eight bytes each; what is read at a time
_FACTOR = -7046029254386353131  # odd: 2^64 over the golden ratio


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return a number of each tensor's bytes and their order, 0 of None.

    The same after the tensors were moved, copied or loaded again, unlike addresses and versions;
    another one, but for a chance of 2^-64, after anything was written.
    """
    return tuple(0 if one is None else _number(one) for one in tensors)


def _number(tensor: Tensor) -> int:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    found, place = 0, torch.arange(_STEP, device=data.device)
    for start in range(0, len(data), _STEP):
        part = data[start : start + _STEP]
        mixed = (part ^ (part >> 29)) * (2 * (place[: len(part)] + start) + 1)
        found = (found * _FACTOR + int(mixed.sum())) % (1 << 64)
    return found
