"""Checks of a grouped layer's first results on the user's own tensors, against torch.

As `correctness` does: sampled rows of y, S and dx, and all of dA, dB and dbias, with the formula in
float32 (float64 for float32 tensors). Rows at the ends of groups are among those that are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import reference
from peftkern.backends.error_rule import SAMPLED, judged, mean_square, sampled, wide_dtype
from peftkern.backends.reference.grouped_linear import groups

Args = tuple[Any, ...]


def forward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Judge the forward op over dense weights or, with another argument, quantized ones."""
    x, rows, offsets, *weight, transposed, A, B, bias, scaling = args
    R = len(x if rows is None else rows)
    if R == 0:
        return None
    at, ends = _sampled_rows(offsets, R)
    wide = wide_dtype(x.dtype)
    x_at = x[at if rows is None else rows[at]].to(wide)
    bias = None if bias is None else bias.to(wide)
    oracle = _op("forward", weight)(x_at, None, ends, *weight, transposed, A, B, bias, scaling)
    for name, index in (("S", 1), ("y", 0)):
        if index == 0 or A is not None:
            ours, theirs = got[index][at], plain()[index][at]
            reason = judged(name, ours, theirs, oracle[index], x.dtype, x.shape[1])
            if reason is not None:
                return reason
    return None


def backward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Judge the backward op likewise."""
    dy, offsets, x, rows, S, *weight, transposed, A, B, scaling, needs = args
    R = len(dy)
    if R == 0:
        return None
    theirs, wide = plain(), wide_dtype(dy.dtype)
    if needs[0]:
        at, ends = _sampled_rows(offsets, R)
        options = (transposed, A, B, scaling, [True, False, False, False])
        run = _op("backward", weight)
        oracle = run(dy[at].to(wide), ends, None, None, None, *weight, *options)[0]
        reason = judged("dx", got[0][at], theirs[0][at], oracle, dy.dtype, dy.shape[1])
        if reason is not None:
            return reason
    flags = [False, needs[1] and A is not None, needs[2] and A is not None, needs[3]]
    oracles, squares = _sums(dy, offsets, x, rows, S, A, B, scaling, flags, wide)
    for index, name in enumerate(("dx", "dA", "dB", "dbias")):
        if flags[index]:
            typical = math.sqrt(squares[index] / len(offsets))
            pair = (got[index], theirs[index])
            reason = judged(name, *pair, oracles[index], dy.dtype, R, typical)
            if reason is not None:
                return reason
    return None


def _op(direction: str, weight: list[Any]) -> Callable[..., Any]:
    """Return the oracle over a weight of one argument, dense, or of two, quantized."""
    family = "nf4_grouped_linear" if len(weight) == 2 else "grouped_linear"
    return getattr(reference, f"{family}_{direction}")


def _sampled_rows(offsets: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Return rows in order and the ends of the groups among them alone."""
    ends = offsets[:: max(1, len(offsets) // SAMPLED)].tolist()
    edges = {row for end in ends for row in (end - 1, end) if 0 <= row < R}
    at = torch.tensor(sorted({*sampled(R), *edges}), device=offsets.device)
    return at, torch.searchsorted(at, offsets.long(), out_int32=True)


def _sums(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    flags: list[bool],
    wide: torch.dtype,
) -> tuple[list[Tensor | None], list[float]]:
    """Compute dA, dB and dbias, the sums over the rows of a group, and their squared sizes.

    Those are of sums whose terms do not cancel: the means over a group's values, added up.
    """
    shapes = (None, flags[1] and A.shape, flags[2] and B.shape, (len(offsets), dy.shape[1]))
    totals = [
        dy.new_zeros(shape, dtype=wide) if flag else None
        for flag, shape in zip(flags, shapes, strict=True)
    ]
    squares = [0.0] * 4
    for e, at in groups(offsets, len(dy)):
        dy_e = dy[at].to(wide)
        if flags[1]:
            x_e = (x[at] if rows is None else x[rows[at]]).to(wide)
            dS_e = (dy_e @ B[e].to(wide)).mul_(scaling)
            totals[1][e] = dS_e.t() @ x_e
            squares[1] += (mean_square(dS_e) * mean_square(x_e)).sum().item()
        if flags[2]:
            S_e = S[at].to(wide) * scaling
            totals[2][e] = dy_e.t() @ S_e
            squares[2] += (mean_square(dy_e) * mean_square(S_e)).sum().item()
        if flags[3]:
            totals[3][e] = dy_e.sum(0)
            squares[3] += mean_square(dy_e).sum().item()
    return totals, squares
