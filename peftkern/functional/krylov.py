"""Block Krylov spaces of W^T W, grown by a block at a time, W read by panels of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.functional.low_rank_svd import low_rank_svd
from peftkern.functional.panels import Panels, Run

FAILURE = 1e-3  # probability with which a bound from random vectors may fail
PROBES, STEPS = 16, 3  # of a norm: 1.9 times it at n = 4096, in half the time of 4 vectors, 8 steps


class Krylov:
    """The space that is spanned by X, W^T W X, .. of one matrix W [m, n] and a random block X.

    All rows of K [w, n] are orthonormal, and to `beside`, too; Y = K W^T [w, m]; T = Y Y^T [w, w]
    in float64; rest [width, n] is what W^T W makes of the newest block outside of the space.
    """

    def __init__(
        self, panels: Panels, width: int, blocks: int, seed: int, beside: Tensor | None = None
    ) -> None:
        self.panels, self.width, self.w = panels, width, 0
        self._draw, self._beside = torch.Generator("cpu").manual_seed(seed), beside
        rows, device = width * blocks, panels.device
        self._K = torch.empty(rows, panels.n, dtype=torch.float32, device=device)
        self._Y = torch.empty(rows, panels.m, dtype=torch.float32, device=device)
        self._T = torch.empty(rows, rows, dtype=torch.float64, device=device)
        self.rest = self._random()
        self.eigen: tuple[Tensor, Tensor] | None = None  # of T, after `best`

    @property
    def full(self) -> bool:
        return self.w == len(self._K)

    @property
    def K(self) -> Tensor:
        return self._K[: self.w]

    @property
    def Y(self) -> Tensor:
        return self._Y[: self.w]

    @property
    def T(self) -> Tensor:
        return self._T[: self.w, : self.w]

    @property
    def newest(self) -> slice:
        return slice(self.w - self.width, self.w)

    def _random(self) -> Tensor:
        """Draw a block on the host, the same for every device."""
        shape = (self.width, self.panels.n)
        block = torch.randn(shape, generator=self._draw, dtype=torch.float32, device="cpu")
        return block.to(self.panels.device)

    def filled(self, block: Tensor, rank: int) -> Tensor:
        """Put random rows in the place of those from `rank` on, which are zero."""
        if rank < len(block):
            block[rank:] = self._random()[rank:] / math.sqrt(block.shape[1])
        return block

    def outside(self, block: Tensor) -> Tensor:
        """Subtract what of each row lies in the space."""
        for basis in (self._beside, self.K):
            if basis is not None and len(basis):
                block = block - (block @ basis.T) @ basis
        return block

    def append(self, block: Tensor) -> None:
        """Add orthonormal rows; their products are those of the next `multiply`."""
        self._K[self.w : self.w + self.width] = block
        self.w += self.width

    def products(self, rows: slice, X: Tensor, transposed: bool) -> tuple[Tensor, Tensor | None]:
        """Return W X for rows of W, and W^T of that."""
        panel = self.panels.read(rows)
        y = panel @ X
        return y, y.T @ panel if transposed else None

    def take(self, Y: Tensor) -> None:
        """Take W X of the newest block."""
        self._Y[self.newest] = Y
        cross = Y.double() @ self.Y.double().T
        self._T[self.newest, : self.w], self._T[: self.w, self.newest] = cross, cross.T

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B [m, rank] and A [rank, n] whose product is nearest to W on the space."""
        self.eigen = torch.linalg.eigh(self.T)
        top = self.eigen[1][:, -rank:].float()
        return self.Y.T @ top, top.T @ self.K


def multiply(spaces: Sequence[Krylov], transposed: bool, run: Run) -> None:
    """Multiply the newest block of each space by W and, if `transposed`, the results by W^T.

    Panels of all spaces are one list of work; their sums are taken in order.
    """
    work = []
    for space in spaces:
        X = space.K[space.newest].T.contiguous()
        work += [(space, rows, X) for rows in space.panels.slices]
        space.rest = space.K.new_zeros(space.width, space.panels.n)
    found = run(lambda one: one[0].products(one[1], one[2], transposed), work)
    for space in spaces:
        Y = space.K.new_empty(space.width, space.panels.m)
        for rows in space.panels.slices:
            y, z = next(found)
            Y[:, rows] = y.T
            if z is not None:
                space.rest += z
        space.take(Y)


def multiply_back(spaces: Sequence[Krylov], run: Run) -> None:
    """Multiply what `multiply` has made of the newest blocks by W^T, which it was not asked to."""
    work = [(space, rows) for space in spaces for rows in space.panels.slices]
    found = run(lambda one: one[0].Y[one[0].newest, one[1]] @ one[0].panels.read(one[1]), work)
    for space in spaces:
        for _ in space.panels.slices:
            space.rest += next(found)


def extend(spaces: Sequence[Krylov], run: Run) -> None:
    """Append to each space its next block: an orthonormal basis of `rest` outside of it."""
    blocks, ranks = _orthonormal(list(run(lambda space: space.outside(space.rest), spaces)))
    # What is left of rows that nearly lay in the space is rounding, and some of that is in it.
    blocks = [
        space.filled(block, rank) for space, block, rank in zip(spaces, blocks, ranks, strict=True)
    ]
    again = run(lambda pair: pair[0].outside(pair[1]), zip(spaces, blocks, strict=True))
    for space, block in zip(spaces, _orthonormal(list(again))[0], strict=True):
        space.append(block)


def _orthonormal(blocks: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return orthonormal rows that span those of each block, zero beyond its rank, and ranks."""
    sides = [torch.eye(len(block), device=block.device) for block in blocks]
    svd = low_rank_svd(sides, blocks)
    return svd.Vh, svd.rank.tolist()


def norm_bounds(spaces: Sequence[Krylov], seed: int, run: Run) -> list[float]:
    """Bound |W (I - K^T K)|_2^2 of each space, with a probability of 1 - FAILURE."""
    probes = [Krylov(space.panels, PROBES, STEPS, seed, beside=space.K) for space in spaces]
    for step in range(STEPS if probes else 0):
        extend(probes, run)
        multiply(probes, step + 1 < STEPS, run)
    ritz = run(lambda probe: torch.linalg.eigvalsh(probe.T)[-1].item(), probes)
    return [top / (1 - shortfall(one.panels.n)) for one, top in zip(probes, ritz, strict=True)]


def shortfall(n: int, probes: int = PROBES, steps: int = STEPS) -> float:
    """Return eps so that a Ritz value of a block Krylov space is below (1 - eps) of the norm with a
    probability of at most FAILURE.

    Let x be the unit vector of the starting block's span that is nearest to the top eigenvector v.
    From x alone the Ritz value is as large unless <x, v>^2 < 1 / cosh^2((2 steps - 1) y), with
    tanh^2 y = eps: the extremal odd Chebyshev polynomial of Kuczynski and Wozniakowski, which has
    the same proof for every x. <x, v>^2 is Beta(probes / 2, (n - probes) / 2), and the probability
    that it is below b is at most b^(probes / 2) Gamma(n / 2) / (Gamma(probes / 2 + 1)
    Gamma((n - probes) / 2)).
    """
    gammas = math.lgamma(n / 2) - math.lgamma(probes / 2 + 1) - math.lgamma((n - probes) / 2)
    b = math.exp(2 / probes * (math.log(FAILURE) - gammas))
    return math.tanh(math.acosh(b**-0.5) / (2 * steps - 1)) ** 2


def energy_bound(space: Krylov, outside: float, rank: int) -> float:
    """Bound the sum of the `rank` largest squares of singular values of W, after `space.best`.

    W^T W is [[T, R^T], [R, C]] in a basis that begins with K, with R in the newest block alone and
    |C| <= outside. So for every t > outside its eigenvalues are at most those of
    T + R^T R / (t - outside), or t. The search for the best t begins at that to first order.
    """
    R = space.outside(space.outside(space.rest)).double()
    gram, T, (values, vectors) = R @ R.T, space.T, space.eigen
    newest = vectors[space.newest]
    slopes = (newest * (gram @ newest)).sum(0)[-rank:]
    top = values[-rank:].clamp(min=float(values[-1]) * 1e-12)
    steps = top[0] * 2.0 ** -torch.arange(24.0, dtype=T.dtype, device=T.device)
    first = torch.maximum(top + slopes / steps[:, None], outside + steps[:, None]).sum(1)
    best, step = math.inf, float(steps[first.argmin()])
    for factors in ((1.0, 4.0, 16.0), (0.5, 2.0)):
        for tried in [step * factor for factor in factors]:
            shifted = T.clone()
            shifted[space.newest, space.newest] += gram / tried
            bound = torch.linalg.eigvalsh(shifted)[-rank:].clamp(min=outside + tried).sum().item()
            if bound < best:
                best, step = bound, tried
    return best
