"""Factors from what flows through a layer: its inputs (CorDA, EVA) or its gradient (LoRA-GA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import Panels
from peftkern.functional.truncated_svd import Weight, truncated_svd
from peftkern.methods.initialization.factors import (
    Factors,
    check_rank,
    check_scaling,
    pieces,
    quality,
)

DAMPING = 0.01  # of the mean of the covariance's diagonal, added to it, as in PEFT
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Covariance:
    """Covariance C = sum X^T X / calls [n, n] of a layer's inputs X, each scaled by its maximum.

    The scale of a call is |max(X)|, as in PEFT: a call is one text there.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._calls = 0

    def add(self, x: Tensor) -> None:
        """Take in the inputs [T, n] of one call."""
        x = x.float()
        x = x / x.max().abs()
        if self._sum is None:
            self._sum = x.new_zeros(x.shape[1], x.shape[1])
        self._sum.addmm_(x.T, x)
        self._calls += 1

    def value(self) -> Tensor:
        """Return C. Raises: ValueError if nothing came, or something that is not finite."""
        if self._sum is None or not self._sum.isfinite().all():
            what = "none" if self._sum is None else "NaN or Inf"
            raise ValueError(f"batches: expected finite inputs of the layer, got {what}")
        return self._sum / self._calls


def corda(weight: Weight, covariance: Tensor, rank: int, scaling: float, **options: Any) -> Factors:
    """Take what of a weight lies in the `rank` largest left singular vectors of W C.

    With U S V^T = W (C + damping) the update is U (S V^T) C^-1 = U U^T W: no inverse is needed.
    The split between the factors is PEFT's for "ipm", U sqrt(S / scaling) on the left.

    Args: covariance [n, n], of `Covariance`; options, of `truncated_svd`: tol, certify, seed.
    Source: Yang et al. 2024, arXiv:2406.05223
    """
    check_rank(rank, weight.shape)
    check_scaling(scaling)
    m, n = weight.shape
    damped = covariance.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    product = damped.new_empty(m, n)
    for rows, panel in Panels(weight, None):
        torch.mm(panel, damped, out=product[rows])
    svd = truncated_svd(product, rank, **options)
    lora_A = svd.U.new_zeros(rank, n)
    for rows, piece in pieces(weight):
        lora_A.addmm_(svd.U[rows].T, piece)
    root = (svd.S * scaling).sqrt()
    lora_A = torch.where(root > 0, 1 / root, 0)[:, None] * lora_A
    return Factors(lora_A, svd.U * (svd.S / scaling).sqrt(), *quality(svd))


def lora_ga(
    weight: Weight,
    gradient: Tensor,
    rank: int,
    scaling: float,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16,
    **options: Any,
) -> Factors:
    """Take lora_A from some right and lora_B from other left singular vectors of the gradient.

    Args: gradient [m, n]; direction, scale and gamma as PEFT's LoraGAConfig has them; options, of
        `truncated_svd`: tol, certify, seed.
    Source: Wang et al. 2024, arXiv:2407.05000
    """
    check_rank(rank, weight.shape, half=True)
    check_scaling(scaling)
    for name, value, accepted in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in accepted:
            raise mismatch(name, f"one of {accepted}", value)
    svd = truncated_svd(gradient, 2 * rank, **options)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    if direction == "random":
        generator = torch.Generator("cpu").manual_seed(options.get("seed", 0))
        order = torch.randperm(2 * rank, generator=generator, device="cpu")
        of_A = of_B = order[:rank].to(svd.S.device)
    else:
        of_A, of_B = {
            "ArBr": (slice(1, None, 2), slice(0, None, 2)),
            "A2rBr": (second, first),
            "ArB2r": (first, second),
        }[direction]
    lora_A, lora_B = svd.Vh[of_A], svd.U[:, of_B] * svd.S[of_B]
    if scale == "stable":
        lora_B = lora_B * (weight.shape[0] ** 0.25 / math.sqrt(gamma))
    elif scale == "weight_svd" and svd.S[of_B][0] > 0:
        largest = truncated_svd(weight, 1, **{**options, "certify": False}).S[0]
        lora_B = lora_B * (largest / svd.S[of_B][0])
    elif scale == "gd_scale":
        lora_A, lora_B = lora_A / scaling, lora_B / scaling
    return Factors(lora_A.contiguous(), lora_B.contiguous(), *quality(svd))


class PrincipalComponents:
    """Principal components of rows that come batch by batch; memory of `count` components.

    components [k, n], orthonormal, k at most `count`, the largest first; S [k] their singular
    values in the centered rows. Each batch is stacked on what is known of those before: S times
    components, and the shift of the mean. Source: Ross et al. 2008, doi:10.1007/s11263-007-0075-7
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.components: Tensor | None = None
        self.S: Tensor | None = None
        self._count, self._seed = count, seed
        self._mean: Tensor | None = None
        self._rows = 0
        self._squares = 0.0  # of the rows' distances from their mean

    def add(self, x: Tensor) -> None:
        """Take in rows [T, n]. Raises: ValueError if one is not finite."""
        if not len(x):
            return
        mean = x.mean(0, dtype=torch.float64)
        x = x - mean.float()
        before, self._rows = self._rows, self._rows + len(x)
        share = len(x) / self._rows
        self._squares += torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
        if not math.isfinite(self._squares):
            raise ValueError("batches: expected finite inputs of the layer, got NaN or Inf")
        if self._mean is None:
            self._mean = mean
        else:
            shift = mean - self._mean
            self._squares += before * share * shift.square().sum().item()
            shifted = (math.sqrt(before * share) * shift).float()
            x = torch.cat([self.S[:, None] * self.components, x, shifted[None]])
            self._mean = self._mean + share * shift
        svd = truncated_svd(x, min(self._count, *x.shape), seed=self._seed)
        self.components, self.S = svd.Vh, svd.S

    @property
    def norm(self) -> float:
        """|.|_F of the centered rows."""
        return math.sqrt(self._squares)

    def leading(self, rank: int, *, whiten: bool = False) -> Tensor:
        """Return the first `rank` components, or as many as there are: [k, n].

        Args: whiten: each divided by the square root of its singular value.
        """
        if self.components is None:
            return torch.empty(0, 0, device="cpu")
        found = self.components[:rank]
        if whiten:
            root = self.S[:rank].sqrt()[:, None]
            found = torch.where(root > 0, found / root, 0)
        return found


def explained_together(parts: Sequence[PrincipalComponents]) -> Tensor:
    """Return the share of the variance of all rows that the first, second, ... components of all
    parts explain, each of its own rows: [k] float64.

    Raises: ValueError if no row came.
    """
    squares = [one.S.double().square() for one in parts if one.S is not None]
    if not squares:
        raise ValueError("batches: expected finite inputs of the layer, got none")
    most = max(map(len, squares))
    total = sum(one.norm**2 for one in parts)
    shares = torch.stack([F.pad(one, (0, most - len(one))) for one in squares]).sum(0)
    return shares / max(total, torch.finfo(torch.float64).tiny)


def share_ranks(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Give the budget to the components that explain most of their layer's inputs.

    Args: explained, of each layer the shares of its components, the largest first, as many as it
        may have at most. Of equal shares those of earlier layers come first.
    Returns: the rank of each layer; 0 for those without a component among the chosen.
    Source: Paischer et al. 2024, arXiv:2410.07170
    """
    names = list(explained)
    sizes = [len(shares) for shares in explained.values()]
    counts = torch.tensor(sizes, device="cpu")
    layers = torch.repeat_interleave(torch.arange(len(names)), counts)
    shares = torch.cat([shares.cpu() for shares in explained.values()])
    chosen = layers[shares.argsort(descending=True, stable=True)[:budget]]
    return dict(zip(names, chosen.bincount(minlength=len(names)).tolist(), strict=True))
