"""The public functions of AdaLoRA: triplet importance, the global budget, the orthogonality loss.

A triplet of a layer is (lora_E[j], lora_A[j, :], lora_B[:, j]): a singular value and its vectors.
Everything here takes all layers at once.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.functional.arguments import (
    DTYPES,
    check_each_dense,
    check_tensor,
    integer,
    is_listed,
    mismatch,
    tensor_list,
)
from peftkern.functional.autograd import batchable, partial_gradients
from peftkern.functional.triplet_selection import select_triplets

__all__ = ["adalora_allocate_", "adalora_importance_", "orthogonality_loss"]
TIES = ("exact", "peft")
UNLIMITED = 1 << 31  # r_max of a layer without one


def adalora_importance_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Tensor:
    """Update AdaLoRA's sensitivity and uncertainty in place and score every triplet.

    I = |w * grad|, ipt = beta1 * ipt + (1 - beta1) * I, unc = beta2 * unc + (1 - beta2) * |I - ipt|
    score_j = s(E_j) + mean_k s(A_jk) + mean_n s(B_nj), s = ipt * unc

    Args: params, lora_E [r, 1], lora_A [r, K] and lora_B [N, r] of the first layer, then of the
        next, float16|bfloat16|float32|float64; r may differ between layers and may be 0. grads,
        as params; None counts as zero. exp_avg_ipt and exp_avg_unc, contiguous float32 (float64
        for float64 params), flat: the elements of all params one after the other, zero at first.
    Returns: scores [sum of r] of the layers in turn, dtype of exp_avg_ipt; `scores.split(ranks)`
        gives them per layer. A non-finite gradient makes the scores of its triplets non-finite.
    Raises: ValueError naming the argument on a wrong shape, dtype or device.
    Gradients: none.   Error bound: kernels/NUMERICS.md#adalora_importance_
    Source: Zhang et al. 2023, eq. 8-11, arXiv:2303.10512
    """
    params, grads = tensor_list("params", params), tensor_list("grads", grads, optional=True)
    for name, state in (("exp_avg_ipt", exp_avg_ipt), ("exp_avg_unc", exp_avg_unc)):
        check_tensor(name, state)
    if not params or len(params) % 3 or len(grads) != len(params):
        raise ValueError(
            "params, grads: expected lora_E, lora_A, lora_B of at least one layer and as many "
            f"gradients, got {len(params)} and {len(grads)} tensors"
        )
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not isinstance(beta, (float, numbers.Real)) or not 0.0 < beta < 1.0:
            raise mismatch(name, "a number between 0 and 1", beta)
    try:
        _check_triplets(params, grads, exp_avg_ipt, exp_avg_unc)
        with torch.no_grad():
            return ops.adalora_importance_(exp_avg_ipt, exp_avg_unc, params, grads, beta1, beta2)
    except Exception:
        check_each_dense(params=params, grads=grads)
        raise


def _check_triplets(
    params: list[Tensor], grads: list[Tensor | None], exp_avg_ipt: Tensor, exp_avg_unc: Tensor
) -> None:
    shapes, device = [p.shape for p in params], exp_avg_ipt.device
    numel = _elements(shapes)
    # Each question is asked of all before the next: there are hundreds.
    given = [p if g is None else g for p, g in zip(params, grads, strict=True)]
    both = params + given
    right = {t.dtype for t in both} <= {*DTYPES} and _are_on(both, device)
    if not right or [g.shape for g in given] != shapes:
        for i, p in enumerate(params):
            if p.dtype not in DTYPES or p.device != device:
                raise mismatch(f"params[{i}]", f"one of {DTYPES} on {device}", p)
        for i, (g, shape) in enumerate(zip(given, shapes, strict=True)):
            if g.shape != shape or g.dtype not in DTYPES or g.device != device:
                raise mismatch(f"grads[{i}]", f"{list(shape)} of {DTYPES} on {device}", g)
    wide = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    for name, state in (("exp_avg_ipt", exp_avg_ipt), ("exp_avg_unc", exp_avg_unc)):
        wrong = state.shape != (numel,) or state.dtype is not wide or state.device != device
        if wrong or not state.is_contiguous():
            raise mismatch(name, f"[{numel}] contiguous {wide} on {device}", state)


def _are_on(tensors: list[Tensor], device: torch.device) -> bool:
    """Return whether all are on a device, of a CPU without an object for each that names it."""
    if device.type == "cpu":
        return {tensor.is_cpu for tensor in tensors} == {True}
    return {tensor.device for tensor in tensors} == {device}


def _elements(shapes: list[torch.Size]) -> int:
    """Return the elements of all triplets. Raises: ValueError on shapes that make none."""
    numel = 0
    for i, (E, A, B) in enumerate(zip(shapes[::3], shapes[1::3], shapes[2::3], strict=True)):
        r, K, N = (*A, B[0]) if len(A) == len(B) == 2 else (-1, 0, 0)
        if not K or not N or B[1] != r or E.numel() != r:
            raise ValueError(
                f"params of layer {i}: expected lora_E [r, 1], lora_A [r, K], lora_B [N, r], "
                f"got {[list(shape) for shape in (E, A, B)]}"
            )
        numel += r * (1 + K + N)
    return numel


def adalora_allocate_(
    scores: Tensor,
    lora_E: Sequence[Tensor],
    budget: float,
    *,
    ties: str = "exact",
    cost: float | Sequence[float] = 1,
    r_min: int | Sequence[int] = 0,
    r_max: int | Sequence[int] | None = None,
) -> Tensor:
    """Keep the `budget` best triplets of all layers and zero the lora_E of the others, in place.

    Args: scores [sum of r], float32|float64, from `adalora_importance_`; lora_E, [r, 1] of every
        layer; budget, a number of triplets, or what they may cost: 0 prunes all, sum of r or more
        prunes none. ties: "exact" keeps exactly `budget`, by score and then by lower index; "peft"
        prunes whatever is not greater than the (sum of r - budget)-th smallest score, ties with it
        included, as PEFT does, except where all scores are zero: those say nothing and go by
        "exact". cost of a triplet, r_min and r_max, for all layers or one for each: the r_min best
        of a layer stay, and r_max at most. With any of them `ties` is "exact", and the others are
        taken by score / cost, each one that fits. The sum of scores kept is then the greatest there
        is at one cost for all, and else below it by less than one triplet's score.
    Returns: the mask of what was kept, bool [sum of r]. NaN counts as the greatest score. On a GPU
        nothing waits for the result.
    Raises: ValueError naming the argument, and where r_min costs more than the budget.
    Gradients: none; autograd is told that lora_E has changed.
    Source: Zhang et al. 2023, eq. 5, arXiv:2303.10512
    """
    if not isinstance(ties, str) or ties not in TIES:
        raise mismatch("ties", f"one of {TIES}", ties)
    check_tensor("scores", scores)
    lora_E = tensor_list("lora_E", lora_E)
    limits = _limits(len(lora_E), cost, r_min, r_max)
    if limits is None:
        budget = integer("budget", budget)
    elif not isinstance(budget, numbers.Real) or not budget >= 0:
        raise mismatch("budget", "what the triplets may cost", budget)
    try:
        return _prune(scores, lora_E, budget, ties == "peft", limits)
    except Exception:
        check_each_dense(lora_E=lora_E)
        raise


def _prune(
    scores: Tensor, lora_E: list[Tensor], budget: Any, threshold_ties: bool, limits: Any
) -> Tensor:
    total = sum(map(Tensor.numel, lora_E))
    if scores.shape != (total,) or scores.dtype not in (torch.float32, torch.float64):
        raise mismatch("scores", f"[{total}] float32 or float64 for these lora_E", scores)
    device = scores.device
    if not (
        all(map(Tensor.is_contiguous, lora_E))
        and {E.dtype for E in lora_E} <= {*DTYPES}
        and _are_on(lora_E, device)
    ):
        for i, E in enumerate(lora_E):
            if not E.is_contiguous() or E.dtype not in DTYPES or E.device != device:
                raise mismatch(f"lora_E[{i}]", f"contiguous {DTYPES} on {device}", E)
    if not total:
        return torch.ones_like(scores, dtype=torch.bool)
    with torch.no_grad():
        if limits is None:
            mask = ops.adalora_allocate_(scores, lora_E, budget, threshold_ties)
            torch.autograd.graph.increment_version(lora_E)
        else:
            ranks = [E.numel() for E in lora_E]
            mask = select_triplets(scores, ranks, budget, *limits)
            for E, pruned in zip(lora_E, (~mask).split(ranks), strict=True):
                E.masked_fill_(pruned.view(E.shape), 0.0)
    return mask


def _limits(
    count: int, cost: float | Sequence[float], r_min: int | Sequence[int], r_max: Any
) -> tuple[list, list, list] | None:
    """Return cost, floor and cap of every layer; None if there are none."""
    plain = ((cost, 1), (r_min, 0), (r_max, None))
    if all(type(given) is type(default) and given == default for given, default in plain):
        return None
    low = _of_layers("r_min", r_min, count, integer)
    high = _of_layers("r_max", UNLIMITED if r_max is None else r_max, count, integer)
    if any(lo > hi for lo, hi in zip(low, high, strict=True)):
        raise ValueError("r_min, r_max: expected r_min <= r_max in every layer")
    return _of_layers("cost", cost, count, _positive), low, high


def _of_layers(name: str, given: Any, count: int, read: Callable[[str, Any], Any]) -> list:
    """Return a number of each layer, as `read` has it."""
    values = [given] * count if isinstance(given, numbers.Real) else given
    if not is_listed(values) or len(values := list(values)) != count:
        raise mismatch(name, f"a number, or one for each of {count} layers", given)
    return [read(name, value) for value in values]


def _positive(name: str, value: Any) -> Any:
    if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise mismatch(name, "a positive number", value)
    return value


def orthogonality_loss(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *, squared: bool = False
) -> Tensor:
    """Measure how far the singular vectors of all layers are from orthonormal.

    loss = mean over all matrices of |A @ A.T - I|_F and |B.T @ B - I|_F, or of their squares

    Args: lora_A [r, K] and lora_B [N, r] of every layer, float16|bfloat16|float32|float64; squared,
        the paper's form; PEFT and the official code take the norm itself. Autocast changes nothing
        here: Gram matrices of 16-bit copies would be off by more than the norm of a good basis.
    Returns: 0-dim, float32 (float64 for float64).
    Raises: ValueError naming the argument.
    Gradients: lora_A, lora_B; twice differentiable; zero for a matrix whose norm is zero.
        Error bound: kernels/NUMERICS.md#orthogonality_loss
    Source: Zhang et al. 2023, eq. 4, arXiv:2303.10512
    """
    lora_A, lora_B = tensor_list("lora_A", lora_A), tensor_list("lora_B", lora_B)
    matrices = lora_A + lora_B
    if not isinstance(squared, bool):
        raise mismatch("squared", "True or False", squared)
    if not lora_A or not lora_B:
        raise ValueError("lora_A, lora_B: expected at least one matrix each, got an empty list")
    for i, matrix in enumerate(matrices):
        name = f"lora_A[{i}]" if i < len(lora_A) else f"lora_B[{i - len(lora_A)}]"
        if matrix.dim() != 2 or matrix.dtype not in DTYPES or matrix.device != lora_A[0].device:
            raise mismatch(name, f"a matrix of {DTYPES} on {lora_A[0].device}", matrix)
    try:
        if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in matrices):
            return _OrthogonalityLoss.apply(squared, len(lora_A), *matrices)
        return ops.adalora_orthogonality_forward(lora_A, lora_B, squared)[0]
    except Exception:
        check_each_dense(lora_A=lora_A, lora_B=lora_B)
        raise


class _OrthogonalityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, squared, count, *matrices):
        lora_A, lora_B = list(matrices[:count]), list(matrices[count:])
        loss, residual, factors = ops.adalora_orthogonality_forward(lora_A, lora_B, squared)
        ctx.save_for_backward(residual, factors, *matrices)
        ctx.count, ctx.squared = count, squared
        return loss

    @staticmethod
    @batchable
    def backward(ctx, dloss):
        residual, factors, *matrices = ctx.saved_tensors
        lora_A, lora_B = matrices[: ctx.count], matrices[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph
            loss = functools.partial(_loss, ctx.count, ctx.squared)
            return None, None, *partial_gradients(loss, matrices, needed, dloss)
        grads = ops.adalora_orthogonality_backward(dloss, residual, factors, lora_A, lora_B)
        return None, None, *[g if need else None for g, need in zip(grads, needed, strict=True)]


def _loss(count: int, squared: bool, *matrices: Tensor) -> Tensor:
    """`orthogonality_loss` in torch's own operations, of `count` lora_A and then every lora_B."""
    losses = []
    for i, matrix in enumerate(matrices):
        rows = matrix if i < count else matrix.t()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        residual = rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        losses.append(residual.square().sum() if squared else torch.linalg.vector_norm(residual))
    return torch.stack(losses).mean()
