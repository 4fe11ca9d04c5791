"""Factors of a layer from its weight alone: by the name of the method, for all of its matrices.

A layer is a stack of matrices of one shape: a linear layer of one, experts of as many as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional import dequantize
from peftkern.functional.truncated_svd import Weight
from peftkern.methods.initialization.factors import Factors, olora, pissa
from peftkern.methods.initialization.loftq import Storage, loftq, qpissa

QUANTIZED = ("qpissa", "loftq")
FROM_WEIGHTS = ("pissa", "olora", *QUANTIZED)
STEPS = 5  # of LoftQ
TOGETHER = 1 << 24  # values of the matrices that are worked on at once, if they are several


def from_weights(
    method: str,
    weights: Sequence[Weight],
    rank: int,
    scaling: float,
    storage: Storage | None = None,
    *,
    steps: int = STEPS,
    turned: bool = False,
    **options: Any,
) -> list[tuple[Factors, QuantizedWeight | None]]:
    """Return the factors of each weight [m, n], with the base in 4 bits of "qpissa" and "loftq".

    Args: storage, of these bases, None for none; steps, of "loftq"; turned, whether the weights are
        transposes of those that are multiplied, which makes a difference to "olora" alone; options,
        of `truncated_svd`: tol, certify, seed.
    """
    if method == "loftq":
        return loftq(weights, rank, scaling, storage, steps=steps, **options)
    if method == "qpissa":
        return qpissa(weights, rank, scaling, storage, **options)
    if method == "pissa":
        return [(factors, None) for factors in pissa(weights, rank, scaling, **options)]
    if turned:
        return [(olora(_dense(weight).T, rank).T, None) for weight in weights]
    return [(olora(weight, rank), None) for weight in weights]


def groups(count: int, shape: tuple[int, int]) -> Iterator[range]:
    """Yield the indices of matrices of this shape that are worked on at once."""
    at_once = max(1, TOGETHER // math.prod(shape))
    return (range(i, min(i + at_once, count)) for i in range(0, count, at_once))


def _dense(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else dequantize(weight, torch.float32)
