"""Factors for a base in NF4: QPiSSA and LoftQ, and what of the weight both together miss.

    QPiSSA   Q = NF4(W - s B A), with s B A the largest singular triplets of W
    LoftQ    Q = NF4(W - s B A), s B A = the largest of W - Q, by turns, from B A = 0

Neither W - Q nor W - s B A is ever dense: both are made by panels of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import quantize_nf4
from peftkern.functional.arguments import mismatch
from peftkern.functional.nf4 import nest_absmax
from peftkern.functional.panels import Panels
from peftkern.functional.truncated_svd import Weight, truncated_svd
from peftkern.methods.initialization.factors import (
    Factors,
    balanced,
    check_rank,
    check_scaling,
    pissa,
    squared_norm,
)

# Of the singular triplets of W - Q, whose spectrum is flat: within 0.2% of the exact loop's error.
LOFTQ_SWEEPS = 4


@dataclass(frozen=True)
class Storage:
    """Options of a base in NF4, as for `quantize_nf4`; dtype None is that of the weight."""

    blocksize: int = 64
    double_quant: bool = True
    dtype: torch.dtype | None = None


def qpissa(
    weight: Weight, rank: int, scaling: float, storage: Storage, **options: Any
) -> tuple[Factors, NF4Weight]:
    """Take the largest singular triplets of a weight for the update, quantize what they leave.

    Args: options, of `truncated_svd`: tol, certify, seed.
    Source: Meng et al. 2024, arXiv:2404.02948
    """
    factors = pissa(weight, rank, scaling, **options)
    return factors, quantize_residual(weight, factors, scaling, storage)


def loftq(
    weight: Weight,
    rank: int,
    scaling: float,
    storage: Storage,
    *,
    steps: int = 5,
    sweeps: int | None = LOFTQ_SWEEPS,
    **options: Any,
) -> tuple[Factors, NF4Weight]:
    """Make an NF4 base and an update that together are close to a weight, by alternating.

    Both factors are divided by sqrt(scaling), so that the update is what the steps found.

    Args: steps, at least 1; sweeps and options, of `truncated_svd` in each step; with sweeps=None
        its tol decides.
    Source: Li et al. 2023, arXiv:2310.08659
    """
    check_rank(rank, weight.shape)
    check_scaling(scaling)
    if type(steps) is not int or steps < 1:
        raise mismatch("steps", "an integer of at least 1", steps)
    factors, certify = None, options.pop("certify", False)
    for step in range(1, steps + 1):
        base = quantize_residual(weight, factors, scaling, storage)
        bound = {"certify": certify and step == steps}
        svd = truncated_svd(weight, rank, minus=base, sweeps=sweeps, **bound, **options)
        factors = balanced(svd, scaling)
    return factors, base


def quantize_residual(
    weight: Weight, factors: Factors | None, scaling: float, storage: Storage
) -> NF4Weight:
    """Quantize weight - scaling * lora_B @ lora_A, the weight itself without factors."""
    m, n = weight.shape
    blocksize = storage.blocksize
    packed = torch.empty((m * n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-m * n // blocksize), device=weight.device)
    for rows, panel in Panels(weight, None, blocksize):
        if factors is not None:
            panel = torch.addmm(panel, factors.lora_B[rows], factors.lora_A, alpha=-scaling)
        part = quantize_nf4(panel.contiguous(), blocksize=blocksize, double_quant=False)
        first = rows.start * n
        packed[first // 2 :][: len(part.packed)] = part.packed
        absmax[first // blocksize :][: len(part.absmax)] = part.absmax
    base = NF4Weight(packed, absmax, (m, n), blocksize, storage.dtype or weight.dtype)
    return nest_absmax(base) if storage.double_quant else base


def relative_error(weight: Weight, base: NF4Weight, factors: Factors, scaling: float) -> float:
    """Return |W - Q - scaling * lora_B lora_A| / |W|."""
    total = sum(squared_norm(panel) for _, panel in Panels(weight, None))
    lost = 0.0
    for rows, missed in Panels(weight, base):
        missed = torch.addmm(missed, factors.lora_B[rows], factors.lora_A, alpha=-scaling)
        lost += squared_norm(missed)
    return math.sqrt(lost / total) if total else 0.0
