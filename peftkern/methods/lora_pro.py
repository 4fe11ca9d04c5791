"""LoRA-Pro: gradients of the two factors that move their product as full fine-tuning would.

    model = get_peft_model(base, LoraConfig(...))         # or layers of peftkern.layers
    optimizer = LoRAProAdamW(model, lr=2e-4)

A step along the factors' own gradients moves the weight along scaling * (g_B A + B g_A), which is
far from the gradient g of the weight. The ones here give g - (I - P_B) g (I - P_A), with P_B and
P_A the projections on the columns of lora_B and the rows of lora_A: the nearest that there is.

That holds for the step itself with a plain gradient step (`lora_pro_hook` on torch.optim.SGD). Adam
rescales what it follows element by element: with full_moments it does so to the weight's gradient,
as full fine-tuning does; with the factors' own moments, the default, what the rescaled factors do
to the weight is no longer the nearest (bench/studies/planted_regression.py prints both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.methods.pairs import (
    AdapterPair,
    PairAdamW,
    check_counts,
    check_scaling,
    check_unshared,
    chunks,
    current_pairs,
    cut_reciprocal,
    eigenvalue_cutoff,
    find_pairs,
    scalings,
    stacked,
    symmetric_eigen,
)
from peftkern.methods.processes import check_unheld, is_sharded, part_of, whole

__all__ = ["LoRAProAdamW", "lora_pro_gradients", "lora_pro_hook"]
_FACTORS = ("lora_A", "lora_B")


def lora_pro_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float | Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the gradients that replace grad_A and grad_B, in closed form, of all layers.

    With G_B = B^T B, G_A = A A^T and s = scaling:
    g^A = G_B^-1 g_A / s^2 + X A
    g^B = (I - B G_B^-1 B^T) g_B G_A^-1 / s^2 - B X
    G_B X + X G_A = -G_B^-1 g_A A^T / s^2
    so that s (g^B A + B g^A) = g - (I - P_B) g (I - P_A) for any X; this one is nearest to
    (g_A, g_B). With eigenvectors E, F and values l, m of G_B and G_A the last line has the solution
    X = E [(E^T C F)_ij / (l_i + m_j)] F^T, C its right-hand side. An eigenvalue that is noise next
    to the largest counts as zero and has the reciprocal 0: where lora_B is zero g^A is zero.

    Args: of each layer, lora_A and grad_A [r, K], lora_B and grad_B [N, r], float64|float32|
        float16|bfloat16, and scaling, which is not 0. Layers of one rank share one eigenvalue call.
    Returns: lists of g^A [r, K] and g^B [N, r] in the dtypes of grad_A and grad_B; computed in
        float64. A NaN or Inf stays in its own layer.
    Raises: ValueError on a scaling of 0, shapes that do not belong together or lists of unequal
        length.
    Gradients: none.   Source: Wang et al. 2024, theorem 2.1 and 2.2, arXiv:2407.18242
    """
    check_counts(lora_A=lora_A, lora_B=lora_B, grad_A=grad_A, grad_B=grad_B, scaling=scaling)
    check_scaling(scaling)
    columns = (lora_A, lora_B, grad_A, grad_B)
    for i, (A, B, gA, gB) in enumerate(zip(*columns, strict=True)):
        if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"lora_A, lora_B of layer {i}: expected [r, K] and [N, r], got {list(A.shape)} and "
                f"{list(B.shape)}"
            )
        if gA.shape != A.shape or gB.shape != B.shape:
            raise ValueError(
                f"grad_A, grad_B of layer {i}: expected {list(A.shape)} and {list(B.shape)}, got "
                f"{list(gA.shape)} and {list(gB.shape)}"
            )
    with torch.no_grad():
        parts = list(chunks(*columns))
        cores = _cores(columns, parts, scaling)
        results_A, results_B = list(grad_A), list(grad_B)
        for indices, (left, right, middle, X) in zip(parts, cores, strict=True):
            A, B, gA, gB = (stacked(column, indices) for column in columns)
            gA, gB = left @ gA + X @ A, gB @ right - B @ (middle + X)
            for i, a, b in zip(indices, gA, gB, strict=True):
                results_A[i] = a.to(grad_A[i].dtype)
                results_B[i] = b.to(grad_B[i].dtype)
    return results_A, results_B


def _cores(
    columns: Sequence[Sequence[Tensor]],
    parts: Sequence[list[int]],
    scaling: Sequence[float | Tensor],
) -> list[list[Tensor]]:
    """Compute the r x r matrices of every part: G_B^-1 / s^2, G_A^-1 / s^2, g_B's projection, X."""
    small = []
    for indices in parts:
        A, B, gA, gB = (stacked(column, indices) for column in columns)
        s2 = scalings([scaling[i] for i in indices], A).square()
        small.append((B.mT @ B, A @ A.mT, gA @ A.mT / s2, B.mT @ gB / s2, s2))
    by_rank: dict[Any, list[int]] = {}
    for number, (G_B, *_) in enumerate(small):
        dtypes = [columns[c][parts[number][0]].dtype for c in (0, 1)]
        by_rank.setdefault((G_B.shape[1], *dtypes, G_B.device), []).append(number)
    cores: list[list[Tensor]] = [[]] * len(parts)
    for (r, dtype_A, dtype_B, _), numbers in by_rank.items():
        G_B, G_A, P, Q, s2 = (torch.cat(t) for t in zip(*(small[n] for n in numbers), strict=True))
        values, vectors = symmetric_eigen(torch.cat([G_B, G_A]))
        (l, m), (E, F) = values.chunk(2), vectors.chunk(2)  # noqa: E741
        inverse_l = cut_reciprocal(l, eigenvalue_cutoff(r, dtype_B))
        inverse_m = cut_reciprocal(m, eigenvalue_cutoff(r, dtype_A))
        left = (E * inverse_l[:, None, :]) @ E.mT
        right = (F * inverse_m[:, None, :]) @ F.mT
        # Where l counts as zero the right-hand side is zero, and so is that row of X.
        sums = l.clamp(min=0.0)[:, :, None] + m.clamp(min=0.0)[:, None, :]
        quotients = -inverse_l[:, :, None] * (E.mT @ P @ F) / sums
        X = E @ torch.where(inverse_l[:, :, None] == 0, 0.0, quotients) @ F.mT
        lengths = [len(parts[n]) for n in numbers]
        solved = (left / s2, right / s2, left @ Q @ right, X)
        for n, *core in zip(numbers, *(t.split(lengths) for t in solved), strict=True):
            cores[n] = core
    return cores


def lora_pro_hook(
    model: nn.Module, adapter: str | None = None
) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    """Make a hook that replaces `.grad` of every pair by `lora_pro_gradients` before a step.

        optimizer.register_step_pre_hook(lora_pro_hook(model))

    For any optimizer, but not for a step with a closure, which makes its gradients after the hook.
    Args and raises: as `LoRAProAdamW`.
    """
    pairs = find_pairs(model, adapter)
    check_unshared(pairs, _FACTORS)

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        now = current_pairs(pairs)
        factors = [p for pair in now for p in (pair.lora_A, pair.lora_B)]
        grads = {p: p.grad for p in factors if p.grad is not None}
        for p, grad in _replaced(_with_gradients(now, grads), grads).items():
            p.grad = grad

    return hook


class LoRAProAdamW(PairAdamW):
    """AdamW on the gradients of `lora_pro_gradients`.

    By default the two moments are kept for each factor, as any AdamW on lora_A and lora_B keeps
    them: 2 r (N + K) numbers for a layer. With full_moments they are kept for the equivalent
    gradient of the weight, as the paper has it: 2 N K numbers, as much as full fine-tuning.

        g = s (g^B A + B g^A); d = m(g) / (sqrt(v(g)) + eps), with Adam's corrections
        (lora_A, lora_B) <- (1 - lr * weight_decay) (lora_A, lora_B) - lr * (d^A, d^B)

    where d^A and d^B are `lora_pro_gradients` of s B^T d and s d A^T.

    Args:
        model: holds layers of peftkern with a low-rank update, or PEFT's LoRA layers, lora_A and
            lora_B trained. scaling is read from its layer at every step.
        params: parameters or groups of them as in any torch optimizer; the trained parameters of
            the model by default. What belongs to no pair has plain AdamW.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. With full_moments each factor has
            lr and weight_decay of its own group, and the moments those of lora_B's.
        adapter: the name of the PEFT adapter to treat so; all trained ones by default.
        full_moments: see above.

    Under FSDP2 make it after `fully_shard`: factors and gradients are gathered at each step, and
    full_moments are refused.
    Raises: ValueError on a value that makes no sense, if there is no trained pair, if two pairs
        share a factor, and at a step naming the layer if only one factor has a gradient or its
        scaling is 0; RuntimeError at a step if the model has other parameters by then.
    Source: Wang et al. 2024, algorithm 1, arXiv:2407.18242
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
        full_moments: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults["weight_decay"] = weight_decay
        # In the groups it is part of the state dict: moments of one kind are none of the other.
        defaults["full_moments"] = full_moments
        super().__init__(model, params, adapter, defaults)
        self._full_moments = full_moments
        self._check_moments()
        check_unshared(self._pairs, _FACTORS)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_full_moments": self._full_moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; ValueError if its moments are of the other kind."""
        for group in state_dict["param_groups"]:
            if group.get("full_moments", self._full_moments) is not self._full_moments:
                raise ValueError(
                    f"state_dict: expected full_moments={self._full_moments} as this optimizer "
                    f"has it, got {group['full_moments']}"
                )
        super().load_state_dict(state_dict)

    def _check_moments(self) -> None:
        """Raise ValueError for moments of a sharded model's weights, whole in each process."""
        if not self._full_moments:
            return
        sharded = [pair.name for pair in self._pairs if is_sharded(pair.lora_B)]
        if sharded:
            raise ValueError(
                f"full_moments: expected False where FSDP2 shards the model ({sharded[0]}.lora_B "
                "is a DTensor): every process would hold the moments of the whole weights"
            )

    def _replace(self, grads: dict[Tensor, Tensor]) -> None:
        self._check_moments()
        pairs = _with_gradients(self._pairs, grads)
        if not pairs:
            return
        replaced = _replaced(pairs, grads)
        if not self._full_moments:
            grads.update(replaced)
            return
        groups = {p: group for group in self.param_groups for p in group["params"]}
        directions = {}
        for pair in pairs:
            g = _equivalent(pair, replaced)
            d = self._direction(pair.lora_B, g, groups[pair.lora_B])
            s = pair.scaling
            directions[pair.lora_A] = s * (pair.lora_B.mT.to(d.dtype) @ d)
            directions[pair.lora_B] = s * (d @ pair.lora_A.mT.to(d.dtype))
        for p, direction in _replaced(pairs, directions).items():
            del grads[p]  # it has its step here
            lr, decay = groups[p]["lr"], groups[p]["weight_decay"]
            p.mul_(1 - lr * decay).sub_((lr * direction).to(p.dtype))

    def _direction(self, lora_B: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """Compute Adam's direction for the weight; its moments are kept with lora_B."""
        state = self._moments(lora_B, g.shape)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = (1 - beta ** state["step"].item() for beta in (beta1, beta2))
        denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
        return (state["exp_avg"] / correction1).div_(denominator)


def _with_gradients(pairs: Sequence[AdapterPair], grads: dict[Tensor, Tensor]) -> list[AdapterPair]:
    """Return the pairs that take part in this step; half of a pair's gradients is an error."""
    for pair in pairs:
        check_unheld(pair.name, pair.lora_B, "in which LoRA-Pro finds no pair")
        has_A, has_B = pair.lora_A in grads, pair.lora_B in grads
        if has_A is not has_B:
            raise ValueError(
                f"{pair.name}: {'lora_A' if has_B else 'lora_B'} has no gradient or is in no "
                "parameter group; LoRA-Pro needs both factors"
            )
    return [pair for pair in pairs if pair.lora_B in grads]


def _replaced(pairs: Sequence[AdapterPair], grads: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    A, B = [pair.lora_A for pair in pairs], [pair.lora_B for pair in pairs]
    scaling = [pair.scaling for pair in pairs]
    check_scaling(scaling, [pair.name for pair in pairs])
    columns = (A, B, [grads[p] for p in A], [grads[p] for p in B])
    with torch.no_grad():
        gA, gB = lora_pro_gradients(*([whole(t) for t in column] for column in columns), scaling)
    return {p: part_of(g, p) for p, g in zip([*A, *B], [*gA, *gB], strict=True)}


def _equivalent(pair: AdapterPair, grads: dict[Tensor, Tensor]) -> Tensor:
    """Return s (g^B A + B g^A), [N, K]: where the weight goes when the factors follow these."""
    A, B = pair.lora_A, pair.lora_B
    product = grads[B] @ A.to(grads[B].dtype) + B.to(grads[A].dtype) @ grads[A]
    return pair.scaling * product
