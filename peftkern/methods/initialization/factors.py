"""Factors of a low-rank update from a weight: PiSSA, OLoRA, and the base that they leave.

The model computes what it did before: the base becomes weight - scaling * lora_B @ lora_A, by
panels of rows in float32 and with one rounding to the weight's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.formats.nf4 import ArgumentError
from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import Panels
from peftkern.functional.truncated_svd import TruncatedSVD, Weight, truncated_svd

_PIECE = 1 << 17  # values
_SCALINGS = (1e-18, 1e18)


class Factors(NamedTuple):
    """Update scaling * lora_B @ lora_A to start from: lora_A [r, n], lora_B [m, r], float32.

    energy: share of the squared norm of what was decomposed (the weight, its product with the
    covariance of its inputs, its gradient, its inputs) that the factors keep. excess: estimate of
    how much further from it they are than the best of their rank, relative; certificate: bound on
    that; None where nothing was truncated or no bound was wanted.
    """

    lora_A: Tensor
    lora_B: Tensor
    energy: float
    excess: float | None = None
    certificate: float | None = None

    @property
    def T(self) -> Factors:
        """Factors of the transpose of the update."""
        return self._replace(lora_A=self.lora_B.T, lora_B=self.lora_A.T)


def check_rank(rank: Any, shape: tuple[int, ...], *, half: bool = False) -> None:
    """Raise ValueError unless a weight of this shape has that many directions, or twice as many."""
    limit = min(shape) // 2 if half else min(shape)
    most = "half the smaller side" if half else "the smaller side"
    if type(rank) is not int or not 1 <= rank <= limit:
        raise mismatch("rank", f"1 to {limit}, {most} of {list(shape)}", rank)


def check_scaling(scaling: float) -> None:
    """Raise ValueError unless both factors can have the same share of it in float32."""
    if not _SCALINGS[0] <= scaling <= _SCALINGS[1]:
        raise mismatch("scaling", f"a number of {_SCALINGS[0]:g} to {_SCALINGS[1]:g}", scaling)


def check_finite(weight: Weight) -> float:
    """Return the squared norm of a weight. Raises: ValueError if that is not finite."""
    return _finite(sum(squared_norm(piece) for _, piece in pieces(weight)))


def _finite(squares: float) -> float:
    if not math.isfinite(squares):
        raise ArgumentError("weight: expected finite values, got NaN or Inf")
    return squares


def decompose(weights: Sequence[Weight], rank: int, **options: Any) -> list[TruncatedSVD]:
    """Decompose matrices together; options are those of `truncated_svd`."""
    svd = truncated_svd(list(weights), rank, **options)
    return [
        TruncatedSVD(*(None if part is None else part[i] for part in svd))
        for i in range(len(weights))
    ]


def balanced(svd: TruncatedSVD, scaling: float) -> Factors:
    """Split U S Vh = scaling * lora_B @ lora_A evenly: sqrt(S / scaling) on either side."""
    root = (svd.S / scaling).sqrt()
    return Factors(svd.Vh * root[:, None], svd.U * root, *quality(svd))


def quality(svd: TruncatedSVD) -> tuple[float, float | None, float | None]:
    """Return the share of the squared norm that is kept, the excess, and its bound."""
    total = float(svd.norm) ** 2
    energy = float(svd.S.double().square().sum()) / total if total else 0.0
    certificate = None if svd.certificate is None else float(svd.certificate)
    return energy, float(svd.excess), certificate


def pissa(weights: Sequence[Weight], rank: int, scaling: float, **options: Any) -> list[Factors]:
    """Take the `rank` largest singular triplets of weights [m, n] for the update of each.

    Args: options, of `truncated_svd`: tol, certify, seed.
    Source: Meng et al. 2024, arXiv:2404.02948
    """
    check_rank(rank, weights[0].shape)
    check_scaling(scaling)
    return [balanced(svd, scaling) for svd in decompose(weights, rank, **options)]


def olora(weight: Weight, rank: int) -> Factors:
    """Take lora_B, lora_A = Q, Q^T W with Q of the QR decomposition of the first `rank` columns.

    They are the leading columns of Q and rows of R of the decomposition of the whole weight, which
    depend on no other column.

    Source: Buyukakyuz 2024, arXiv:2406.01775
    """
    check_rank(rank, weight.shape)
    if isinstance(weight, Tensor):
        leading = weight[:, :rank].float()
    else:
        # The next panel overwrites this one.
        leading = torch.cat([panel[:, :rank].clone() for _, panel in Panels(weight, None)])
    lora_B, _ = torch.linalg.qr(leading)
    lora_A = lora_B.new_zeros(rank, weight.shape[1])
    total = 0.0
    for rows, piece in pieces(weight):
        lora_A.addmm_(lora_B[rows].T, piece)
        total += squared_norm(piece)
    energy = squared_norm(lora_A) / total if _finite(total) else 0.0
    return Factors(lora_A, lora_B, min(energy, 1.0))


def subtract_update_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> float | None:
    """Subtract scaling * lora_B @ lora_A from a dense weight, in place.

    Returns: the relative error |W - (W' + scaling * lora_B lora_A)| / |W|, from rounding W' to 16
        bits; None in float32, where it costs more to see than it is.
    """
    lora_A, lora_B = lora_A.float(), lora_B.float()
    lost = total = 0.0
    for rows, before in pieces(weight):
        if weight.dtype is torch.float32:
            before.addmm_(lora_B[rows], lora_A, alpha=-scaling)
            continue
        update = lora_B[rows] @ lora_A
        after = torch.sub(before, update, alpha=scaling).to(weight.dtype)
        total += squared_norm(before)
        lost += squared_norm((after.float() - before).add_(update, alpha=scaling))
        weight[rows] = after
    if weight.dtype is torch.float32:
        return None
    return math.sqrt(lost / total) if total else 0.0


def pieces(weight: Weight) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their values in float32, views of a weight that is: few enough for a core's
    second-level cache, so that a product and a norm read memory once."""
    for rows, panel in Panels(weight, None):
        step = max(1, _PIECE // panel.shape[1]) if panel.is_cpu else len(panel)
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            yield part, panel[part.start - rows.start : part.stop - rows.start]


def squared_norm(values: Tensor) -> float:
    flat = values.reshape(-1)
    return torch.dot(flat, flat).item()  # on a CPU twice as fast as a norm
