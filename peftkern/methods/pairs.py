"""Adapter pairs of a model, and the parts of optimizers that treat them as pairs.

A pair is lora_A [r, K] and lora_B [N, r] of one layer. Layers of peftkern and of PEFT are told by
what they have, not by their class, so nothing here imports PEFT.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from peftkern.methods.processes import check_readable, in_pieces, is_sharded

_CHUNK = 1 << 24  # elements of float64 copies that are alive at once: 128 MiB


@dataclass(frozen=True, eq=False)
class AdapterPair:
    """Factors of one layer's update, and the layer, which knows their scaling."""

    name: str
    layer: nn.Module
    adapter: str | None  # PEFT's name of it; None for a layer that has one pair
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @property
    def factors(self) -> list[tuple[str, Tensor]]:
        """Names of both factors in the model, and what they are."""
        return [(f"{self.name}.lora_A", self.lora_A), (f"{self.name}.lora_B", self.lora_B)]

    def renewed(self) -> AdapterPair:
        """Return the pair as the layer has it now: engines put parameters of theirs in place."""
        for pair in _pairs_of(self.name, self.layer):
            if pair.adapter == self.adapter:
                return pair
        return self  # the adapter is gone

    @property
    def scaling(self) -> float | Tensor:
        """Scaling as the layer has it now: it may change while training."""
        scaling = self.layer.scaling
        return scaling if self.adapter is None else scaling[self.adapter]


def find_pairs(model: nn.Module, adapter: str | None = None) -> list[AdapterPair]:
    """Find every pair whose lora_B is trained, in the order of `model.named_modules()`.

    Args: model, holding layers of peftkern (lora_A and lora_B are parameters) or PEFT's LoRA layers
        (dictionaries of linear layers, by adapter); adapter, to take PEFT's adapter of that name
        alone. Convolutions, embeddings and AdaLoRA's triplets are no such pairs.
    Raises: TypeError unless model is a module; ValueError if it holds no pair, or, naming it, if
        FSDP1 or DeepSpeed's ZeRO-3 holds a factor in pieces.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    pairs = [
        pair
        for name, layer in model.named_modules()
        for pair in _pairs_of(name, layer)
        if pair.lora_B.requires_grad and adapter in (None, pair.adapter)
    ]
    if not pairs:
        which = "" if adapter is None else f" of the adapter {adapter!r}"
        raise ValueError(f"model: expected layers with a trained lora_B{which}, found none")
    factors = [factor for pair in pairs for factor in pair.factors]
    check_readable(factors, "a method of pairs of factors", model)
    return pairs


def _pairs_of(name: str, layer: nn.Module) -> Iterator[AdapterPair]:
    A, B = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
    if A is None or B is None or hasattr(layer, "lora_E") or not hasattr(layer, "scaling"):
        return
    if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
        yield AdapterPair(name, layer, None, A, B)
    elif isinstance(A, nn.ModuleDict) and isinstance(B, nn.ModuleDict):
        for adapter in A:
            weights = [getattr(m[adapter], "weight", None) for m in (A, B) if adapter in m]
            if len(weights) == 2 and all(map(_is_matrix, weights)):
                yield AdapterPair(name, layer, adapter, *weights)


def _is_matrix(weight: Tensor | None) -> bool:
    return weight is not None and (weight.dim() == 2 or in_pieces(weight))


def check_counts(**lists: Sequence[Any]) -> None:
    """Raise ValueError unless the lists, given by their names, are of one length."""
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{', '.join(counts)}: expected one of each for every layer, got {got}")


def check_scaling(values: Sequence[float | Tensor], names: Iterable[Any] | None = None) -> None:
    """Raise ValueError naming a layer whose scaling is 0; a tensor is not read on the host."""
    for value, name in zip(values, itertools.count() if names is None else names, strict=False):
        if not isinstance(value, Tensor) and value == 0:
            raise ValueError(f"scaling of layer {name}: expected a number other than 0, got 0")


def scalings(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Return the scalings [L, 1, 1] in float64 on the device of `like`.

    Made there by fills: a list that is copied to a GPU makes the host wait for it.
    """
    options = {"dtype": torch.float64, "device": like.device}
    if any(isinstance(v, Tensor) for v in values):
        parts = [
            v.to(**options) if isinstance(v, Tensor) else torch.full((), v, **options)
            for v in values
        ]
        return torch.stack([part.view(1, 1) for part in parts])
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    return torch.cat([torch.full((count, 1, 1), value, **options) for value, count in runs])


def check_unshared(pairs: Sequence[AdapterPair], factors: Sequence[str]) -> None:
    """Raise ValueError if two pairs have one of these factors in common."""
    seen: dict[Tensor, str] = {}
    for pair in pairs:
        for factor in (getattr(pair, name) for name in factors):
            if factor in seen:
                raise ValueError(
                    f"model: {seen[factor]} and {pair.name} share a factor; the gradient of a "
                    "shared factor belongs to no single weight"
                )
            seen[factor] = pair.name


def chunks(*columns: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield indices to stack: each column's tensors agree in shape, dtype and device.

    What is stacked at once is bounded, so that the copies stay small next to the model.
    """
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        groups.setdefault(tuple((t.shape, t.dtype, t.device) for t in row), []).append(i)
    for key, indices in groups.items():
        size = max(1, _CHUNK // max(1, sum(shape.numel() for shape, _, _ in key)))
        yield from (indices[i : i + size] for i in range(0, len(indices), size))


def stacked(tensors: Sequence[Tensor], indices: Iterable[int]) -> Tensor:
    """Stack the tensors of these indices, [L, ...] in float64."""
    return torch.stack([tensors[i].detach() for i in indices]).double()


def eigenvalue_cutoff(r: int, dtype: torch.dtype) -> float:
    """Return the share of a Gram matrix's largest eigenvalue below which there is only noise.

    The factor's own rounding, eps of its dtype, enters the eigenvalues squared; float64 sums of the
    Gram matrix leave 1e-15.
    """
    return r * max(torch.finfo(dtype).eps ** 2, 1e-15)


def symmetric_eigen(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose into eigenvalues [L, r] and vectors [L, r, r]; NaN for a matrix with NaN or Inf."""
    wrong = ~torch.isfinite(grams).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(wrong[:, None, None], 0.0, grams))
    return torch.where(wrong[:, None], torch.nan, values), vectors


def cut_reciprocal(values: Tensor, cutoff: float) -> Tensor:
    """Return 1 / values [L, r], 0 where a value is at most `cutoff` times its row's largest."""
    least = cutoff * values.amax(-1, keepdim=True).clamp(min=0.0)
    return torch.where(values <= least, 0.0, 1.0 / values)


def current_pairs(pairs: Sequence[AdapterPair]) -> Sequence[AdapterPair]:
    """Return pairs as their layers have them now: FSDP2 puts parameters of its own in place.

    Without a process group, which FSDP2 needs, nobody does, and no step looks through all layers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return pairs
    return [pair.renewed() for pair in pairs]


class PairAdamW(torch.optim.Optimizer):
    """AdamW (as `torch.optim.AdamW`) on gradients that a subclass replaces, pair by pair.

    Args: model, whose pairs are found by `find_pairs`; params, parameters or groups of them as any
        torch optimizer takes them, all trained parameters of the model by default; adapter as in
        `find_pairs`. A parameter of no pair has plain AdamW. `.grad` is read and never written.
    State: step, exp_avg and exp_avg_sq of each parameter. Gradients pass through linearly, so
        whatever a GradScaler or clipping does before the step holds.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        adapter: str | None,
        defaults: dict[str, Any],
    ) -> None:
        lr, betas = defaults["lr"], defaults["betas"]
        for name in ("lr", "eps", "weight_decay"):
            if not defaults[name] >= 0.0:
                raise ValueError(f"{name}: expected a number of at least 0, got {defaults[name]}")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr: expected a number or one element, got {list(lr.shape)}")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        self._pairs = find_pairs(model, adapter)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, defaults)
        self._trains_pairs = self._holds_pairs()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_pairs": self._pairs, "_trains_pairs": self._trains_pairs}
        return {**super().__getstate__(), **own}

    def _holds_pairs(self) -> bool:
        params = {p for group in self.param_groups for p in group["params"]}
        return any(pair.lora_B in params for pair in self._pairs)

    def _check_pairs(self) -> None:
        """Raise RuntimeError if this optimizer has other parameters than the model has now."""
        if self._trains_pairs and not self._holds_pairs():
            raise RuntimeError(
                f"{type(self).__name__}: the model has other parameters now than this optimizer "
                f"({self._pairs[0].name}.lora_B among them): make it after fully_shard; DeepSpeed, "
                "which gives an optimizer flat parameters, is not for it"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, on the gradients that a closure leaves if given; return its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pairs = current_pairs(self._pairs)
        grads = {p: p.grad for g in self.param_groups for p in g["params"] if p.grad is not None}
        self._replace(grads)
        self._check_pairs()
        for group in self.param_groups:
            params = [p for p in group["params"] if p in grads]
            for sharded in (False, True):  # no operation takes both
                some = [p for p in params if is_sharded(p) is sharded]
                if some:
                    self._update(group, some, grads)
        return loss

    def _replace(self, grads: dict[Tensor, Tensor]) -> None:
        """Replace the gradients of pairs in `grads` by those to follow."""
        raise NotImplementedError

    def _moments(self, p: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)  # not the default dtype
            if is_sharded(p):
                state["exp_avg"] = torch.zeros_like(p.detach())
            else:
                state["exp_avg"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        return state

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: dict[Tensor, Tensor]
    ) -> None:
        states = [self._moments(p, p.shape) for p in params]
        adamw(
            params,
            [grads[p] for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
