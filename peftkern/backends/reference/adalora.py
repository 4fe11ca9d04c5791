"""Oracle of AdaLoRA's importance, allocation and orthogonality loss, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    """Update AdaLoRA's two EMAs in place and return the score of every triplet.

    params: lora_E [r, 1], lora_A [r, K], lora_B [N, r] of every layer in turn. The EMAs hold the
    same elements in the same order, flat; sums over K and N are taken in their dtype.
    """
    sizes = [p.numel() for p in params]
    scores = []
    for p, g, ipt, unc in zip(
        params, grads, exp_avg_ipt.split(sizes), exp_avg_unc.split(sizes), strict=True
    ):
        if g is None:
            sensitivity = torch.zeros_like(ipt)
        else:
            sensitivity = (p.detach().to(ipt.dtype) * g.to(ipt.dtype)).abs().reshape(-1)
        finite = sensitivity.isfinite()  # elsewhere the EMAs stay, and the score is NaN
        ipt.copy_(torch.where(finite, beta1 * ipt + (1 - beta1) * sensitivity, ipt))
        spread = (1 - beta2) * (sensitivity - ipt).abs()
        unc.copy_(torch.where(finite, beta2 * unc + spread, unc))
        scores.append(torch.where(finite, ipt * unc, torch.nan).view(p.shape))
    triplets = zip(scores[::3], scores[1::3], scores[2::3], strict=True)
    return torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in triplets])


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    """Keep the `budget` best scores, zero what else is in lora_E; nothing waits for the device.

    Returns: the mask of what is kept, bool like scores.
    """
    count = scores.numel()
    keep = torch.ones(count, dtype=torch.bool, device=scores.device)
    if budget < count:
        values, order = scores.sort(descending=True, stable=True)
        keep.scatter_(0, order[budget:], False)
        if threshold_ties:  # scores that are all zero say nothing: they fall to the exact rule
            keep = torch.where(values[0] == 0, keep, ~(scores <= values[budget]))
    with torch.no_grad():
        for E, kept in zip(lora_E, keep.split([E.numel() for E in lora_E]), strict=True):
            E.masked_fill_(~kept.view(E.shape), 0.0)
    return keep


def adalora_orthogonality_forward(
    lora_A: list[Tensor], lora_B: list[Tensor], squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean over matrices of |A A^T - I|_F and |B^T B - I|_F, or of their squares.

    Returns: the loss, the residuals (each Gram matrix minus I) one after the other, and the factor
    of each for which d loss / d A = factor * residual @ A, d loss / d B = factor * B @ residual.
    """
    matrices = [*lora_A, *(B.t() for B in lora_B)]
    wide = torch.float64 if matrices[0].dtype is torch.float64 else torch.float32
    residuals: list[Tensor] = [matrices[0]] * len(matrices)
    squares = torch.empty(len(matrices), dtype=wide, device=matrices[0].device)
    for indices in _same_shape(matrices):
        rows = torch.stack([matrices[i].detach().to(wide) for i in indices])
        gram = rows @ rows.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        squares[indices] = gram.square().sum((1, 2))
        for i, residual in zip(indices, gram, strict=True):
            residuals[i] = residual.reshape(-1)
    n = len(matrices)
    if squared:
        return squares.mean(), torch.cat(residuals), torch.full_like(squares, 4 / n)
    norms = squares.sqrt()  # at zero the norm has no gradient; torch takes 0 there
    factors = torch.where(norms > 0, 2 / (n * norms), 0.0)
    return norms.mean(), torch.cat(residuals), factors


def adalora_orthogonality_backward(
    dloss: Tensor,
    residual: Tensor,
    factors: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> list[Tensor]:
    """Return the gradients of every lora_A, then of every lora_B."""
    matrices = [*lora_A, *(B.t() for B in lora_B)]
    residuals = residual.split([m.shape[0] ** 2 for m in matrices])
    scale = (factors * dloss).unbind()
    grads: list[Tensor] = [dloss] * len(matrices)
    for indices in _same_shape(matrices):
        r = matrices[indices[0]].shape[0]
        rows = torch.stack([matrices[i].detach().to(residual.dtype) for i in indices])
        factor = torch.stack([residuals[i].view(r, r) * scale[i] for i in indices])
        for i, grad in zip(indices, (factor @ rows).to(matrices[0].dtype), strict=True):
            grads[i] = grad if i < len(lora_A) else grad.t().contiguous()
    return grads


def _same_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Group the indices of the matrices by shape: one batched product serves a group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(tuple(matrix.shape), []).append(i)
    return list(groups.values())
