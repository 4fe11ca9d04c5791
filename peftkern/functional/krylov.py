"""Block Krylov spaces of W^T W, grown by a block at a time, W read by panels of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.functional.low_rank_svd import low_rank_svd
from peftkern.functional.panels import Panels

# A bound on a norm from Krylov spaces of random vectors holds with a probability of 1 - FAILURE.
FAILURE = 1e-3
PROBES, STEPS = 4, 8


class Krylov:
    """The space that is spanned by X, W^T W X, .. of one matrix W [m, n] and a random block X.

    All rows of K [w, n] are orthonormal, and to `beside`, too; Y = K W^T [w, m]; T = Y Y^T [w, w]
    in float64; rest [width, n] is what W^T W makes of the newest block outside of the space.
    """

    def __init__(
        self,
        panels: Panels,
        width: int,
        blocks: int,
        draw: torch.Generator,
        beside: Tensor | None = None,
    ) -> None:
        self.panels, self.width, self.w = panels, width, 0
        self._draw, self._beside = draw, beside
        rows, device = width * blocks, panels.device
        self._K = torch.empty(rows, panels.n, dtype=torch.float32, device=device)
        self._Y = torch.empty(rows, panels.m, dtype=torch.float32, device=device)
        self._T = torch.empty(rows, rows, dtype=torch.float64, device=device)
        self.rest = self.random()

    @property
    def K(self) -> Tensor:
        return self._K[: self.w]

    @property
    def Y(self) -> Tensor:
        return self._Y[: self.w]

    @property
    def T(self) -> Tensor:
        return self._T[: self.w, : self.w]

    def random(self) -> Tensor:
        """Draw a block on the host, the same for every device."""
        block = torch.randn(self.width, self.panels.n, generator=self._draw)
        return block.to(self.panels.device)

    def outside(self, block: Tensor) -> Tensor:
        """Subtract what of each row lies in the space."""
        for basis in (self._beside, self.K):
            if basis is not None and len(basis):
                block = block - (block @ basis.T) @ basis
        return block

    def append(self, block: Tensor) -> None:
        self._K[self.w : self.w + self.width] = block
        self.w += self.width

    @property
    def full(self) -> bool:
        return self.w == len(self._K)

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B [m, rank] and A [rank, n] whose product is nearest to W on the space."""
        top = torch.linalg.eigh(self.T)[1][:, -rank:].float()
        return self.Y.T @ top, top.T @ self.K

    def multiply(self, transposed: bool = True) -> None:
        """Multiply the newest block by W and, unless it is the last, the result by W^T."""
        newest = slice(self.w - self.width, self.w)
        X, Y = self._K[newest], self._Y[newest]
        Z = torch.zeros_like(X)
        for rows, panel in self.panels:
            part = X @ panel.T
            Y[:, rows] = part
            if transposed:
                Z.addmm_(part, panel)
        cross = Y.double() @ self.Y.double().T
        self._T[newest, : self.w], self._T[: self.w, newest] = cross, cross.T
        self.rest = Z


def extend(spaces: Sequence[Krylov]) -> None:
    """Append to each space its next block: an orthonormal basis of `rest` outside of it."""
    blocks = [space.outside(space.rest) for space in spaces]
    # What is left of rows that nearly lay in the space is rounding, and some of that is in it.
    blocks = [
        space.outside(_filled(space, block, int(rank)))
        for space, block, rank in zip(spaces, *_orthonormal(blocks), strict=True)
    ]
    for space, block in zip(spaces, _orthonormal(blocks)[0], strict=True):
        space.append(block)


def _orthonormal(blocks: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return orthonormal rows that span those of each block, zeros beyond its rank, and the rank.

    The bits of blocks of up to 32 rows do not depend on the number of threads.
    """
    sides = [torch.eye(len(block), device=block.device) for block in blocks]
    svd = low_rank_svd(sides, blocks)
    return svd.Vh, svd.rank.tolist()


def _filled(space: Krylov, block: Tensor, rank: int) -> Tensor:
    """Return a block whose zero rows from `rank` on are random: the space goes on to grow."""
    if rank < len(block):
        block[rank:] = space.random()[rank:] / math.sqrt(block.shape[1])
    return block


def norm_bounds(spaces: Sequence[Krylov], seed: int) -> list[float]:
    """Bound |W (I - K^T K)|_2^2 of each space, with a probability of 1 - FAILURE.

    The largest Ritz value in the Krylov space of a random vector is below (1 - eps) of the norm
    with a probability of 1.648 sqrt(n) exp(-sqrt(eps) (2 STEPS - 1)); here it is so of PROBES.
    """
    draw = [torch.Generator().manual_seed(seed) for _ in spaces]
    probes = [
        Krylov(space.panels, PROBES, STEPS, one, beside=space.K)
        for space, one in zip(spaces, draw, strict=True)
    ]
    for step in range(STEPS if probes else 0):
        extend(probes)
        for probe in probes:
            probe.multiply(step + 1 < STEPS)
    bounds = []
    for probe in probes:
        log = math.log(1.648 * math.sqrt(probe.panels.n)) - math.log(FAILURE) / PROBES
        eps = (log / (2 * STEPS - 1)) ** 2
        bounds.append(float(torch.linalg.eigvalsh(probe.T)[-1]) / (1 - eps))
    return bounds


def energy_bound(space: Krylov, outside: float, rank: int) -> float:
    """Bound the sum of the `rank` largest squares of singular values of W.

    W^T W is [[T, R^T], [R, C]] in a basis that begins with K, with R in the newest block alone and
    |C| <= outside. So for every t > outside its eigenvalues are at most those of
    T + R^T R / (t - outside), or t. The t is the best to first order, and its neighbors.
    """
    R = space.outside(space.outside(space.rest)).double()
    gram, width, T = R @ R.T, space.width, space.T
    values, vectors = torch.linalg.eigh(T)
    newest = vectors[-width:]
    slopes = (newest * (gram @ newest)).sum(0)[-rank:]
    top = values[-rank:].clamp(min=float(values[-1]) * 1e-12)
    steps = top[0] * 2.0 ** -torch.arange(24.0, dtype=T.dtype, device=T.device)[:, None]
    first = torch.maximum(top + slopes / steps, outside + steps).sum(1)
    step = steps[first.argmin()] * torch.tensor([0.5, 1.0, 2.0], device=T.device)
    shifted = T.repeat(len(step), 1, 1)
    shifted[:, -width:, -width:] += gram / step[:, None, None]
    best = torch.linalg.eigvalsh(shifted)[:, -rank:]
    return float(torch.maximum(best, outside + step[:, None]).sum(1).amin())
