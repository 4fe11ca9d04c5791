"""Singular values and vectors of LoRA updates scaling * B A, and what follows from them.

Nothing here forms the m x n update: all costs are O((m + n) r^2). Nothing is differentiable either:
results have no gradient, whatever the factors require.

    svd = low_rank_svd(lora_B, lora_A, scaling)           # lists of hundreds of layers
    ranks = allocate_rank(svd.S, budget=8 * len(svd.S))
    smaller = truncate_lora(svd, ranks)                   # (lora_B, lora_A) of every layer
"""

from __future__ import annotations

import heapq
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.functional.arguments import is_listed, mismatch

__all__ = ["AdaLoraFactors", "LoraFactors", "LowRankSVD", "SpectralStats", "allocate_rank"]
__all__ += ["low_rank_svd", "low_rank_svdvals", "merge_lora", "spectral_stats", "truncate_lora"]
MODES = ("accurate", "fast")
FORMS = ("balanced", "adalora")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Tensors = Tensor | list[Tensor]


class LowRankSVD(NamedTuple):
    """scaling * B A = U diag(S) Vh: tensors for one pair, lists of tensors for lists of pairs.

    U [m, k], S [k], descending, Vh [k, n] with k = min(m, r, n); rank and info int64, [] or [L].
    """

    U: Tensors
    S: Tensors
    Vh: Tensors
    rank: Tensor
    info: Tensor


class SpectralStats(NamedTuple):
    """Statistics of `spectral_stats`: float64, [] or [L]."""

    energy: Tensor
    stable_rank: Tensor
    effective_rank: Tensor


class LoraFactors(NamedTuple):
    """A truncated update lora_B @ lora_A."""

    lora_B: Tensor
    lora_A: Tensor


class AdaLoraFactors(NamedTuple):
    """A truncated update lora_B @ (lora_E * lora_A) with orthonormal lora_B and lora_A."""

    lora_B: Tensor
    lora_E: Tensor
    lora_A: Tensor


def low_rank_svd(
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    mode: str = "accurate",
) -> LowRankSVD:
    """Compute the reduced SVD of scaling * lora_B @ lora_A, of one pair or of lists of pairs.

    Gram matrices in float64, pivoted Cholesky, QR-preconditioned one-sided Jacobi on the core,
    and one rotation of each factor.

    Args: lora_B [m, r] and lora_A [r, n], float64|float32|bfloat16|float16, shapes and dtypes may
        differ from pair to pair; scaling one number, or one for each pair; mode "accurate", or
        "fast": no second pass over factors of a condition number above 1e5, whose vectors are
        then not orthonormal to 1e-5.
    Returns: LowRankSVD in float32, in float64 if any factor is (by two QR decompositions in
        torch). rank is the numerical rank: columns of U and rows of Vh from there on are zero.
        info is 0; -1 where anything is NaN or Inf, and then U, S and Vh are NaN and the rank is 0;
        -2 where a singular value within the rank is no normal number of the results' dtype: Inf,
        zero or with fewer digits in S, while U, Vh and rank are right (float64 factors give S in
        float64); above 0 where Jacobi did not converge: how many pairs of columns are not
        orthogonal yet.
        The tensors of a list are views of one buffer each: clone what is to outlive the others.
        Ranks up to 32 on a CPU give the same bits for any number of threads, alone or in a list.
    Raises: TypeError or ValueError naming the argument on wrong types, counts, shapes, dtypes,
        devices or an unknown mode.
    Gradients: none.   Error bound: kernels/NUMERICS.md#low_rank_svd
    Source: Drmac and Veselic 2008, doi:10.1137/050639193; Demmel et al. 1999,
        doi:10.1016/S0024-3795(99)00134-2
    """
    return _decompose(lora_B, lora_A, scaling, mode, vectors=True)


def low_rank_svdvals(
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
    *,
    mode: str = "accurate",
) -> Tensors:
    """Compute the singular values S of `low_rank_svd`, bit for bit, without its vectors.

    Args, errors and gradients as there. Returns: [k], or a list of them.
    """
    return _decompose(lora_B, lora_A, scaling, mode, vectors=False).S


def spectral_stats(S: Tensor | Sequence[Tensor]) -> SpectralStats:
    """Compute energy, stable rank and effective rank of singular values [k], or of a list.

    energy = sum sigma^2 = |dW|_F^2; stable_rank = energy / sigma_1^2;
    effective_rank = exp(-sum p log p), p = sigma / sum sigma. Both ranks of a zero matrix are 0,
    and NaN where S holds NaN or Inf. Energies beyond float64 are Inf or 0; the ranks stay right.

    Raises: TypeError or ValueError naming the argument.
    Gradients: none.
    Source: Rudelson and Vershynin 2007 (stable rank); Roy and Vetterli 2007 (effective rank)
    """
    single, values = _singular_values(S)
    rows = []
    for sigma in values:
        sigma = sigma.detach().double()
        top = sigma.amax() if sigma.numel() else sigma.new_zeros(())
        unit = sigma / torch.where(top == 0, 1.0, top)
        share = unit / torch.where(top == 0, 1.0, unit.sum())
        entropy = torch.special.entr(share).sum()
        effective = torch.where(top == 0, 0.0, entropy.exp())
        rows.append((sigma.square().sum(), unit.square().sum(), effective))
    if single:
        return SpectralStats(*rows[0])
    if not rows:
        return SpectralStats(*(torch.zeros(0, dtype=torch.float64) for _ in range(3)))
    return SpectralStats(*(torch.stack(column) for column in zip(*rows, strict=True)))


def allocate_rank(
    S: Sequence[Tensor],
    budget: float,
    *,
    cost: Sequence[float] | None = None,
    r_min: int | Sequence[int] = 0,
    r_max: int | Sequence[int] | None = None,
) -> list[int]:
    """Choose how many singular values each layer keeps so that the loss is least.

    Maximises the sum over layers of the first ranks[l] values sigma^2 subject to
    sum cost[l] * ranks[l] <= budget. At unit cost taking the largest is exactly optimal (Eckart and
    Young); with other costs, e.g. m + n of each layer, the largest sigma^2 / cost are taken as long
    as they fit, which is optimal up to one component. Ties go to the lower layer. Zeros are not
    taken beyond r_min. Reads S once on the host.

    Args: S [k] of each layer, descending; budget in units of cost; cost positive, for each layer
        (1); r_min and r_max one number or one for each layer (0 and k); a layer has at most k.
    Returns: the ranks, a list of int.
    Raises: TypeError or ValueError naming the argument: counts that differ, NaN or Inf (with the
        layer), values that do not descend, bounds that contradict, a budget below r_min's cost.
    Gradients: none.
    """
    if not is_listed(S):
        came = type(S).__name__
        raise TypeError(f"S: expected a list of tensors, one for each layer, got a {came}")
    if not isinstance(budget, (float, numbers.Real)):
        raise TypeError(f"budget: expected a number, got a {type(budget).__name__}")
    values = [sigma.detach().double().abs().tolist() for sigma in _singular_values(S)[1]]
    count = len(values)
    costs = [1.0] * count if cost is None else [float(c) for c in _each("cost", cost, count)]
    low = _each("r_min", r_min, count)
    high = _each("r_max", [len(v) for v in values] if r_max is None else r_max, count)
    high = [min(h, len(v)) for h, v in zip(high, values, strict=True)]
    for layer, sigma in enumerate(values):
        if not all(math.isfinite(value) for value in sigma):
            raise ValueError(f"S: expected finite values, layer {layer} holds NaN or Inf")
        if any(a < b for a, b in itertools.pairwise(sigma)):
            raise ValueError(f"S: expected descending values, those of layer {layer} are not")
        if not costs[layer] > 0 or math.isinf(costs[layer]):
            raise ValueError(f"cost: expected positive numbers, layer {layer} has {costs[layer]}")
        if not 0 <= low[layer] <= high[layer]:
            raise ValueError(
                f"r_min, r_max: expected 0 <= r_min <= min(r_max, {len(sigma)}), layer {layer} "
                f"has {low[layer]} and {high[layer]}"
            )
    left = budget - sum(c * r for c, r in zip(costs, low, strict=True))
    if not left >= 0:
        raise ValueError(f"budget: expected at least {budget - left:g}, r_min's cost, got {budget}")
    ranks = list(low)

    def offer(layer: int) -> tuple[float, int]:
        # In the order of sigma^2 / cost, whose squares may be beyond float64.
        return -values[layer][ranks[layer]] / math.sqrt(costs[layer]), layer

    heap = [offer(layer) for layer in range(count) if ranks[layer] < high[layer]]
    heapq.heapify(heap)
    while heap:
        gain, layer = heapq.heappop(heap)
        if gain == 0.0 or costs[layer] > left:  # no later value of the layer is larger or cheaper
            continue
        left -= costs[layer]
        ranks[layer] += 1
        if ranks[layer] < high[layer]:
            heapq.heappush(heap, offer(layer))
    return ranks


def truncate_lora(
    svd: LowRankSVD, ranks: int | Sequence[int], form: str = "balanced"
) -> LoraFactors | AdaLoraFactors | list[LoraFactors] | list[AdaLoraFactors]:
    """Return the factors of the best approximation of a given rank, for a scaling of 1.

    "balanced": lora_B = U sqrt(S), lora_A = sqrt(S) Vh. "adalora": lora_B = U [m, rank],
    lora_E = S [rank, 1], lora_A = Vh [rank, n].

    Args: svd of one pair or of lists; ranks one number or one for each pair, each at most k.
    Returns: LoraFactors or AdaLoraFactors, new tensors in the dtype of svd; a list for lists. Not
        finite where S is not (info -1, or -2 at the large end).
    Raises: TypeError or ValueError naming the argument.
    Gradients: none.   Source: Eckart and Young 1936
    """
    _check_choice("form", form, FORMS)
    if not isinstance(svd, LowRankSVD):
        raise TypeError(f"svd: expected what low_rank_svd returns, got a {type(svd).__name__}")
    single = isinstance(svd.S, Tensor)
    layers = [svd[:3]] if single else list(zip(*svd[:3], strict=True))
    factors, rows = [], torch.contiguous_format
    for layer, rank in enumerate(_each("ranks", ranks, len(layers))):
        U, S, Vh = layers[layer]
        if not 0 <= rank <= len(S):
            raise ValueError(f"ranks: expected 0 to {len(S)}, layer {layer} has {rank}")
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        if form == "adalora":
            factors.append(
                AdaLoraFactors(U.clone(memory_format=rows), S[:, None].clone(), Vh.clone())
            )
        else:
            root = S.sqrt()
            factors.append(LoraFactors(U * root, root[:, None] * Vh))
    return factors[0] if single else factors


def merge_lora(
    adapters: Sequence[tuple[Tensor | Sequence[Tensor], Tensor | Sequence[Tensor]]],
    weights: Sequence[float] | None = None,
    *,
    mode: str = "accurate",
) -> LowRankSVD:
    """Compute the SVD of a weighted sum of adapters, sum_i weights[i] * lora_B_i @ lora_A_i.

    It is the SVD of the concatenated factors, of rank sum r_i at most; no dense matrix is formed.
    `truncate_lora` brings the result back to one rank.

    Args: adapters: (lora_B [m, r_i], lora_A [r_i, n]) of one layer, or pairs of lists over the same
        layers; weights: one number for each adapter, its own scaling included (1).
    Returns: LowRankSVD of the layer, or with lists over the layers.
    Raises: TypeError or ValueError naming the argument.
    Gradients: none.
    """
    if not is_listed(adapters):
        raise TypeError(f"adapters: expected a list of pairs, got a {type(adapters).__name__}")
    adapters = list(adapters)
    if not adapters:
        raise ValueError("adapters: expected at least one, got none")
    singles, layers = set(), []
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
            raise TypeError(f"adapters: expected pairs (lora_B, lora_A), number {i} is not one")
        single, B, A = _pairs(*adapter)
        singles.add(single)
        layers.append((B, A))
    weights = _each("weights", 1.0 if weights is None else weights, len(adapters))
    counts = {len(B) for B, _ in layers}
    if len(singles) > 1 or len(counts) > 1:
        raise ValueError(f"adapters: expected the same layers in all, got {sorted(counts)} layers")
    # The largest weight goes into the scaling, so that no product with a weight overflows.
    largest = max(abs(float(weight)) for weight in weights) or 1.0
    merged_B, merged_A = [], []
    for layer in range(counts.pop()):
        factors = [(B[layer], A[layer]) for B, A in layers]
        shapes = {(B.shape[0], A.shape[1]) for B, A in factors}
        if len(shapes) > 1:
            raise ValueError(f"adapters: expected one m x n in layer {layer}, got {sorted(shapes)}")
        wide = any(torch.float64 in (B.dtype, A.dtype) for B, A in factors)
        dtype = torch.float64 if wide else torch.float32
        shares = [float(weight) / largest for weight in weights]
        scaled = [B.detach().to(dtype) * w for (B, _), w in zip(factors, shares, strict=True)]
        merged_B.append(torch.cat(scaled, 1))
        merged_A.append(torch.cat([A.detach().to(dtype) for _, A in factors], 0))
    if singles.pop():
        return low_rank_svd(merged_B[0], merged_A[0], largest, mode=mode)
    return low_rank_svd(merged_B, merged_A, largest, mode=mode)


def _decompose(
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    mode: str,
    *,
    vectors: bool,
) -> LowRankSVD:
    single, Bs, As = _pairs(lora_B, lora_A)
    _check_choice("mode", mode, MODES)
    factors = [float(s) for s in _each("scaling", scaling, len(Bs))]
    if not Bs:
        none = torch.zeros(0, dtype=torch.int64)
        return LowRankSVD([], [], [], none, none.clone())
    with torch.no_grad():
        detached = ([t.detach() for t in tensors] for tensors in (Bs, As))
        U, S, Vh, rank, info = ops.low_rank_svd(*detached, factors, vectors, mode)
    k = [min(*B.shape, A.shape[1]) for B, A in zip(Bs, As, strict=True)]
    lists = [list(S.split(k))]
    if vectors:
        U_shapes = [(B.shape[0], width) for B, width in zip(Bs, k, strict=True)]
        Vh_shapes = [(width, A.shape[1]) for A, width in zip(As, k, strict=True)]
        lists = [_unflatten(U, U_shapes), *lists, _unflatten(Vh, Vh_shapes)]
    else:
        lists = [[], *lists, []]
    if not single:
        return LowRankSVD(*lists, rank, info)
    return LowRankSVD(*(column[0] if column else S for column in lists), rank[0], info[0])


def _unflatten(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _pairs(
    lora_B: Tensor | Sequence[Tensor], lora_A: Tensor | Sequence[Tensor]
) -> tuple[bool, list[Tensor], list[Tensor]]:
    """Check the factors; return them as lists, and whether it is one pair."""
    single = isinstance(lora_B, Tensor) and isinstance(lora_A, Tensor)
    if not single and not (is_listed(lora_B) and is_listed(lora_A)):
        came = f"a {type(lora_B).__name__} and a {type(lora_A).__name__}"
        raise TypeError(f"lora_B, lora_A: expected two tensors or two lists of them, got {came}")
    Bs, As = ([lora_B], [lora_A]) if single else (list(lora_B), list(lora_A))
    if len(Bs) != len(As):
        raise ValueError(f"lora_A: expected {len(Bs)} tensors as in lora_B, got {len(As)}")
    for i, (B, A) in enumerate(zip(Bs, As, strict=True)):
        where = "" if single else f"[{i}]"
        for name, tensor, shape in (("lora_B", B, "[m, r]"), ("lora_A", A, "[r, n]")):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}{where}: expected a tensor, got {type(tensor).__name__}")
            if tensor.dim() != 2:
                raise ValueError(f"{name}{where}: expected {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name}{where}: expected one of {DTYPES}, got {tensor.dtype}")
            if tensor.device != Bs[0].device:
                raise ValueError(
                    f"{name}{where}: expected all on {Bs[0].device}, got {tensor.device}"
                )
        if B.shape[1] != A.shape[0]:
            raise ValueError(
                f"lora_A{where}: expected {B.shape[1]} rows as lora_B has columns, got "
                f"{tuple(A.shape)}"
            )
    return single, Bs, As


def _singular_values(S: Tensor | Sequence[Tensor]) -> tuple[bool, list[Tensor]]:
    single = isinstance(S, Tensor)
    if not single and not is_listed(S):
        raise TypeError(f"S: expected a tensor or a list of them, got a {type(S).__name__}")
    values = [S] if single else list(S)
    for layer, sigma in enumerate(values):
        if not isinstance(sigma, Tensor):
            raise TypeError(f"S: expected tensors, layer {layer} is {type(sigma).__name__}")
        if sigma.dim() != 1:
            raise ValueError(f"S: expected [k], layer {layer} has {tuple(sigma.shape)}")
    return single, values


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise mismatch(name, f"one of {choices}", value)


def _each(name: str, value: float | Sequence[float], count: int) -> list:
    """Return `count` numbers: those given, or the one given."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (float, numbers.Real)):
        return [value] * count
    values = list(value) if is_listed(value) else [value]
    if not all(isinstance(one, (float, numbers.Real)) for one in values):
        came = type(value).__name__
        raise TypeError(f"{name}: expected a number, or a list of {count}, got a {came}")
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {len(values)}")
    return values
