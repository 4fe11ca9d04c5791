"""DyLoRA: one training run, a usable adapter of every rank up to r.

    layer = DyLoRALinear(linear, r=16)       # in place of the model's linear layers
    for batch in data:
        sample_rank(model)                   # outside of forward: checkpointing runs forward twice
        loss(model(batch)).backward()
        optimizer.step(); optimizer.zero_grad()
    set_rank(model, 4)                       # or truncate, or merge

Every rank is a row of A and a column of B of its own, and a parameter of its own: those that a step
does not use have no gradient at all, so that any optimizer leaves them, their momentum and their
weight decay alone, bit for bit. (One padded gradient would let Adam's momentum move them, and so
do zeros that `zero_grad(set_to_none=False)` leaves in place of no gradient.) torch.compile makes a
graph for each rank that it meets: raise `torch._dynamo.config.recompile_limit` above r. Under DDP
that takes `find_unused_parameters=True`. Where several processes train, the rank that the first one
draws is everybody's: each of them has to call `sample_rank`. FSDP1 and DeepSpeed, whose flat
parameters have gradients for all of their parts, are refused by it.

The paper scales rank b by lora_alpha / b. Rows that all ranks share then count less in the larger
ones, and no values of them suit two ranks: fitting a known update of rank 4, one run stays at 1.1
to 3 times the distance that a run for each rank reaches. Scaled by lora_alpha / r whatever the
rank, it comes within 3% of the best that ranks 1 to 3 can do, and that is the default:
bench/studies/dylora_ranks.py prints both.

Source: Valipour et al. 2023, algorithm 1, arXiv:2210.07558
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftkern.functional.arguments import integer
from peftkern.layers import LoRALinear, NF4LoRALinear
from peftkern.layers.base import (
    check_update,
    dropout_p,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.frozen_base import OverFrozenBase
from peftkern.methods.processes import check_not_flat, check_unheld, of_first

__all__ = ["DyLoRALinear", "sample_rank", "set_rank"]


class DyLoRALinear(OverFrozenBase):
    """Frozen linear layer plus an update of which the first b of r ranks are used.

    y = base(x) + scaling * (dropout(x) @ A[:b].T) @ B[:, :b].T

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r: the largest rank. lora_alpha, lora_dropout: as in LoRA.
        scale_by_rank: scaling = lora_alpha / b as in the paper; else lora_alpha / r, see above.
        adapter_dtype: of lora_A, r rows [K], and lora_B, r columns [N].

    `rank` (b) is r at first; `set_rank` and `sample_rank` set it in a whole model. With
    `train_last_only`, DyLoRA's "frozen" mode, only row and column b get a gradient. The cost of a
    call falls with b.
    Source: Valipour et al. 2023, arXiv:2210.07558
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        scale_by_rank: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        r = check_update(r, lora_alpha, lora_dropout)
        self.lora_alpha, self.lora_dropout = lora_alpha, lora_dropout
        self.scale_by_rank = scale_by_rank
        factory = {"dtype": adapter_dtype, "device": base.weight.device}
        self.lora_A = nn.ParameterList(torch.empty(self.in_features, **factory) for _ in range(r))
        self.lora_B = nn.ParameterList(torch.empty(self.out_features, **factory) for _ in range(r))
        self.rank, self.train_last_only = r, False
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A as LoRA does and zero B: the update starts at zero."""
        bound = 1 / math.sqrt(self.in_features)
        for row, column in zip(self.lora_A, self.lora_B, strict=True):
            nn.init.uniform_(row, -bound, bound)
            nn.init.zeros_(column)

    @property
    def r(self) -> int:
        """Largest rank."""
        return len(self.lora_A)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.rank if self.scale_by_rank else self.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [b, K] and B [N, b] of the rank in use."""
        rows, columns = list(self.lora_A)[: self.rank], list(self.lora_B)[: self.rank]
        if self.train_last_only:
            rows[:-1] = [row.detach() for row in rows[:-1]]
            columns[:-1] = [column.detach() for column in columns[:-1]]
        return torch.stack(rows), torch.stack(columns, dim=1)

    def _forward(self, x: Tensor) -> Tensor:
        options = {"dropout_p": dropout_p(self)}
        return low_rank_forward(self.base, x, *self.factors(), scaling=self.scaling, **options)

    def truncate(self) -> LoRALinear | NF4LoRALinear:
        """Make a LoRA layer over the same base with the rank in use; the adapter is copied."""
        nf4 = hasattr(type(self.base), "nf4")
        layer = (NF4LoRALinear if nf4 else LoRALinear).from_linear(
            self.base,
            r=self.rank,
            lora_alpha=self.scaling * self.rank,
            lora_dropout=self.lora_dropout,
            adapter_dtype=self.lora_A[0].dtype,
        )
        with torch.no_grad():
            for parameter, factor in zip((layer.lora_A, layer.lora_B), self.factors(), strict=True):
                parameter.copy_(factor)
        return layer.train(self.training)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same at the rank in use."""
        with torch.no_grad():
            A, B = self.factors()
            return merged(self.base, low_rank_update(A, B, self.scaling))

    def extra_repr(self) -> str:
        last = ", train_last_only=True" if self.train_last_only else ""
        return f"rank={self.rank} of {self.r}, lora_alpha={self.lora_alpha:g}{last}"


def set_rank(model: nn.Module, rank: int, *, train_last_only: bool = False) -> None:
    """Use the first `rank` ranks in every DyLoRALinear of a model (its own r where that is less).

    Args: train_last_only: DyLoRA's "frozen" mode, in which the ranks before the last stay as they
        are.
    Raises: ValueError if the model has no such layer, FSDP1 or DeepSpeed holds theirs in flat
        parameters, or the rank is not in 1 to the largest r.
    """
    layers = _layers(model)
    largest = max(layer.r for layer in layers)
    rank = integer("rank", rank, 1, largest)
    for layer in layers:
        layer.rank, layer.train_last_only = min(rank, layer.r), train_last_only


def sample_rank(
    model: nn.Module,
    *,
    train_last_only: bool = False,
    generator: torch.Generator | None = None,
) -> int:
    """Draw a rank for the next step, uniform in 1 to the largest r, and `set_rank` it.

    Args: generator: of the CPU; None takes torch's own.
    Returns: the rank; of several processes, the one that the first has drawn.
    """
    layers = _layers(model)
    largest = max(layer.r for layer in layers)
    rank = int(torch.randint(1, largest + 1, (1,), generator=generator))
    rank = of_first(rank, layers[0].lora_A[0].device)
    set_rank(model, rank, train_last_only=train_last_only)
    return rank


def _layers(model: nn.Module) -> list[DyLoRALinear]:
    layers = [module for module in model.modules() if isinstance(module, DyLoRALinear)]
    if not layers:
        raise ValueError("model: expected at least one DyLoRALinear, found none")
    row = layers[0].lora_A[0]
    check_not_flat("lora_A", row, "DyLoRA")
    check_unheld("lora_A", row, "those of ranks that a step does not use among them")
    return layers
