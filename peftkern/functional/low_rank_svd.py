"""Singular values and vectors of LoRA updates scaling * B A, and what follows from them.

Nothing here forms the m x n update: all costs are O((m + n) r^2). Nothing is differentiable either:
results have no gradient, whatever the factors require.

    svd = low_rank_svd(lora_B, lora_A, scaling)           # lists of hundreds of layers
    ranks = allocate_rank(svd.S, budget=8 * len(svd.S))
    smaller = truncate_lora(svd, ranks)                   # (lora_B, lora_A) of every layer
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import dispatch, ops
from peftkern.functional.arguments import check_tensor, integer, is_listed, mismatch
from peftkern.functional.outputs import Output, check_outputs
from peftkern.functional.rank_allocation import (
    SpectralStats,
    allocate_rank,
    each,
    rank_costs,
    spectral_stats,
)

__all__ = ["AdaLoraFactors", "LoraFactors", "LowRankSVD", "SpectralStats", "allocate_rank"]
__all__ += ["low_rank_svd", "low_rank_svdvals", "merge_lora", "rank_costs", "spectral_stats"]
__all__ += ["truncate_lora"]
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
    out: LowRankSVD | None = None,
) -> LowRankSVD:
    """Compute the reduced SVD of scaling * lora_B @ lora_A, of one pair or of lists of pairs.

    Gram matrices in float64, pivoted Cholesky, QR-preconditioned one-sided Jacobi on the core,
    and one rotation of each factor.

    Args: lora_B [m, r] and lora_A [r, n], float64|float32|bfloat16|float16, shapes and dtypes may
        differ from pair to pair; scaling one number, or one for each pair; mode "accurate", or
        "fast": no second pass over factors of a condition number above 1e5, whose vectors are
        then not orthonormal to 1e-5; out, a LowRankSVD of contiguous tensors to write to, such as
        an earlier call for pairs of the same shapes returned, so that no page of memory is new.
    Returns: LowRankSVD, `out` if that is given, in float32, in float64 if any factor is (by two QR
        decompositions in torch). rank is the numerical rank: columns of U and rows of Vh from there
        on are zero. info is 0; -1 where anything is NaN or Inf, and then U, S and Vh are NaN and
        the rank is 0; -2 where a singular value within the rank is no normal number of the results'
        dtype: Inf, zero or with fewer digits in S, while U, Vh and rank are right (float64 factors
        give S in float64); above 0 where Jacobi did not converge: how many pairs of columns are not
        orthogonal yet.
        The tensors of a list are views of one buffer each: clone what is to outlive the others.
        Ranks up to 32 on a CPU give the same bits for any number of threads, alone or in a list.
    Raises: TypeError or ValueError naming the argument on wrong types, counts, shapes, dtypes,
        devices or an unknown mode, and where a tensor of `out` shares memory with another or with
        a factor, has gaps, or belongs to autograd.
    Gradients: none.   Error bound: kernels/NUMERICS.md#low_rank_svd
    Source: Drmac and Veselic 2008, doi:10.1137/050639193; Demmel et al. 1999,
        doi:10.1016/S0024-3795(99)00134-2
    """
    return _decompose(lora_B, lora_A, scaling, mode, vectors=True, out=out)


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
    given = each("ranks", ranks, len(layers))
    for layer, (rank, (U, S, Vh)) in enumerate(zip(given, layers, strict=True)):
        rank = integer("ranks" if single else f"ranks[{layer}]", rank, 0, len(S))
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
    weights = each("weights", 1.0 if weights is None else weights, len(adapters))
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
    out: LowRankSVD | None = None,
) -> LowRankSVD:
    single, Bs, As = _pairs(lora_B, lora_A)
    _check_choice("mode", mode, MODES)
    factors = [float(s) for s in each("scaling", scaling, len(Bs))]
    if out is not None:
        return _decompose_into(out, single, Bs, As, factors, mode)
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


def _decompose_into(
    out: LowRankSVD,
    single: bool,
    Bs: list[Tensor],
    As: list[Tensor],
    factors: list[float],
    mode: str,
) -> LowRankSVD:
    U, S, Vh, (rank,), (info,) = _outputs(out, single, Bs, As)
    if not Bs:
        return out
    written = (*U, *S, *Vh, rank, info)
    with torch.no_grad():
        Bs, As = ([t.detach() for t in tensors] for tensors in (Bs, As))
        if dispatch.runs_on_cpu(Bs[0]):
            ops.low_rank_svd_out(Bs, As, factors, mode, U, S, Vh, rank.view(-1), info.view(-1))
        else:
            found = _decompose(Bs, As, factors, mode, vectors=True)
            values = (*found.U, *found.S, *found.Vh, found.rank, found.info)
            for tensor, value in zip(written, values, strict=True):
                tensor.copy_(value.view_as(tensor))
    # Autograd must see that what it may have saved is gone.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    return out


def _outputs(
    out: LowRankSVD, single: bool, Bs: list[Tensor], As: list[Tensor]
) -> list[list[Tensor]]:
    """Check `out`; return its columns as lists."""
    if not isinstance(out, LowRankSVD):
        raise TypeError(f"out: expected a LowRankSVD, got a {type(out).__name__}")
    device = Bs[0].device if Bs else torch.device("cpu")
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in (*Bs, *As)) else torch.float32
    sizes = [(*B.shape, A.shape[1]) for B, A in zip(Bs, As, strict=True)]
    U = [(m, min(m, r, n)) for m, r, n in sizes]
    Vh = [(k, n) for (_, k), (_, _, n) in zip(U, sizes, strict=True)]
    S = [(k,) for _, k in U]
    expected = {"U": (U, dtype), "S": (S, dtype), "Vh": (Vh, dtype)}
    outputs = [
        Output(f"out.{name}", getattr(out, name), shapes[0] if single else shapes, dtype)
        for name, (shapes, dtype) in expected.items()
    ]
    count = () if single else (len(Bs),)
    outputs += [Output(f"out.{n}", getattr(out, n), count, torch.int64) for n in ("rank", "info")]
    return check_outputs(outputs, device, {"lora_B": Bs, "lora_A": As})


def _unflatten(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    if len(set(shapes)) == 1:
        return list(flat.view(len(shapes), *shapes[0]).unbind())
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
            check_tensor(f"{name}{where}", tensor)
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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise mismatch(name, f"one of {choices}", value)
