"""LoRA-FA: LoRA whose lora_A stays as it was drawn, so that x need not be kept for backward.

    model = get_peft_model(base, LoraConfig(...))         # or layers of peftkern.layers
    optimizer = LoRAFAOptimizer(model, lr=2e-4)           # freezes every lora_A

With lora_A frozen `lora_linear` and `nf4_lora_linear` save x @ lora_A.T, [T, r], in place of x
(and with dropout its mask on a CPU, a seed elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftkern.methods.pairs import (
    AdapterPair,
    PairAdamW,
    check_counts,
    check_scaling,
    check_unshared,
    chunks,
    cut_reciprocal,
    eigenvalue_cutoff,
    find_pairs,
    scalings,
    stacked,
    symmetric_eigen,
)
from peftkern.methods.processes import check_unheld, part_of, whole

__all__ = ["LoRAFAOptimizer", "freeze_lora_A", "lora_fa_gradients"]
_PEFT_DELTA = 1e-8  # what PEFT adds to the diagonal of lora_A @ lora_A.T


def freeze_lora_A(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Freeze lora_A of every pair whose lora_B is trained; return the layers' names.

    Raises: as `peftkern.methods.pairs.find_pairs`; ValueError if DistributedDataParallel has
        wrapped the model already, since it would wait for gradients of lora_A for ever.
    """
    pairs = find_pairs(model, adapter)
    _check_wrapping(model, pairs)
    for pair in pairs:
        pair.lora_A.requires_grad_(False)
        pair.lora_A.grad = None
    return [pair.name for pair in pairs]


def _check_wrapping(model: nn.Module, pairs: Sequence[AdapterPair]) -> None:
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped and any(pair.lora_A.requires_grad for pair in pairs):
        raise ValueError(
            "model: DistributedDataParallel has it already and expects gradients of lora_A; call "
            "freeze_lora_A, or make the optimizer, before wrapping"
        )


def lora_fa_gradients(
    grad_B: Sequence[Tensor], lora_A: Sequence[Tensor], scaling: Sequence[float | Tensor]
) -> list[Tensor]:
    """Compute the gradients of lora_B that move the weights most nearly as their own would.

    g^B = g_B (A A^T)^-1 / scaling^2 minimizes |scaling * g^B A - dL/dW|_F. A lora_A whose rows are
    dependent has the pseudo-inverse in place of the inverse.

    Args: of each layer, grad_B [N, r], lora_A [r, K] and scaling, which is not 0.
    Returns: a list of [N, r], in the dtype of grad_B. A NaN or Inf stays in its own layer.
    Raises: ValueError on a scaling of 0, shapes that do not belong together or lists of unequal
        length.
    Gradients: none.   Source: Zhang et al. 2023, arXiv:2308.03303 (v2)
    """
    check_counts(grad_B=grad_B, lora_A=lora_A, scaling=scaling)
    check_scaling(scaling)
    for i, (g, A) in enumerate(zip(grad_B, lora_A, strict=True)):
        if g.dim() != 2 or A.dim() != 2 or g.shape[1] != A.shape[0]:
            raise ValueError(
                f"grad_B, lora_A of layer {i}: expected [N, r] and [r, K], got {list(g.shape)} and "
                f"{list(A.shape)}"
            )
    with torch.no_grad():
        return _multiply(grad_B, gram_inverses(lora_A), scaling)


def gram_inverses(lora_A: Sequence[Tensor], delta: float = 0.0) -> list[Tensor]:
    """Invert A A^T + delta I of each lora_A [r, K], in float64: one Cholesky for all of a rank."""
    results: list[Tensor] = [torch.empty(0)] * len(lora_A)
    by_rank: dict[Any, list[tuple[list[int], Tensor]]] = {}
    for indices in chunks(lora_A):
        A = stacked(lora_A, indices)
        first = lora_A[indices[0]]
        key = (A.shape[1], first.dtype, A.device)
        by_rank.setdefault(key, []).append((indices, A @ A.mT))
    for (r, dtype, device), parts in by_rank.items():
        grams = torch.cat([gram for _, gram in parts])
        grams += delta * torch.eye(r, dtype=grams.dtype, device=device)
        inverses = _invert(grams, eigenvalue_cutoff(r, dtype))
        order = (i for indices, _ in parts for i in indices)
        for i, inverse in zip(order, inverses, strict=True):
            results[i] = inverse
    return results


def _invert(grams: Tensor, cutoff: float) -> Tensor:
    """Invert matrices [L, r, r]; those that are numerically singular have pseudo-inverses."""
    factors, info = torch.linalg.cholesky_ex(grams)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    regular = (info == 0) & (pivots.amin(-1) > cutoff * pivots.amax(-1))
    unit = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    inverses = torch.cholesky_inverse(torch.where(regular[:, None, None], factors, unit))
    if not regular.all():
        values, vectors = symmetric_eigen(grams[~regular])
        reciprocal = cut_reciprocal(values, cutoff)
        inverses[~regular] = (vectors * reciprocal[:, None, :]) @ vectors.mT
    return inverses


def _multiply(
    grad_B: Sequence[Tensor], inverses: Sequence[Tensor], scaling: Sequence[float | Tensor]
) -> list[Tensor]:
    """Compute grad_B @ inverse / scaling^2 of each layer, equal shapes in one product."""
    results: list[Tensor] = list(grad_B)
    for indices in chunks(grad_B, inverses):
        first = grad_B[indices[0]]
        s = scalings([scaling[i] for i in indices], first)
        inverse = torch.stack([inverses[i] for i in indices]) / s.square()
        wide = torch.promote_types(first.dtype, torch.float32)
        g = torch.stack([grad_B[i].detach() for i in indices]).to(wide) @ inverse.to(wide)
        for i, corrected in zip(indices, g.to(first.dtype), strict=True):
            results[i] = corrected
    return results


class LoRAFAOptimizer(PairAdamW):
    """AdamW on lora_B with the gradient of `lora_fa_gradients`; lora_A is frozen.

    lora_B <- AdamW(lora_B, g_B (A A^T)^-1 / scaling^2)

    Args:
        model: holds layers of peftkern with a low-rank update, or PEFT's LoRA layers; every lora_A
            of a trained pair is frozen here. scaling is read from its layer at every step.
        params: parameters or groups of them as in any torch optimizer; the trained parameters of
            the model by default. What belongs to no pair has plain AdamW.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        adapter: the name of the PEFT adapter to treat so; all trained ones by default.
        peft_parity: do what `peft.optimizers.create_lorafa_optimizer` does (pass eps=1e-6 too):
            the inverse and the corrected gradient are rounded to bfloat16 (not in float64), 1e-8
            is added to the diagonal of A A^T, eps is not bias-corrected, and weights decay after
            the step.

    The inverses are kept, r x r per layer, and made anew when a lora_A has been written to; writes
    through `.data` go unseen, as they do in autograd. Under DistributedDataParallel make it before
    the model is wrapped, under FSDP2 after `fully_shard`, before which `freeze_lora_A` is due. What
    is sharded is gathered: lora_A once, the gradients of lora_B at each step.
    Raises: ValueError on a value that makes no sense, if there is no trained pair, if two pairs
        share lora_B, if the model is wrapped already, and at a step naming the layer if its scaling
        is 0.
    Source: Zhang et al. 2023, arXiv:2308.03303 (v2); Loshchilov and Hutter 2019, arXiv:1711.05101
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adapter: str | None = None,
        peft_parity: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._peft_parity = peft_parity
        self._inverses: tuple[Any, list[Tensor]] = (None, [])
        pairs = find_pairs(model, adapter)
        _check_wrapping(model, pairs)
        check_unshared(pairs, ["lora_B"])
        if params is None:
            frozen = {pair.lora_A for pair in pairs}
            params = [p for p in model.parameters() if p.requires_grad and p not in frozen]
        super().__init__(model, params, adapter, defaults)
        freeze_lora_A(model, adapter)  # last: a refused argument leaves the model as it was

    def __getstate__(self) -> dict[str, Any]:
        own = {"_peft_parity": self._peft_parity, "_inverses": (None, [])}
        return {**super().__getstate__(), **own}

    def _inverse(self) -> list[Tensor]:
        """Return (A A^T)^-1 of every pair, kept as long as no lora_A changes."""
        A = [pair.lora_A for pair in self._pairs]
        state = [(id(a), a._version, a.device, a.dtype) for a in A]
        if self._inverses[0] != state:
            delta = _PEFT_DELTA if self._peft_parity else 0.0
            self._inverses = (state, gram_inverses([whole(a) for a in A], delta))
        return self._inverses[1]

    def _replace(self, grads: dict[Tensor, Tensor]) -> None:
        for pair in self._pairs:
            check_unheld(pair.name, pair.lora_B, "in which LoRA-FA finds no pair")
        inverses = self._inverse()
        used = [i for i, pair in enumerate(self._pairs) if pair.lora_B in grads]
        B = [self._pairs[i].lora_B for i in used]
        inverses = [inverses[i] for i in used]
        scaling = [self._pairs[i].scaling for i in used]
        check_scaling(scaling, [self._pairs[i].name for i in used])
        found = [whole(grads[b]) for b in B]
        if self._peft_parity:
            corrected = [
                _peft_product(grad, inverse, s)
                for grad, inverse, s in zip(found, inverses, scaling, strict=True)
            ]
        else:
            corrected = _multiply(found, inverses, scaling)
        grads.update((b, part_of(grad, b)) for b, grad in zip(B, corrected, strict=True))

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: dict[Tensor, Tensor]
    ) -> None:
        if not self._peft_parity:
            super()._update(group, params, grads)
            return
        for p in params:
            step = float(self._moments(p, p.shape)["step"]) + 1
            uncorrected = group["eps"] / (1 - group["betas"][1] ** step) ** 0.5
            super()._update({**group, "eps": uncorrected, "weight_decay": 0.0}, [p], grads)
            p.mul_(1 - group["lr"] * group["weight_decay"])


def _peft_product(grad: Tensor, inverse: Tensor, scaling: float | Tensor) -> Tensor:
    """Multiply as PEFT does, under autocast to bfloat16, which leaves float64 alone."""
    if grad.dtype is torch.float64:
        return grad @ inverse / scaling**2
    product = grad.bfloat16() @ inverse.to(grad.dtype).bfloat16()
    return ((1 / scaling**2) * product).to(grad.dtype)
