"""The rule by which a kernel's result is right or wrong, and which rows are looked at.

An error may be RATIO times that of the plain torch operations in the same dtypes, plus a floor and
what the order of a sum makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.tolerances import FLOOR_RMS, RATIO, errors, floors

SAMPLED = 32  # rows, or blocks


def tensors(args: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors(arg)


def sampled(rows: int) -> list[int]:
    """Return rows to look at: the ends, the edges of tiles, and some drawn without torch's seed."""
    edges = [0, 1, 15, 16, 31, 32, 63, 64, 127, 128]
    last = [rows - 1 - i for i in (0, 1, 2, 7, 15, 16)]
    stride = max(1, rows // (SAMPLED - len(edges) - len(last)))
    spread = range(rows // 7 % stride, rows, stride)
    return sorted({row for row in (*edges, *last, *spread) if 0 <= row < rows})


def compared(got: list[Tensor], plain: list[Tensor]) -> str | None:
    """Compare whole results with plain ones: integers bit for bit, floats to a rounding."""
    for index, (ours, theirs) in enumerate(zip(got, plain, strict=True)):
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            return f"result {index} is {_kind(ours)}, expected {_kind(theirs)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"result {index} differs from torch"
        elif not _same_specials(ours, theirs):
            return f"result {index} has NaN or infinity in other places"
        else:
            finite = theirs.isfinite()
            rms, _ = errors(ours[finite], theirs[finite])
            if rms > 100 * FLOOR_RMS[ours.dtype]:
                return f"result {index} is {rms:.1e} away from torch"
    return None


def judged(
    name: str,
    got: Tensor,
    plain: Tensor,
    oracle: Tensor,
    bits: torch.dtype,
    terms: int,
    typical: float = 0.0,
) -> str | None:
    """Judge one result of a linear op by the rule of the tests.

    Beyond it, sums of many terms in float32 may be in another order than torch's: the error of a
    random walk. typical: the size of such a sum if its terms do not cancel; where they do, that is
    what roundings are relative to.
    """
    if got.dtype is not plain.dtype or got.shape != plain.shape:
        return f"{name} is {_kind(got)}, expected {_kind(plain)}"
    finite = oracle.isfinite() & plain.isfinite()
    if not got[finite].isfinite().all():
        return f"{name} is not finite where torch is"
    (rms, most), (plain_rms, plain_most) = (errors(t[finite], oracle[finite]) for t in (got, plain))
    walk, size = 2.0**-24 * math.sqrt(terms), oracle[finite].square().mean().sqrt().item()
    unit = max(1.0, typical / size) if size > 0 else 1.0
    floor_rms, floor_most = floors(got.dtype, bits)
    bound_rms = RATIO * plain_rms + unit * (floor_rms + walk)
    bound_most = RATIO * plain_most + unit * (floor_most + 4 * walk)
    share = max(rms / bound_rms, most / bound_most)
    return None if share <= 1.0 else f"{name} has {share:.3g} times the error allowed"


def mean_square(rows: Tensor) -> Tensor:
    """Return the mean square of each row, 0 for one that is not finite."""
    return rows.square().mean(1).nan_to_num(0.0, 0.0)


def flat(result: Any) -> list[Tensor]:
    return list(tensors(result if isinstance(result, (tuple, list)) else (result,)))


def _same_specials(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.isfinite(), theirs.isfinite())


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
