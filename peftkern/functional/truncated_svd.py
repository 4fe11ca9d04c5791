"""The largest singular values and vectors of weights, dense or NF4, and of differences of two.

Block Lanczos on W^T W. A sweep reads each panel of rows of W once, for both products:

    Y_j = W X_j,   Z_j = W^T Y_j,   X_{j+1} = orth(Z_j - K^T K Z_j),   K = [X_0 .. X_j]

and the SVD of W on the space K is that of Y = W K. A small matrix is decomposed exactly.

    svd = truncated_svd(weights, 16, tol=1e-5)      # a list of layers, of any shapes
    lora_B, lora_A = svd.U[0] * svd.S[0].sqrt(), svd.S[0].sqrt()[:, None] * svd.Vh[0]
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional.arguments import (
    WEIGHT_DTYPES,
    check_dense,
    check_float,
    integer,
    is_listed,
    mismatch,
)
from peftkern.functional.krylov import (
    Krylov,
    begin,
    energy_bounds,
    extend,
    multiply,
    multiply_back,
    probe,
)
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd
from peftkern.functional.panels import Found, Panels, Run, full_float32, parallel

__all__ = ["TruncatedSVD", "truncated_svd"]
Weight = Tensor | QuantizedWeight
Tensors = Tensor | list[Tensor]

SMALL = 512  # up to which smaller side the Gram matrix is decomposed
MAX_SWEEPS = 32
FLOOR = 1e-3  # of |W|_F: smaller errors are lost in the rounding of |W|_F^2 - sum S^2
ROUNDING = 3e-7  # of sums of squares, relative to |W|_F^2
_TOGETHER = 1 << 24  # values of the layers whose small matrices are decomposed in one call
_NORMS = (2.0**-40, 2.0**40)  # of W as it is: W^T W of others leaves float32


class TruncatedSVD(NamedTuple):
    """weight - minus is near U diag(S) Vh: tensors for one weight, lists of tensors for lists.

    U [m, k], S [k], descending, Vh [k, n], float32, with k = min(rank, m, n). norm is |W|_F. excess
    is an estimate of (|W - U S Vh|_F - least) / max(least, 1e-3 |W|_F), where `least` is the error
    of the best approximation of rank k, and certificate, if it was asked for, a bound on it that
    holds with a probability of 0.999: float64, [] or [L]. sweeps int64, 0 where the decomposition
    is exact. These four are on the CPU.
    """

    U: Tensors
    S: Tensors
    Vh: Tensors
    norm: Tensor
    sweeps: Tensor
    excess: Tensor
    certificate: Tensor | None


class _Job(NamedTuple):
    """What is asked of every matrix; width: columns of a block."""

    rank: int
    width: int
    sweeps: int | None
    tol: float
    certify: bool
    seed: int

    def blocks(self, panels: Panels) -> int:
        """Return how many blocks a space in which to search may have; 0, none is worth it."""
        side = min(panels.m, panels.n)
        blocks = min(side // (2 * self.width), self.sweeps or MAX_SWEEPS)
        return blocks if side > SMALL and blocks >= (self.sweeps or 3) else 0


class _Layer:
    """One matrix; the space that was searched, if one was; its best approximation B A."""

    def __init__(self, where: str, panels: Panels) -> None:
        self.where, self.panels = where, panels
        self.norm = self.excess = self.kept = self.gain = 0.0
        self.next = math.inf  # what the excess is expected to be after another sweep
        self.certificate = math.inf
        self.sweeps = 0
        self.space: Krylov | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        self.top: Tensor | None = None

    def note(self, kept: float) -> None:
        """Estimate the excess error from the sum of squares that the space keeps after a sweep.

        Gains fall faster than geometrically, so what is still missing is less than
        gain * ratio / (1 - ratio); twice that is said, and never more than the gain itself.
        """
        gain, last = kept - self.kept, self.gain
        self.kept, self.gain = kept, gain
        falling = 0 < gain < last / 3 and self.sweeps > 2
        less = 2 * gain * gain / (last - gain) if falling else gain
        missing = less if self.sweeps > 3 else gain  # the second one still finds its directions
        error = max(self.norm**2 - kept, (FLOOR * self.norm) ** 2)
        self.excess = missing / (2 * error)
        self.next = less * gain / last / (2 * error) if falling else math.inf

    def ends(self, job: _Job) -> bool:
        """Tell whether the next sweep is expected to be the last one."""
        return self.next < 2 * job.tol if job.sweeps is None else self.sweeps + 1 == job.sweeps


def truncated_svd(
    weight: Weight | Sequence[Weight],
    rank: int,
    *,
    minus: Weight | Sequence[Weight | None] | None = None,
    oversample: int = 8,
    sweeps: int | None = None,
    tol: float = 1e-3,
    certify: bool = False,
    seed: int = 0,
) -> TruncatedSVD:
    """Compute the `rank` largest singular values of weight - minus, with their vectors.

    No weight is ever decoded as a whole: there are panels of 64 rows or, if that is more, 4 MB in
    float32 for each thread and operand (four of them at most where no native kernel multiplies one
    in 4 bits; on a GPU 128 MB), and sweeps * (m + n) * (rank + oversample) values.

    Args: weight [m, n] and minus of its shape, float32|bfloat16|float16 or NF4Weight, or lists of
        them (`minus` None where there is none); oversample, the columns of a block beyond the rank;
        sweeps, or None: until the excess error is estimated to be below `tol`, at most 32;
        certify, for a bound on the excess error; seed of the random blocks of every layer.
    Returns: TruncatedSVD. Matrices whose smaller side is at most 512, or too small for the sweeps
        that they need, are decomposed exactly. Columns of U and rows of Vh beyond the numerical
        rank are zero, as is S there. The tensors of a list are views of a few buffers.
    Raises: TypeError or ValueError naming the argument, what was expected and what came; ValueError
        on NaN or Inf in a weight.
    Gradients: none.
    Source: Golub, Luk and Overton 1981, doi:10.1145/355945.355946; Musco and Musco 2015,
        arXiv:1504.05477; the bound: Kuczynski and Wozniakowski 1992, doi:10.1137/0613066
    """
    single, layers = _layers(weight, minus)
    seed = check_options(tol, certify, seed)
    rank, oversample = integer("rank", rank, 1), integer("oversample", oversample)
    if sweeps is not None:
        sweeps = integer("sweeps", sweeps, 1)
    job, found = _Job(rank, rank + oversample, sweeps, tol, certify, seed), []
    device = layers[0].panels.device if layers else torch.device("cpu")
    off = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), off, full_float32(), parallel(device) as run:
        for group in _groups(layers):
            found.append(_decompose(group, job, run))
    U, S, Vh = ([tensor for svd in found for tensor in svd[i]] for i in range(3))
    norm, excess, certificate, count = (
        torch.tensor([getattr(layer, name) for layer in layers], dtype=dtype, device="cpu")
        for name, dtype in _REPORTED.items()
    )
    if single:
        U, S, Vh, norm, excess, certificate, count = (
            column[0] for column in (U, S, Vh, norm, excess, certificate, count)
        )
    return TruncatedSVD(U, S, Vh, norm, count, excess, certificate if certify else None)


def check_options(tol: Any, certify: Any, seed: Any) -> int:
    """Return the seed; raise TypeError or ValueError for what `truncated_svd` does not take."""
    if not isinstance(tol, numbers.Real) or isinstance(tol, bool) or not tol > 0:
        raise mismatch("tol", "a positive number", tol)
    if not isinstance(certify, bool):
        raise mismatch("certify", "True or False", certify)
    return integer("seed", seed)


_REPORTED = {
    "norm": torch.float64,
    "excess": torch.float64,
    "certificate": torch.float64,
    "sweeps": torch.int64,
}


def _layers(weight: object, minus: object) -> tuple[bool, list[_Layer]]:
    """Check the weights; return whether it is one, and all of them."""
    single = isinstance(weight, Tensor | QuantizedWeight)
    if not single and not is_listed(weight):
        raise mismatch("weight", "a tensor, an NF4Weight or BlockWeight, or a list of them", weight)
    weights = [weight] if single else list(weight)
    names = ["" if single else f"[{i}]" for i in range(len(weights))]
    for name, one in zip(names, weights, strict=True):
        _check_weight(f"weight{name}", one)
        if one.device != weights[0].device:
            raise mismatch(f"weight{name}", f"all on {weights[0].device}", one)
    others = list(minus) if is_listed(minus) and not single else [minus]
    if minus is None:
        others *= len(weights)
    if len(others) != len(weights):
        raise ArgumentError(f"minus: expected {len(weights)} as in weight, got {len(others)}")
    layers = []
    for name, one, other in zip(names, weights, others, strict=True):
        if other is not None:
            _check_weight(f"minus{name}", other)
            if tuple(other.shape) != tuple(one.shape) or other.device != one.device:
                raise mismatch(f"minus{name}", f"{list(one.shape)} on {one.device}", other)
        layers.append(_Layer(f"weight{name}", Panels(one, other)))
    return single, layers


def _check_weight(name: str, weight: object) -> None:
    if not isinstance(weight, QuantizedWeight):
        check_dense(name, weight)
        check_float(name, weight, WEIGHT_DTYPES)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise mismatch(name, "[m, n] without zeros", weight)


def _groups(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Yield neighbors that are small enough to be worked on together."""
    group: list[_Layer] = []
    size = 0
    for layer in layers:
        values = layer.panels.m * layer.panels.n
        if group and size + values > _TOGETHER:
            yield group
            group, size = [], 0
        group, size = [*group, layer], size + values
    if group:
        yield group


def _decompose(layers: list[_Layer], job: _Job, run: Run) -> LowRankSVD:
    """Decompose some layers; note in each what was found out."""
    large = [layer for layer in layers if job.blocks(layer.panels)]
    _measure([layer for layer in layers if layer not in large], run)
    _search(large, job, run)
    _decompose_small([layer for layer in layers if layer.factors is None], job.rank, run)
    svd = low_rank_svd(*map(list, zip(*(layer.factors for layer in layers), strict=True)))
    if job.certify:
        _certify(layers, svd, job, run)
    for layer, S in zip(layers, svd.S, strict=True):
        S /= layer.panels.scale
        layer.norm, layer.space, layer.factors = layer.norm / layer.panels.scale, None, None
        layer.top = None
        layer.panels.release()
    return svd


def _over_panels(
    function: Callable[[_Layer, slice], Found], layers: list[_Layer], run: Run
) -> Iterator[tuple[_Layer, Iterator[Found]]]:
    """Yield each layer with what a function gives of its panels, in order, to be used up."""
    work = [(layer, rows) for layer in layers for rows in layer.panels.slices]
    found = run(lambda one: function(*one), work)
    for layer in layers:
        yield layer, itertools.islice(found, len(layer.panels.slices))


def _measure(layers: list[_Layer], run: Run) -> None:
    """Compute |W|_F of layers; scale W where its square would leave float32."""
    for layer, squares in _over_panels(
        lambda one, rows: _squares(one.panels.read(rows)), layers, run
    ):
        layer.norm = math.sqrt(float(sum(squares)))
    if scaled := _scale(layers, run):
        _measure(scaled, run)


def _scale(layers: list[_Layer], run: Run) -> list[_Layer]:
    """Scale those W of layers whose square would leave float32; return these layers."""
    odd = [
        layer
        for layer in layers
        if layer.panels.scale == 1.0 and not _NORMS[0] < layer.norm < _NORMS[1]
    ]
    for layer, tops in _over_panels(lambda one, rows: one.panels.read(rows).abs().amax(), odd, run):
        top = torch.stack(list(tops)).amax().item()
        if not math.isfinite(top):
            raise ArgumentError(f"{layer.where}: expected finite values, got NaN or Inf")
        if top > 0:
            layer.panels.scale = 2.0 ** min(-math.frexp(top)[1], 126)  # in float32
    return [layer for layer in odd if layer.panels.scale != 1.0]


def _squares(panel: Tensor) -> Tensor:
    return torch.linalg.vector_norm(panel, dim=1).double().square().sum()


def _search(layers: list[_Layer], job: _Job, run: Run) -> None:
    """Find the factors of large layers by block Lanczos, but of those that need too many blocks.

    Their norms come with the first product.
    """
    going, sweeps = layers, job.sweeps
    for layer in layers:
        panels = layer.panels
        layer.space = Krylov(panels, job.width, job.blocks(panels), job.seed)
    begin([layer.space for layer in going], run)
    while going:
        spaces, ending = [layer.space for layer in going], [layer.ends(job) for layer in going]
        done, last = going[0].sweeps + 1, all(ending)
        if job.certify:
            probe(list(itertools.compress(spaces, ending)), job.seed + 1, run)
        multiply(spaces, job.certify or not last, run)
        if done == 1:
            for layer in layers:
                layer.norm = layer.space.norm
            scaled = _scale(layers, run)
            _search(scaled, job, run)
            going = [layer for layer in layers if layer not in scaled and layer.norm > 0]
            spaces = [layer.space for layer in going]
        values = run(lambda space: torch.linalg.eigvalsh(space.T)[-job.rank :].sum().item(), spaces)
        for layer, kept in zip(going, values, strict=True):
            layer.sweeps = done
            layer.note(kept)
        if sweeps is None:
            end = done == MAX_SWEEPS
            found = [one for one in going if end or (done > 1 and one.excess < job.tol)]
        else:
            found = going if done == sweeps else []
        best = run(lambda layer: layer.space.best(job.rank), found)
        for layer, factors in zip(found, best, strict=True):
            layer.factors = factors
        going = [one for one in going if one.factors is None and not one.space.full]
        if last and not job.certify:
            multiply_back([layer.space for layer in going], run)  # it was not the last one
        for layer in going:
            layer.space.probe = None
        extend([layer.space for layer in going], run)


def _decompose_small(layers: list[_Layer], rank: int, run: Run) -> None:
    """Find the factors of layers from the Gram matrix of the smaller side."""
    grams = [_assembled(*one) for one in _over_panels(_gram, layers, run)]
    # eigh reads what is below the diagonal.
    tops = run(lambda gram: torch.linalg.eigh(gram)[1][:, -rank:].float(), grams)
    for layer, top in zip(layers, tops, strict=True):
        layer.top, layer.space, layer.sweeps, layer.excess = top, None, 0, 0.0
    for layer, parts in _over_panels(_other_side, layers, run):
        if layer.panels.n <= layer.panels.m:
            layer.factors = torch.cat(list(parts)), layer.top.T.contiguous()
        else:
            layer.factors = layer.top.contiguous(), _sum(parts)


def _gram(layer: _Layer, rows: slice) -> Tensor:
    """Return a panel's share of W^T W, or its rows of W W^T up to the diagonal."""
    panels = layer.panels
    wide = panels.read(rows).double()
    if panels.n <= panels.m:
        return wide.T @ wide
    others = panels.slices[: rows.start // panels.rows + 1]
    return torch.cat([wide @ panels.read(one, place=1).double().T for one in others], 1)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Add up, in order, what is as large as the sum: one at a time, none is kept."""
    total = next(parts)
    for part in parts:
        total += part
        del part
    return total


def _assembled(layer: _Layer, parts: Iterator[Tensor]) -> Tensor:
    """Return the Gram matrix, zero above the diagonal where that was left out."""
    panels = layer.panels
    if panels.n <= panels.m:
        return _sum(parts)
    gram = torch.zeros(panels.m, panels.m, dtype=torch.float64, device=panels.device)
    for rows, part in zip(panels.slices, parts, strict=True):
        gram[rows, : rows.stop] = part
    return gram


def _other_side(layer: _Layer, rows: slice) -> Tensor:
    """Return a panel's rows of W V, or its share of U^T W."""
    panel = layer.panels.read(rows)
    return panel @ layer.top if layer.panels.n <= layer.panels.m else layer.top[rows].T @ panel


def _certify(layers: list[_Layer], svd: LowRankSVD, job: _Job, run: Run) -> None:
    """Bound the excess error of layers by bounding the sum of the largest S^2 that W may have."""
    for layer, S in zip(layers, svd.S, strict=True):
        layer.kept = S.double().square().sum().item()
    searched = [layer for layer in layers if layer.space is not None]
    enough = [_enough(layer, job) for layer in searched]
    spaces = [layer.space for layer in searched]
    bounds = energy_bounds(spaces, enough, job.rank, job.seed + 1, run)
    best = dict(zip(searched, bounds, strict=True))
    for layer, U, S, Vh in zip(layers, *svd[:3], strict=True):
        slack, floor = ROUNDING * layer.norm**2, FLOOR * layer.norm
        error = math.sqrt(max(layer.norm**2 - layer.kept, 0.0) + slack)
        if error < floor:
            layer.factors = U * S, Vh
            ((_, squares),) = _over_panels(_rest, [layer], run)
            error = math.sqrt(float(sum(squares))) + ROUNDING * layer.norm
        least = math.sqrt(max(layer.norm**2 - best.get(layer, layer.kept) - slack, 0.0))
        layer.certificate = (error - least) / max(least, floor) if layer.norm else 0.0


def _enough(layer: _Layer, job: _Job) -> float:
    """Return a bound of the sum that proves `tol`, or than which a lower one would tell little."""
    slack = ROUNDING * layer.norm**2
    tol = job.tol if job.sweeps is None else 0.0
    error = max(layer.norm**2 - layer.kept, 0.0) + slack
    return max(layer.kept + slack / 8, layer.norm**2 - slack - error / (1 + tol) ** 2)


def _rest(layer: _Layer, rows: slice) -> Tensor:
    """Return the sum of squares of a panel of W minus its approximation."""
    B, A = layer.factors
    return _squares(layer.panels.read(rows) - B[rows] @ A)
