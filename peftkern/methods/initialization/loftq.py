"""Factors for a base in 4 bits: QPiSSA and LoftQ, and what of the weight both together miss.

    QPiSSA   Q = 4bit(W - s B A), with s B A the largest singular triplets of W
    LoftQ    Q = 4bit(W - s B A), s B A = the largest of W - Q, by turns, from B A = 0

Neither W - Q nor W - s B A is ever dense: both are made by panels of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.reference.quantizers import nvfp4_tensor_scale
from peftkern.formats.block_weight import BlockWeight, QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.table import FORMATS, NUMBERS, cut, fields
from peftkern.functional import (
    quantize_fp4,
    quantize_int4,
    quantize_mxfp4,
    quantize_nf4,
    quantize_nvfp4,
)
from peftkern.functional.arguments import mismatch
from peftkern.functional.nf4 import nest_absmax
from peftkern.functional.panels import Panels
from peftkern.functional.truncated_svd import Weight
from peftkern.methods.initialization.factors import (
    Factors,
    balanced,
    check_rank,
    check_scaling,
    decompose,
    pissa,
    squared_norm,
)

# Of the singular triplets of W - Q, whose spectrum is flat: within 0.2% of the exact loop's error.
LOFTQ_SWEEPS = 4
_PLAIN = {"nf4": quantize_nf4, "fp4": quantize_fp4}  # whose absmax is nested afterwards


@dataclass(frozen=True)
class Storage:
    """Options of a base in 4 bits; dtype None is that of the weight.

    blocksize, double_quant: as for `quantize_nf4`, the second of NF4 and FP4 alone. format: a row
    of `peftkern.formats.table`.
    """

    blocksize: int = 64
    double_quant: bool = True
    dtype: torch.dtype | None = None
    format: str = "nf4"

    @classmethod
    def of(cls, w: QuantizedWeight) -> Storage:
        """Return the options by which a weight is stored."""
        format = FORMATS[w.layout[0]].name
        return cls(w.blocksize, isinstance(w, NF4Weight) and w.nested, w.dtype, format)


def qpissa(
    weights: Sequence[Weight], rank: int, scaling: float, storage: Storage, **options: Any
) -> list[tuple[Factors, QuantizedWeight]]:
    """Take the largest singular triplets of weights for the updates, quantize what they leave.

    Args: options, of `truncated_svd`: tol, certify, seed.
    Source: Meng et al. 2024, arXiv:2404.02948
    """
    found = pissa(weights, rank, scaling, **options)
    return [
        (factors, quantize_residual(weight, factors, scaling, storage))
        for weight, factors in zip(weights, found, strict=True)
    ]


def loftq(
    weights: Sequence[Weight],
    rank: int,
    scaling: float,
    storage: Storage,
    *,
    steps: int = 5,
    sweeps: int | None = LOFTQ_SWEEPS,
    **options: Any,
) -> list[tuple[Factors, QuantizedWeight]]:
    """Make 4-bit bases and updates that together are close to weights [m, n], by alternating.

    Both factors are divided by sqrt(scaling), so that the update is what the steps found.

    Args: steps, at least 1; sweeps and options, of `truncated_svd` in each step; with sweeps=None
        its tol decides.
    Source: Li et al. 2023, arXiv:2310.08659
    """
    check_rank(rank, weights[0].shape)
    check_scaling(scaling)
    if type(steps) is not int or steps < 1:
        raise mismatch("steps", "an integer of at least 1", steps)
    certify = options.pop("certify", False)
    factors: list[Factors | None] = [None] * len(weights)
    for step in range(1, steps + 1):
        bases = [
            quantize_residual(weight, before, scaling, storage)
            for weight, before in zip(weights, factors, strict=True)
        ]
        how = {"sweeps": sweeps, "certify": certify and step == steps, **options}
        found = decompose(weights, rank, minus=bases, **how)
        factors = [balanced(svd, scaling) for svd in found]
    return list(zip(factors, bases, strict=True))


def quantize_residual(
    weight: Weight, factors: Factors | None, scaling: float, storage: Storage
) -> QuantizedWeight:
    """Quantize weight - scaling * lora_B @ lora_A, the weight itself without factors."""
    format, blocksize, (m, n) = storage.format, storage.blocksize, weight.shape
    quantize = _quantizer(weight, factors, scaling, storage)
    layout = (NUMBERS[format], blocksize, 0, m, n)
    parts = {
        name: torch.empty(length, dtype=dtype, device=weight.device)
        for name, dtype, length in fields(layout)
    }
    for rows, panel in _residual(weight, factors, scaling, blocksize):
        made = quantize(panel.contiguous())
        first = rows.start * n // blocksize
        blocks = slice(first, first + made.nblocks)
        places, _ = cut(list(parts.values()), layout, blocks, panel.shape)
        for place, part in zip(places, made.tensors, strict=True):
            place.copy_(part)
    options = {"shape": (m, n), "blocksize": blocksize, "dtype": storage.dtype or weight.dtype}
    if not FORMATS[NUMBERS[format]].crosses_rows:
        return BlockWeight(format, **parts, **options)
    base = NF4Weight(**parts, **options, quant_type=format)
    return nest_absmax(base) if storage.double_quant else base


def _residual(
    weight: Weight, factors: Factors | None, scaling: float, blocksize: int
) -> Iterator[tuple[slice, Tensor]]:
    for rows, panel in Panels(weight, None, blocksize):
        if factors is not None:
            panel = torch.addmm(panel, factors.lora_B[rows], factors.lora_A, alpha=-scaling)
        yield rows, panel


def _quantizer(
    weight: Weight, factors: Factors | None, scaling: float, storage: Storage
) -> Callable[[Tensor], QuantizedWeight]:
    """Return what quantizes a panel; NVFP4's tensor scale is that of all panels."""
    format, blocksize = storage.format, storage.blocksize
    if format == "nvfp4":
        panels = _residual(weight, factors, scaling, blocksize)
        largest = torch.stack([panel.abs().max() for _, panel in panels if panel.numel()])
        return partial(quantize_nvfp4, tensor_scale=nvfp4_tensor_scale(largest))
    if format in _PLAIN:
        return partial(_PLAIN[format], blocksize=blocksize, double_quant=False)
    return quantize_mxfp4 if format == "mxfp4" else partial(quantize_int4, blocksize=blocksize)


def relative_error(
    weight: Weight, base: QuantizedWeight, factors: Factors, scaling: float
) -> float:
    """Return |W - Q - scaling * lora_B lora_A| / |W|."""
    total = sum(squared_norm(panel) for _, panel in Panels(weight, None))
    lost = 0.0
    for rows, missed in Panels(weight, base):
        missed = torch.addmm(missed, factors.lora_B[rows], factors.lora_A, alpha=-scaling)
        lost += squared_norm(missed)
    return math.sqrt(lost / total) if total else 0.0
