"""DoRA and QDoRA: a low-rank update that turns the rows of a weight, and a trained length of each.

    layer = DoRALinear(linear, r=16)         # in place of the model's linear layers

The layer of plain torch; `peftkern.patch` does the same for PEFT's LoraConfig(use_dora=True).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkern.functional import dequantize
from peftkern.functional.dora import dora_linear, dora_norm
from peftkern.layers.base import (
    LowRankFactors,
    base_weight,
    check_strided,
    check_update,
    dropout_p,
    linear_like,
)
from peftkern.layers.frozen_base import OverFrozenBase

__all__ = ["DoRALinear"]


class DoRALinear(LowRankFactors, OverFrozenBase):
    """Frozen linear layer whose rows keep a trained length while a low-rank update turns them.

    y = x @ (c * (weight + scaling * lora_B @ lora_A)).T + bias, by rows
    c = magnitude / |weight + scaling * lora_B @ lora_A|, the norm a constant to the gradient

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r: rank. lora_alpha: scaling = lora_alpha / r.
        lora_dropout: on the input of what training changes, in training only: see `dora_linear`.
        recompute: memory against time in the gradient of magnitude, see `dora_linear`.
        adapter_dtype: of lora_A [r, K], lora_B [N, r] and magnitude [N].

    lora_A starts as in LoRA, lora_B at zero and magnitude at the norms of the weight's rows: the
    layer starts as `base`. In `merge`, c goes into the weight. A row of zeros has no direction that
    could be kept: c is 0 / 0, and what comes out is not a number, here as in PEFT.
    State dict: that of `base` below `base.`, `lora_A`, `lora_B`, `magnitude`.
    Source: Liu et al. 2024, arXiv:2402.09353
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        recompute: bool | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        r = check_update(r, lora_alpha, lora_dropout)
        super().__init__(base)
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout, self.recompute = lora_dropout, recompute
        self._add_factors(r, adapter_dtype, base.weight.device)
        self.magnitude = nn.Parameter(self.lora_B.new_empty(self.out_features))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Start again, as a layer that computes what `base` does."""
        super().reset_lora_parameters()
        with torch.no_grad():
            self.magnitude.copy_(self.norm())

    def norm(self) -> Tensor:
        """Return the norm of each row of the updated weight, [N]."""
        return dora_norm(base_weight(self.base), self.lora_A, self.lora_B, scaling=self.scaling)

    def _forward(self, x: Tensor) -> Tensor:
        check_strided(x)
        return dora_linear(
            x,
            base_weight(self.base),
            self.lora_A,
            self.lora_B,
            self.magnitude,
            scaling=self.scaling,
            bias=self.base.bias,
            dropout_p=dropout_p(self),
            recompute=self.recompute,
        )

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, without the update's cost."""
        base, weight = self.base, base_weight(self.base)
        with torch.no_grad():
            norm = self.norm()
            dense = weight if isinstance(weight, Tensor) else dequantize(weight)
            update = self.scaling * (self.lora_B.to(norm.dtype) @ self.lora_A.to(norm.dtype))
            merged = (dense.to(norm.dtype) + update) * (self.magnitude / norm)[:, None]
        return linear_like(base, merged.to(dense.dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
