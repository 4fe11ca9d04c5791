"""The largest singular values and vectors of weights, dense or NF4, and of differences of two.

Block Lanczos on W^T W. A sweep reads each panel of rows of W once, for both products:

    Y_j = W X_j,   Z_j = W^T Y_j,   X_{j+1} = orth(Z_j - K^T K Z_j),   K = [X_0 .. X_j]

and the SVD of W on the space K is that of Y = W K. A small matrix is decomposed exactly.

    svd = truncated_svd(weights, 16, tol=1e-5)      # a list of layers, of any shapes
    lora_B, lora_A = svd.U[0] * svd.S[0].sqrt(), svd.S[0].sqrt()[:, None] * svd.Vh[0]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.formats.nf4 import ArgumentError, NF4Weight
from peftkern.functional.arguments import (
    WEIGHT_DTYPES,
    check_dense,
    check_float,
    is_listed,
    mismatch,
)
from peftkern.functional.krylov import Krylov, energy_bound, extend, norm_bounds
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd
from peftkern.functional.panels import Panels

__all__ = ["TruncatedSVD", "truncated_svd"]
Weight = Tensor | NF4Weight
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
    is exact.
    """

    U: Tensors
    S: Tensors
    Vh: Tensors
    norm: Tensor
    sweeps: Tensor
    excess: Tensor
    certificate: Tensor | None


class _Layer:
    """One matrix; the space that was searched, if one was; its best approximation B A."""

    def __init__(self, where: str, panels: Panels) -> None:
        self.where, self.panels = where, panels
        self.norm = self.excess = self.kept = 0.0
        self.certificate = math.inf
        self.sweeps = 0
        self.space: Krylov | None = None
        self.factors: tuple[Tensor, Tensor] | None = None


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

    No weight is ever decoded as a whole: there are panels of 8 MB in float32 (on a GPU 128 MB), and
    sweeps * (m + n) * (rank + oversample) values.

    Args: weight [m, n] and minus of its shape, float32|bfloat16|float16 or NF4Weight, or lists of
        them (`minus` None where there is none); oversample, the columns of a block beyond the rank;
        sweeps, or None: until a sweep improves the error by less than `tol` of it, at most 32;
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
    for name, value, low in (("rank", rank, 1), ("oversample", oversample, 0), ("seed", seed, 0)):
        if type(value) is not int or value < low:
            raise mismatch(name, f"an integer of at least {low}", value)
    if sweeps is not None and (type(sweeps) is not int or sweeps < 1):
        raise mismatch("sweeps", "a positive integer, or None", sweeps)
    if not isinstance(tol, float) or not tol > 0:
        raise mismatch("tol", "a positive number", tol)
    svds = []
    for group in _groups(layers):
        with torch.no_grad(), torch.autocast(group[0].panels.device.type, enabled=False):
            for layer in group:
                _measure(layer)
            _search(group, rank, rank + oversample, sweeps, tol, certify, seed)
            for layer in group:
                if layer.factors is None:
                    layer.factors, layer.sweeps, layer.excess = _exact(layer, rank), 0, 0.0
            svds.append(low_rank_svd(*map(list, zip(*(one.factors for one in group), strict=True))))
            if certify:
                _certify(group, svds[-1], rank, seed)
            for layer, S in zip(group, svds[-1].S, strict=True):
                S /= layer.panels.scale
                layer.norm, layer.space = layer.norm / layer.panels.scale, None
    U, S, Vh = ([tensor for svd in svds for tensor in svd[i]] for i in range(3))
    norm, excess, certificate, count = (
        torch.tensor([getattr(layer, name) for layer in layers], dtype=dtype)
        for name, dtype in _REPORTED.items()
    )
    if single:
        U, S, Vh, norm, excess, certificate, count = (
            column[0] for column in (U, S, Vh, norm, excess, certificate, count)
        )
    return TruncatedSVD(U, S, Vh, norm, count, excess, certificate if certify else None)


_REPORTED = {
    "norm": torch.float64,
    "excess": torch.float64,
    "certificate": torch.float64,
    "sweeps": torch.int64,
}


def _layers(weight: object, minus: object) -> tuple[bool, list[_Layer]]:
    """Check the weights; return whether it is one, and all of them."""
    single = isinstance(weight, (Tensor, NF4Weight))
    if not single and not is_listed(weight):
        raise mismatch("weight", "a tensor, an NF4Weight, or a list of them", weight)
    weights = [weight] if single else list(weight)
    if minus is None or single:
        others = [minus] * len(weights)
    else:
        others = list(minus) if is_listed(minus) else [minus]
    if len(others) != len(weights):
        raise ArgumentError(f"minus: expected {len(weights)} as in weight, got {len(others)}")
    layers = []
    for i, (one, other) in enumerate(zip(weights, others, strict=True)):
        where = "" if single else f"[{i}]"
        _check_weight(f"weight{where}", one)
        if other is not None:
            _check_weight(f"minus{where}", other)
            if tuple(other.shape) != tuple(one.shape) or other.device != one.device:
                raise mismatch(f"minus{where}", f"{list(one.shape)} on {one.device}", other)
        layers.append(_Layer(f"weight{where}", Panels(one, other)))
    return single, layers


def _check_weight(name: str, weight: object) -> None:
    if not isinstance(weight, NF4Weight):
        check_dense(name, weight)
        check_float(name, weight, WEIGHT_DTYPES)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise mismatch(name, "[m, n] without zeros", weight)


def _groups(layers: list[_Layer]) -> Iterator[list[_Layer]]:
    """Yield neighbors on one device that are small enough to be worked on together."""
    group: list[_Layer] = []
    size = 0
    for layer in layers:
        panels, values = layer.panels, layer.panels.m * layer.panels.n
        if group and (size + values > _TOGETHER or panels.device != group[0].panels.device):
            yield group
            group, size = [], 0
        group, size = [*group, layer], size + values
    if group:
        yield group


def _measure(layer: _Layer) -> None:
    """Compute |W|_F; scale W where its square would leave float32."""
    panels = layer.panels
    layer.norm = _norm(panel for _, panel in panels)
    if panels.scale != 1.0 or _NORMS[0] < layer.norm < _NORMS[1]:
        return
    top = torch.stack([panel.abs().amax() for _, panel in panels]).amax().item()
    if not math.isfinite(top):
        raise ArgumentError(f"{layer.where}: expected finite values, got NaN or Inf")
    if top > 0:
        panels.scale = 2.0 ** -math.frexp(top)[1]
        _measure(layer)


def _norm(panels: Iterable[Tensor]) -> float:
    """Compute the Frobenius norm of what is in all panels."""
    rows = (torch.linalg.vector_norm(panel, dim=1).double() for panel in panels)
    return math.sqrt(float(sum(row.square().sum() for row in rows)))


def _search(
    layers: list[_Layer],
    rank: int,
    width: int,
    sweeps: int | None,
    tol: float,
    certify: bool,
    seed: int,
) -> None:
    """Find the factors of layers by block Lanczos, but of those that are too small for it."""
    going = []
    for layer in layers:
        panels = layer.panels
        side = min(panels.m, panels.n)
        blocks = min(side // (2 * width), sweeps or MAX_SWEEPS)
        if side > SMALL and blocks >= (sweeps or 3) and layer.norm > 0:
            draw = torch.Generator().manual_seed(seed)
            layer.space = Krylov(panels, width, blocks, draw)
            going.append(layer)
    while going:
        extend([layer.space for layer in going])
        for layer in going:
            layer.sweeps += 1
            layer.space.multiply(certify or layer.sweeps != sweeps)
        values = torch.linalg.eigvalsh(torch.stack([layer.space.T for layer in going]))
        for layer, kept in zip(going, values[:, -rank:].sum(1).tolist(), strict=True):
            error = max(layer.norm**2 - kept, (FLOOR * layer.norm) ** 2)
            layer.excess = (kept - layer.kept) / (2 * error) if error else 0.0
            layer.kept = kept
            done = layer.excess < tol if sweeps is None else layer.sweeps == sweeps
            if done or layer.sweeps == MAX_SWEEPS:
                layer.factors = layer.space.best(rank)
        going = [one for one in going if one.factors is None and not one.space.full]


def _exact(layer: _Layer, rank: int) -> tuple[Tensor, Tensor]:
    """Find the factors of the best approximation from the Gram matrix of the smaller side."""
    panels, layer.space = layer.panels, None
    m, n = panels.m, panels.n
    side, k = min(m, n), min(rank, m, n)
    gram = torch.zeros(side, side, dtype=torch.float64, device=panels.device)
    if n <= m:
        for _, panel in panels:
            wide = panel.double()
            gram.addmm_(wide.T, wide)
    else:
        for rows, panel in panels:
            wide = panel.double()
            for start in range(0, rows.stop, panels.rows):
                others, other = panels.at(start, own=1)
                product = wide @ other.double().T
                gram[rows, others], gram[others, rows] = product, product.T
    top = torch.linalg.eigh(gram)[1][:, -k:].float()
    if n <= m:
        return torch.cat([panel @ top for _, panel in panels]), top.T.contiguous()
    A = torch.zeros(k, n, dtype=torch.float32, device=panels.device)
    for rows, panel in panels:
        A.addmm_(top[rows].T, panel)
    return top.contiguous(), A


def _certify(layers: list[_Layer], svd: LowRankSVD, rank: int, seed: int) -> None:
    """Bound the excess error of layers by bounding the sum of the largest S^2 that W may have."""
    searched = [layer for layer in layers if layer.space is not None]
    outside = norm_bounds([layer.space for layer in searched], seed + 1)
    bounds = dict(zip(searched, outside, strict=True))
    for layer, U, S, Vh in zip(layers, *svd[:3], strict=True):
        kept = S.double().square().sum().item()
        best = energy_bound(layer.space, bounds[layer], rank) if layer in bounds else kept
        squared, slack, floor = layer.norm**2, ROUNDING * layer.norm**2, FLOOR * layer.norm
        error = math.sqrt(max(squared - kept, 0.0) + slack)
        if error < floor:
            rest = _norm(panel - (U[rows] * S) @ Vh for rows, panel in layer.panels)
            error = rest + ROUNDING * layer.norm
        least = math.sqrt(max(squared - best - slack, 0.0))
        layer.certificate = (error - least) / max(least, floor) if layer.norm else 0.0
