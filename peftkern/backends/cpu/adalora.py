"""AdaLoRA's importance, allocation and orthogonality loss in C++."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from peftkern.backends.cpu.module import (
    contiguous,
    float32,
    isa_and_threads,
    library,
    refusal_dense,
    refusal_list,
)
from peftkern.backends.pointers import Unlike, address, addresses, dtype_code, fresh


def refusal_importance(
    exp_avg_ipt: Tensor, params: list[Tensor], grads: list[Tensor | None]
) -> str | None:
    """Refuse other EMAs than float32, and tensors in float64 beside others."""
    if exp_avg_ipt.dtype is not torch.float32:
        return f"the EMAs are {exp_avg_ipt.dtype}"
    tensors = [*params, *[grad for grad in grads if grad is not None]]
    one_of_each = {tensor.dtype: tensor for tensor in tensors}
    if len(one_of_each) > 1 and torch.float64 in one_of_each:
        return refusal_list(tensors)
    reasons = map(refusal_dense, one_of_each.values())
    return next((reason for reason in reasons if reason is not None), None)


def refusal_allocate(scores: Tensor, lora_E: list[Tensor]) -> str | None:
    """Refuse other scores than float32."""
    if scores.dtype is not torch.float32:
        return f"scores are {scores.dtype}"
    return refusal_list(lora_E)


def refusal_orthogonality_forward(lora_A: list[Tensor], lora_B: list[Tensor]) -> str | None:
    """Refuse mixed dtypes and devices."""
    return refusal_list([*lora_A, *lora_B])


refusal_orthogonality_backward = refusal_orthogonality_forward


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    count = sum(map(Tensor.numel, params[::3]))
    scores = torch.empty(count, dtype=torch.float32, device="cpu")
    state, betas = (exp_avg_ipt, exp_avg_unc), (beta1, beta2)
    with contextlib.suppress(Unlike):  # it asks every tensor, so nothing does before
        _score(scores, state, params, grads, betas)
        return scores
    params, grads = contiguous(params), contiguous(grads)
    if len({t.dtype for t in (*params, *grads) if t is not None}) == 1:
        _score(scores, state, params, grads, betas)
        return scores
    # As with lora_E in float32 beside lora_A in bfloat16: a layer in float32 at a time.
    at, rank = 0, 0
    for i in range(0, len(params), 3):
        wide = [None if t is None else float32(t) for t in (*params[i : i + 3], *grads[i : i + 3])]
        numel, r = sum(p.numel() for p in wide[:3]), wide[0].numel()
        here = tuple(average[at : at + numel] for average in state)
        _score(scores[rank : rank + r], here, wide[:3], wide[3:], betas)
        at, rank = at + numel, rank + r
    return scores


def _score(
    scores: Tensor,
    state: tuple[Tensor, Tensor],
    params: list[Tensor],
    grads: list[Tensor | None],
    betas: tuple[float, float],
) -> None:
    """Update both averages of some layers, all in one dtype, and write their scores."""
    exp_avg_ipt, exp_avg_unc = state
    numel, count = exp_avg_ipt.numel(), scores.numel()
    library().adalora_importance(
        *isa_and_threads(),
        _triplet_table(params, grads),
        dtype_code("params", params[0]),
        address("exp_avg_ipt", exp_avg_ipt, torch.float32, numel),
        address("exp_avg_unc", exp_avg_unc, torch.float32, numel),
        numel,
        *betas,
        fresh(scores),
        count,
    )


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    scores, count = scores.contiguous(), scores.numel()
    dtype = lora_E[0].dtype
    sizes = [*map(Tensor.numel, lora_E)]
    table = []
    for r, at in zip(sizes, addresses("lora_E", lora_E, dtype, sizes), strict=True):
        table += (r, 1, 1, at, 0, 0, 0, 0, 0)
    keep = torch.empty(count, dtype=torch.bool, device="cpu")
    library().adalora_allocate(
        address("scores", scores, torch.float32, count),
        count,
        budget,
        threshold_ties,
        table,
        dtype_code("lora_E", lora_E[0]),
        fresh(keep),
    )
    return keep


def adalora_orthogonality_forward(
    lora_A: list[Tensor], lora_B: list[Tensor], squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    table, size = _gram_table(lora_A, lora_B)
    residual = torch.empty(size, dtype=torch.float32, device="cpu")
    norms = library().adalora_gram(
        *isa_and_threads(),
        table,
        len(lora_A),
        dtype_code("lora_A", lora_A[0]),
        fresh(residual),
        size,
    )
    n = len(norms)
    if squared:
        factors = [4 / n] * n
    else:
        norms = [math.sqrt(square) for square in norms]
        factors = [2 / (n * norm) if norm > 0 else 0.0 for norm in norms]
    return torch.tensor(math.fsum(norms) / n), residual, torch.tensor(factors)


def adalora_orthogonality_backward(
    dloss: Tensor,
    residual: Tensor,
    factors: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> list[Tensor]:
    lora_A, lora_B = contiguous(lora_A), contiguous(lora_B)
    scale = float(dloss)
    grads = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in lora_A + lora_B]
    table, size = _gram_table(lora_A, lora_B, grads)
    library().adalora_gram_backward(
        *isa_and_threads(),
        table,
        len(lora_A),
        dtype_code("lora_A", lora_A[0]),
        address("residual", residual, torch.float32, size),
        size,
        [scale * factor for factor in factors.tolist()],
    )
    return grads


def _triplet_table(params: list[Tensor], grads: list[Tensor | None]) -> list[int]:
    """Return r, K, N and the addresses of E, A, B and their gradients per layer; 0: no gradient."""
    dtype, sizes = params[0].dtype, [*map(Tensor.numel, params)]
    ranks, numels_A, numels_B = sizes[::3], sizes[1::3], sizes[2::3]
    K = [numel // r if r else 1 for numel, r in zip(numels_A, ranks, strict=True)]
    N = [numel // r if r else 1 for numel, r in zip(numels_B, ranks, strict=True)]
    owners = addresses("params", params, dtype, sizes)
    given = [p if grad is None else grad for p, grad in zip(params, grads, strict=True)]
    at = addresses("grads", given, dtype, sizes)
    slopes = [0 if grad is None else place for grad, place in zip(grads, at, strict=True)]
    columns = ranks, K, N, *(owners[i::3] for i in range(3)), *(slopes[i::3] for i in range(3))
    return [number for row in zip(*columns, strict=True) for number in row]


def _gram_table(
    lora_A: list[Tensor], lora_B: list[Tensor], grads: list[Tensor] | None = None
) -> tuple[list[int], int]:
    """Return r, length, addresses of matrix and gradient per matrix; elements of all residuals."""
    shapes = [A.shape for A in lora_A] + [B.shape[::-1] for B in lora_B]
    sizes = [r * length for r, length in shapes]
    matrices, dtype = lora_A + lora_B, lora_A[0].dtype
    at = addresses("lora_A, lora_B", matrices, dtype, sizes)
    grads_at = [0] * len(at) if grads is None else addresses("grads", grads, dtype, sizes)
    table = []
    for (r, length), matrix, grad in zip(shapes, at, grads_at, strict=True):
        table += (r, length, matrix, grad)
    return table, sum(r * r for r, _ in shapes)
