"""RoSA: a frozen layer plus a low-rank and a sparse update, both trained.

    layer = RoSALinear(linear, r=8, density=0.01)    # in place of the model's linear layers
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    schedule = RoSAScheduler(model, warmup_steps=64)
    for batch in data:
        loss(model(batch)).backward()
        optimizer.step(); schedule.step(); optimizer.zero_grad()

A layer is LoRA until its mask is drawn: after the warm-up, the places where the gradient of its
weight was largest. The parameter `values` is there from the start, with a slot for each of the nnz
places and no gradient until then, so that an optimizer made at the start has it and leaves it alone
(AdamW then starts its moments and its count of steps with the mask). DDP needs
`find_unused_parameters=True` during the warm-up. Where several processes train, a mask is drawn
from what all of them have collected, each of its own batches, and is the same everywhere.

The gradient dW = dy.T @ x [N, K] of a layer is never there as a whole. While gradients are
collected, it is made in blocks of rows in the backward pass of its layer, and of each block only
those entries are kept that can still be among the largest. `TopGradients` says what is exact.

Source: Nikdan et al. 2024, arXiv:2401.04679
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.functional.arguments import integer, number
from peftkern.functional.rosa import SparseMask, rosa_linear
from peftkern.layers.base import (
    LowRankFactors,
    base_weight,
    check_strided,
    check_update,
    dropout_p,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.frozen_base import OverFrozenBase
from peftkern.methods.processes import any_of, check_readable, check_unheld, several, sums_of_all
from peftkern.methods.top_gradients import TopGradients

__all__ = ["RoSALinear", "RoSAScheduler", "density_report"]
IMPORTANCES = {"squared": 2, "absolute": 1}
_DERIVED = ("ccol", "row", "order")  # of a mask; not in the state dict


class RoSALinear(LowRankFactors, OverFrozenBase):
    """Frozen linear layer plus a low-rank and a sparse update.

    y = base(x) + x @ S.T + lora_alpha / r * (dropout(x) @ lora_A.T) @ lora_B.T

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r, lora_alpha, lora_dropout: as in LoRA; the sparse update has no dropout.
        density: the share of the weight's places that S has, at least one; or nnz, their number.
        adapter_dtype: of lora_A [r, K] and lora_B [N, r]. values [nnz] are float32 (float64 for
            float64).

    State dict: `base.*`, `lora_A`, `lora_B`, `values`, and the mask as `crow` [N + 1] and `col`
    [nnz], which are all zero before it is drawn.
    Raises: TypeError or ValueError naming the argument.
    Source: Nikdan et al. 2024, arXiv:2401.04679
    """

    crow: Tensor
    col: Tensor

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        density: float | None = None,
        nnz: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        r = check_update(r, lora_alpha, lora_dropout)
        N, K = self.out_features, self.in_features
        nnz = _check_nnz(density, nnz, N * K)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / r
        device = base.weight.device
        self._add_factors(r, adapter_dtype, device)
        wide = torch.promote_types(adapter_dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(nnz, dtype=wide, device=device))
        integers = {
            "dtype": torch.int32 if max(N, K, nnz) < 2**31 else torch.int64,
            "device": device,
        }
        self.register_buffer("crow", torch.zeros(N + 1, **integers))
        self.register_buffer("col", torch.zeros(nnz, **integers))
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)
        self.collected: TopGradients | None = None  # where backward passes leave gradients
        self.reset_lora_parameters()

    def reset_mask(self) -> None:
        """Forget the mask and its values: LoRA again. What an optimizer keeps of them stays."""
        with torch.no_grad():
            self.values.zero_()
        self.values.grad = None
        self.crow.zero_()
        self.col.zero_()
        for name in _DERIVED:
            setattr(self, name, None)

    @property
    def nnz(self) -> int:
        return len(self.col)

    @property
    def drawn(self) -> bool:
        """True once the sparse update has its places."""
        return self.order is not None

    @property
    def mask(self) -> SparseMask | None:
        """Places of the sparse update; None before they are drawn."""
        if not self.drawn:
            return None
        shape = (self.out_features, self.in_features)
        return SparseMask(shape, self.crow, self.col, self.ccol, self.row, self.order)

    def set_mask(self, mask: SparseMask) -> None:
        """Give the sparse update its places; its values start at zero.

        Raises: ValueError on another shape or number of places, or if there is a mask already.
        """
        shape = (self.out_features, self.in_features)
        if mask.shape != shape or mask.nnz != self.nnz:
            raise ValueError(
                f"mask: expected {self.nnz} places in {list(shape)}, got {mask.nnz} in "
                f"{list(mask.shape)}"
            )
        if self.drawn:
            raise ValueError("mask: this layer has one already; call reset_mask() first")
        with torch.no_grad():
            self.values.zero_()
        self._take(mask)

    def _take(self, mask: SparseMask) -> None:
        self.crow.copy_(mask.crow)
        self.col.copy_(mask.col)
        for name in _DERIVED:
            setattr(self, name, getattr(mask, name).to(self.col))

    def _forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"scaling": self.scaling, "dropout_p": dropout_p(self)}
        mask = self.mask
        if mask is None:
            y = low_rank_forward(self.base, x, self.lora_A, self.lora_B, **options)
        else:
            check_strided(x)
            adapter = (self.lora_A, self.lora_B, self.values, mask)
            y = rosa_linear(x, base_weight(self.base), *adapter, bias=self.bias, **options)
        if self.collected is not None and y.requires_grad:
            y = self._collect(y, x)
        return y

    @torch.compiler.disable
    def _collect(self, y: Tensor, x: Tensor) -> Tensor:
        return _Collect.apply(y, x.detach(), self.collected)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, in the dtype the weight had."""
        with torch.no_grad():
            update = low_rank_update(self.lora_A, self.lora_B, self.scaling)
            mask = self.mask
            if mask is not None:
                update.view(-1)[mask.flat()] += self.values
            return merged(self.base, update)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        crow, col = (state_dict.get(prefix + name) for name in ("crow", "col"))
        mask, shape = None, (self.out_features, self.in_features)
        if crow is not None and col is not None and col.shape == self.col.shape and crow.any():
            try:
                mask = SparseMask.from_csr(crow, col, shape)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
                return
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        count = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if crow is not None and len(error_msgs) == count:
            for name in _DERIVED:
                part = None if mask is None else getattr(mask, name)
                setattr(self, name, None if part is None else part.to(self.col))

    def extra_repr(self) -> str:
        share = self.nnz / (self.out_features * self.in_features)
        return (
            f"r={self.r}, scaling={self.scaling:g}, nnz={self.nnz}, density={share:.3g}, "
            f"drawn={self.drawn}"
        )


class _Collect(torch.autograd.Function):
    """Copy of y; its gradient goes to `collected`, with an x that checkpointing may drop."""

    @staticmethod
    def forward(ctx, y, x, collected):
        ctx.save_for_backward(x)
        ctx.collected = collected
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.collected.add(dy, *ctx.saved_tensors)
        return dy, None, None


class RoSAScheduler:
    """Schedule that draws the masks of a model's RoSALinear layers after a warm-up as LoRA.

    Call `step()` after each optimizer step. Collecting costs the product dW, T N K multiply-adds a
    layer and pass; outside of the last `collect_steps` steps of the warm-up nothing is collected.

    Args:
        warmup_steps: at least 1. collect_steps: of them, how many count.
        candidates: how many times nnz entries are kept for that. The mask of one backward pass is
            exact; that of several, steps or the passes that add up to one, is not always.
        importance: "squared" or "absolute": what is summed of dW over the passes, its squares or
            its sizes, never the size of the sum, in which gradients of both signs cancel.
            `TopGradients` says more of this.

    A step in which a gradient had nothing finite, as those that GradScaler skips, does not count:
    the warm-up lasts one more for each of them. A layer that has a mask already keeps it. Where
    torch.compile is used, collecting breaks the graph at each layer for those steps.
    Raises: ValueError on a value that makes no sense, or if there is no such layer; from `step()`,
        naming the layer, if no gradient of it was collected; from both if FSDP1 or DeepSpeed holds
        a layer that has no mask in flat parameters.
    Source: Nikdan et al. 2024, algorithm 1, arXiv:2401.04679
    """

    def __init__(
        self,
        model: nn.Module,
        warmup_steps: int,
        *,
        collect_steps: int = 1,
        candidates: int = 4,
        importance: str = "squared",
    ) -> None:
        self.layers = _layers(model)
        for name, layer in self.layers.items():
            check_readable([(f"{name}.lora_B", layer.lora_B)], "RoSAScheduler", model)
        warmup_steps = integer("warmup_steps", warmup_steps, 1)
        collect_steps = integer("collect_steps", collect_steps, 1, warmup_steps)
        candidates = integer("candidates", candidates, 1)
        if importance not in IMPORTANCES:
            raise ValueError(f"importance: expected one of {list(IMPORTANCES)}, got {importance!r}")
        self.warmup_steps, self.collect_steps = warmup_steps, collect_steps
        self.candidates, self.importance = candidates, importance
        self.last_step, self.lost_steps = 0, 0
        self._advance()

    def step(self) -> None:
        self.last_step += 1
        tops = [layer.collected for layer in self.layers.values() if layer.collected is not None]
        if tops:
            lost = [top.take_lost() for top in tops]
            self.lost_steps += any_of(any(lost), self._device)
        self._advance()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).col.device

    @property
    def _draws_at(self) -> int:
        return self.warmup_steps + self.lost_steps

    def _advance(self) -> None:
        waiting = {name: layer for name, layer in self.layers.items() if not layer.drawn}
        for name, layer in waiting.items():
            check_unheld(f"{name}.lora_B", layer.lora_B, "values without a mask among them")
        if self.last_step >= self._draws_at:
            masks = {name: self._mask(name, layer) for name, layer in waiting.items()}
            for name, mask in masks.items():  # all or none
                self.layers[name].set_mask(mask)
                self.layers[name].collected = None
        elif self.last_step >= self.warmup_steps - self.collect_steps:
            for layer in waiting.values():
                layer.collected = layer.collected or self._collector(layer)

    def _collector(self, layer: RoSALinear) -> TopGradients:
        shape = (layer.out_features, layer.in_features)
        capacity = min(self.candidates * layer.nnz, shape[0] * shape[1])
        return TopGradients(shape, capacity, IMPORTANCES[self.importance])

    def _mask(self, name: str, layer: RoSALinear) -> SparseMask:
        collected = layer.collected or self._collector(layer)
        if several():
            sums = sums_of_all(collected.index.to(self._device), collected.score.to(self._device))
            collected = self._collector(layer)
            collected.index, collected.score = sums
        try:
            return collected.mask(layer.nnz)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands and what was collected; masks are in the layers' own state."""
        collecting = {n: m.collected for n, m in self.layers.items() if m.collected is not None}
        return {
            "last_step": self.last_step,
            "lost_steps": self.lost_steps,
            "collected": {
                name: (top.index, top.score, top.begun) for name, top in collecting.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = set(state["collected"]) - set(self.layers)
        if unknown:
            raise ValueError(f"collected: this model has no layers {sorted(unknown)}")
        self.last_step, self.lost_steps = state["last_step"], state["lost_steps"]
        for name, layer in self.layers.items():
            layer.collected = None
            if name in state["collected"]:
                top = layer.collected = self._collector(layer)
                top.index, top.score, top.begun = state["collected"][name]
        if self.last_step < self._draws_at:
            self._advance()


@dataclass(frozen=True)
class Density:
    """Places of one layer's sparse update and of its weight, and whether the mask is drawn."""

    nnz: int
    numel: int
    drawn: bool

    @property
    def density(self) -> float:
        return self.nnz / self.numel


def density_report(model: nn.Module) -> dict[str, Density]:
    """Return the density of every RoSALinear of a model, by name.

    Raises: ValueError if there is none.
    """
    return {
        name: Density(layer.nnz, layer.out_features * layer.in_features, layer.drawn)
        for name, layer in _layers(model).items()
    }


def _layers(model: nn.Module) -> dict[str, RoSALinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoSALinear)}
    if not layers:
        raise ValueError("model: expected at least one RoSALinear, found none")
    return layers


def _check_nnz(density: float | None, nnz: int | None, numel: int) -> int:
    """Return the number of places: nnz, or that share of `numel`; 1% by default."""
    if density is not None and nnz is not None:
        raise ValueError("density, nnz: expected one of them, got both")
    if nnz is None:
        density = 0.01 if density is None else density
        if not 0.0 < number("density", density) <= 1.0:
            raise ValueError(f"density: expected a share in (0, 1], got {density}")
        nnz = max(1, round(float(density) * numel))
    return integer("nnz", nnz, 1, numel)
