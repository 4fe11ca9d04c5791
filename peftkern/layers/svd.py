"""AdaLoRA's layer for plain torch: a low-rank update in the form of a singular value decomposition.

Users find it as `peftkern.layers.SVDLinear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern.layers.base import (
    check_update,
    dropout_p,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.frozen_base import OverFrozenBase

__all__ = ["SVDLinear"]


def fold_diagonal(lora_A: Tensor, lora_E: Tensor, scaling: float | Tensor) -> Tensor:
    """Return scaling * (lora_A * lora_E), [r, K]: it costs r x K products, not M x r.

    16-bit factors are multiplied in float32, which the layer's products take as it is.
    """
    diagonal = lora_E * scaling
    if lora_A.dtype in (torch.float32, torch.float64):
        return lora_A * diagonal
    return lora_A.float() * diagonal.float()


class SVDLinear(OverFrozenBase):
    """Frozen linear layer plus lora_B @ diag(lora_E) @ lora_A, whose triplets can be pruned.

    y = base(x) + lora_alpha / (ranknum + 1e-5) * (dropout(x) @ (lora_A * lora_E).T) @ lora_B.T

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r: rank at first. lora_alpha: as PEFT has it, r in its place if it is not positive.
        lora_dropout: on the input of the update, in training only.
        adapter_dtype: of lora_A [r, K], lora_E [r, 1] and lora_B [N, r].

    lora_A and lora_B start normal with standard deviation 0.02, lora_E at zero. `ranknum` is r and
    stays so when triplets are pruned or dropped: the update of the others does not change. A state
    dict of fewer or more triplets loads: the layer takes its rank; make the optimizer afterwards.
    Source: Zhang et al. 2023, eq. 3, arXiv:2303.10512
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        r = check_update(r, lora_alpha, lora_dropout)
        super().__init__(base)
        self.lora_alpha = lora_alpha if lora_alpha > 0 else float(r)
        self.lora_dropout = lora_dropout
        factory = {"dtype": adapter_dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_E = nn.Parameter(torch.empty(r, 1, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.register_buffer("ranknum", torch.tensor(float(r), device=base.weight.device))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Start the update at zero, with random singular vectors."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_B, std=0.02)

    @property
    def r(self) -> int:
        """Number of triplets, pruned ones included until they are dropped."""
        return self.lora_E.shape[0]

    @property
    def scaling(self) -> Tensor:
        """Factor of the update: lora_alpha / (ranknum + 1e-5), on the layer's device."""
        return self.lora_alpha / (self.ranknum.float() + 1e-5)

    def _forward(self, x: Tensor) -> Tensor:
        lora_A = fold_diagonal(self.lora_A, self.lora_E, self.scaling)
        options = {"scaling": 1.0, "dropout_p": dropout_p(self)}
        return low_rank_forward(self.base, x, lora_A, self.lora_B, **options)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, without the update's cost."""
        with torch.no_grad():
            lora_A = fold_diagonal(self.lora_A, self.lora_E, self.scaling)
            return merged(self.base, low_rank_update(lora_A, self.lora_B, 1.0))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        lora_E = state_dict.get(f"{prefix}lora_E")
        if lora_E is not None and lora_E.dim() == 2 and lora_E.shape[0] != self.r:
            r = lora_E.shape[0]
            for parameter in (self.lora_A, self.lora_E, self.lora_B):
                parameter.grad = None  # it has the old shape
            self.lora_A.data = self.lora_A.data.new_empty(r, self.in_features)
            self.lora_E.data = self.lora_E.data.new_empty(r, 1)
            self.lora_B.data = self.lora_B.data.new_empty(self.out_features, r)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}"
