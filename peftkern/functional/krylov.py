"""Block Krylov spaces of W^T W, grown by a block at a time, W read by panels of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.functional.low_rank_svd import low_rank_svd
from peftkern.functional.panels import Panels, Run

FAILURE = 1e-3  # probability with which a bound from random vectors may fail
PROBES, ENOUGH, STEPS = 8, 2, 3  # of a norm: 1.6 to 2.3 times it after 2 steps, 1.5 after 3
SAMPLES = 64  # of bounds on it
FLOAT32 = 3e-7  # of products of unit vectors


class Krylov:
    """The space that is spanned by X, W^T W X, .. of one matrix W [m, n] and a random block X.

    All rows of K [w, n] are orthonormal, and to `beside`, too; Y = K W^T [w, m]; T = Y Y^T [w, w]
    in float64; norm is |W|_F, after the first product, of a space that stands for itself; rest
    [width, n] is what W^T W makes of the newest block outside of the space; probe, a space beside
    it for `energy_bounds`, whose first block is multiplied along with the newest.
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
        self.norm = None if beside is None else math.nan
        self.rest = self._K[:0]
        self.probe: Krylov | None = None
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

    def random(self) -> Tensor:
        """Draw a block on the host, the same for every device."""
        shape = (self.width, self.panels.n)
        block = torch.randn(shape, generator=self._draw, dtype=torch.float32, device="cpu")
        return block.to(self.panels.device)

    def filled(self, block: Tensor, rank: int) -> Tensor:
        """Put random rows in the place of those from `rank` on, which are zero."""
        if rank < len(block):
            block[rank:] = self.random()[rank:] / math.sqrt(block.shape[1])
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

    def products_back(self, rows: slice) -> Tensor:
        """Return the share that rows of W have in W^T of what `take` was given last."""
        return self.Y[self.newest, rows] @ self.panels.read(rows)

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


def begin(spaces: Sequence[Krylov], run: Run) -> None:
    """Append to each space its first block, a random one."""
    blocks = list(run(lambda space: space.outside(space.random()), spaces))
    for space, block in zip(spaces, _orthonormal(blocks)[0], strict=True):
        space.append(block)


def multiply(spaces: Sequence[Krylov], transposed: bool, run: Run) -> None:
    """Multiply the newest block of each space by W and, if `transposed`, the results by W^T.

    Panels of all spaces are one list of work; their sums are taken in order.
    """
    groups = [[space, space.probe] if space.probe else [space] for space in spaces]
    work = []
    for space, *others in groups:
        x = torch.cat([one.K[one.newest] for one in (space, *others)])
        first = space.norm is None
        work += [(space.panels, rows, x, transposed, first) for rows in space.panels.product_slices]
    found = run(lambda one: one[0].products(*one[1:]), work)
    for group in groups:
        panels, widths = group[0].panels, [space.width for space in group]
        Y = group[0].K.new_empty(sum(widths), panels.m)
        Z, total = Y.new_zeros(len(Y), panels.n), 0.0
        for rows in panels.product_slices:
            y, z, squares = next(found)
            Y[:, rows] = y
            if transposed:
                Z += z
            total += float(squares.sum(dtype=torch.float64))
        if group[0].norm is None:
            group[0].norm = math.sqrt(total)
        for space, made, rest in zip(group, Y.split(widths), Z.split(widths), strict=True):
            space.rest = rest
            space.take(made)


def multiply_back(spaces: Sequence[Krylov], run: Run) -> None:
    """Multiply what `multiply` has made of the newest blocks by W^T, which it was not asked to."""
    work = [(space, rows) for space in spaces for rows in space.panels.slices]
    found = run(lambda one: one[0].products_back(one[1]), work)
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
    if not blocks:
        return [], []
    sides = [torch.eye(len(block), device=block.device) for block in blocks]
    svd = low_rank_svd(sides, blocks)
    return svd.Vh, svd.rank.tolist()


def probe(spaces: Sequence[Krylov], seed: int, run: Run) -> None:
    """Begin to probe |W (I - K^T K)| for `energy_bounds`, by random blocks outside of them."""
    for space in spaces:
        space.probe = Krylov(space.panels, PROBES, STEPS, seed, beside=space.K)
    begin([space.probe for space in spaces], run)


def energy_bounds(
    spaces: Sequence[Krylov], enough: Sequence[float], rank: int, seed: int, run: Run
) -> list[float]:
    """Bound the sum of the `rank` largest squares of singular values of each W, after `best`.

    All hold with a probability of 1 - FAILURE. |W (I - K^T K)| is probed in STEPS steps, or in as
    few from ENOUGH on as bound the sum by no more than `enough`.
    """
    energies = list(run(lambda space: Energy(space, rank), spaces))
    late = [space for space in spaces if space.probe is None]
    probe(late, seed, run)
    multiply([space.probe for space in late], True, run)
    going, bounds = list(range(len(spaces))), [math.inf] * len(spaces)
    probes = [space.probe for space in spaces]

    def bound(i: int, step: int) -> bool:
        bounds[i] = energies[i].bound(norm_bound(probes[i]), enough[i])
        return step == STEPS or bounds[i] <= enough[i]

    for step in range(2, STEPS + 1):
        if not going:
            break
        extend([probes[i] for i in going], run)
        multiply([probes[i] for i in going], True, run)
        if step >= ENOUGH:
            done = list(run(lambda i, step=step: bound(i, step), going))
            going = [i for i, one in zip(going, done, strict=True) if not one]
    return bounds


def norm_bound(probe: Krylov) -> float:
    """Bound C = (I - K^T K) W^T W (I - K^T K) by a space that `probe` began and `multiply` grew.

    With x, v and b of `overlap`, and for a polynomial p of the degree that the space has: |C| = l
    means |p(C) x|^2 >= b p(l)^2, and where p has only real roots below c <= l, p(l)^2 >= p(c)^2. So
    |C| < c if b p(c)^2 is above |p(C) x|^2 for all unit vectors x of the starting block, of which
    the space holds every product. Any such p will do: here it is the one that is least in the mean
    over the block with p(c) = 1, whose roots are those of a Radau rule with a node at c, the others
    of which are below the Ritz values of the space. The bound of `shortfall`, which knows only the
    largest of these, always holds.
    """
    steps, width, n = probe.w // probe.width, probe.width, probe.panels.n
    ritz = torch.linalg.eigvalsh(probe.T)[-1]
    if ritz <= 0:
        return 0.0
    T, R = probe.T / ritz, probe.outside(probe.rest).double() / ritz
    powers = [torch.eye(probe.w, width, dtype=T.dtype, device=T.device)]
    for _ in range(steps):
        powers.append(T @ powers[-1])  # columns: coordinates of C^i on the starting block
    stack = torch.stack(powers)
    products = torch.einsum("iwx,jwy->ijxy", stack, stack)
    left = R.T @ powers[-2][probe.newest]  # the last power is not in the space
    products[-1, -1] += left.T @ left
    places = torch.arange(steps + 1, dtype=T.dtype, device=T.device)
    # A little of the uniform measure on [0, 1] keeps the moments apart.
    moments = products.diagonal(dim1=2, dim2=3).mean(-1)
    moments += 1e-6 / (places[:, None] + places + 1)
    most = 1 / (1 - shortfall(n, width, steps))
    bounds = most ** (torch.arange(1, SAMPLES + 1, dtype=T.dtype, device=T.device) / SAMPLES)
    at = bounds[:, None] ** places
    p = torch.linalg.solve(moments, at.T).T
    p /= (p * at).sum(1, keepdim=True)
    squares = torch.linalg.eigvalsh(torch.einsum("ci,cj,ijxy->cxy", p, p, products))[:, -1]
    holds = squares + FLOAT32 * p.abs().sum(1).square() < overlap(n, width)
    holds[-1] = True
    return float(ritz * bounds[holds][0])


def overlap(n: int, probes: int = PROBES) -> float:
    """Return b so that <x, v>^2 < b with a probability of at most FAILURE: x is the unit vector in
    the span of `probes` random ones of length n that is nearest to the unit vector v.

    <x, v>^2 is Beta(probes / 2, (n - probes) / 2), and the probability that it is below b is at
    most b^(probes / 2) Gamma(n / 2) / (Gamma(probes / 2 + 1) Gamma((n - probes) / 2)).
    """
    gammas = math.lgamma(n / 2) - math.lgamma(probes / 2 + 1) - math.lgamma((n - probes) / 2)
    return math.exp(2 / probes * (math.log(FAILURE) - gammas))


def shortfall(n: int, probes: int = PROBES, steps: int = STEPS) -> float:
    """Return eps so that a Ritz value of a block Krylov space is below (1 - eps) of the norm with a
    probability of at most FAILURE, which is the same event after any number of steps.

    From x of `overlap` alone, v being the top eigenvector, the Ritz value is as large unless
    <x, v>^2 < 1 / cosh^2((2 steps - 1) y), with tanh^2 y = eps: the extremal odd Chebyshev
    polynomial of Kuczynski and Wozniakowski, which has the same proof for every x.
    """
    return math.tanh(math.acosh(overlap(n, probes) ** -0.5) / (2 * steps - 1)) ** 2


class Energy:
    """Bounds on the sum of the `rank` largest squares of singular values of W.

    W^T W is [[T, R^T], [R, C]] in a basis that begins with K, with R in the newest block alone and
    |C| <= outside. So for every t > outside its eigenvalues are at most those of
    T + R^T R / (t - outside), or t. The search for t begins at the best to first order.
    """

    def __init__(self, space: Krylov, rank: int) -> None:
        R = space.outside(space.rest).double()
        self._space, self._gram, self._rank = space, R @ R.T, rank
        values, vectors = space.eigen
        self._top, newest = values[-rank:], vectors[space.newest]
        self._slopes = (newest * (self._gram @ newest)).sum(0)[-rank:]
        least = max(float(values[-rank]), float(values[-1]) * 1e-12)
        halvings = torch.arange(-4.0, 24.0, dtype=values.dtype, device=values.device)
        self._steps = least * 2.0**-halvings
        self._found: dict[int, Tensor] = {}  # eigenvalues, by the step's number

    def bound(self, outside: float, enough: float) -> float:
        """Return the least bound near the step that is best to first order, or that step's own if
        it is at most `enough`."""
        steps = self._steps[:, None]
        first = (self._top + self._slopes / steps).maximum(outside + steps)
        start = int(first.sum(1).argmin())
        if (found := self._bound(outside, start)) <= enough:
            return found
        best = min((self._bound(outside, i), i) for i in (start, start - 2, start - 4))[1]
        return min(self._bound(outside, i) for i in (best - 1, best, best + 1))

    def _bound(self, outside: float, number: int) -> float:
        """Bound the sum by one step, of a number that is brought into range."""
        number = min(max(number, 0), len(self._steps) - 1)
        step = float(self._steps[number])
        if number not in self._found:
            shifted, newest = self._space.T.clone(), self._space.newest
            shifted[newest, newest] += self._gram / step
            self._found[number] = torch.linalg.eigvalsh(shifted)[-self._rank :]
        return self._found[number].clamp(min=outside + step).sum().item()
