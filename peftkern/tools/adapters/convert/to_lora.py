"""Plain LoRA from an adapter whose base was changed, and from DoRA.

    changed base   s B A - s0 B0 A0 = [B | -B0] [A; A0]: exact, of rank 2r   (with the adapter as
                   its initialization made it), but for LoftQ: its base was rounded to 4 bits, too,
                   which the result leaves out
    DoRA           D = c (W + s B A) - W, c = magnitude / |W + s B A|: the rows of W come in, so D
                   has full rank; the best rank-k part is kept                (with the base)

AdaLoRA needs nothing: an update holds lora_E in lora_A, and only the triplets that are left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftkern.methods.low_rank_algebra import best_pair, dora_weight
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update, changed_base
from peftkern.tools.adapters.convert.base import base_table

# Fields of what made the factors, or the base, another one; the update itself is plain.
_METHODS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without DoRA and without an initialization that PEFT would repeat."""
    unset = {key: None for key in _METHODS if key in config}
    return {**config, **unset, "use_dora": False, "init_lora_weights": True}


def subtract_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """Return [B | -B0] and [A; A0] of updates whose scaling is 1: what training has added.

    Raises: AdapterError if the two have other modules or sizes.
    """
    if adapter.updates.keys() != initial.updates.keys():
        one = min(adapter.updates.keys() ^ initial.updates.keys())
        raise AdapterError(
            f"{initial.source}: expected updates of the same modules as {adapter.source}, "
            f"one alone has {one}"
        )
    updates = []
    for key, update in adapter.updates.items():
        other = initial.updates[key]
        shapes = [(u.kind, u.size, u.shape[1:], u.lora_A.shape[:-2]) for u in (update, other)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"{initial.source}: {key}: expected {update.kind} of {list(update.size)}, "
                f"got {other.kind} of {list(other.size)}"
            )
        if update.bias is not None or other.bias is not None:
            raise AdapterError(f"{adapter.source}: {key}: lora_B.bias beside --initial")
        if base_table(update) in adapter.extras:
            raise AdapterError(
                f"{adapter.source}: {base_table(update)}: is of the changed base, and would "
                "replace the original's"
            )
        lora_A = torch.cat([update.lora_A, other.lora_A], dim=-2)
        lora_B = torch.cat([update.lora_B, -other.lora_B], dim=-1)
        updates.append(update.with_factors(lora_A, lora_B))
    config = {**adapter.config, "base_model_name_or_path": None}  # it was that of the changed one
    return dataclasses.replace(adapter, config=config).with_updates(updates)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the truncation of one module left out: |D - D'| and |D|, and the rank kept."""

    rank: int
    lost: float
    norm: float

    @property
    def relative(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


def undo_dora(
    adapter: Adapter, weight_of: Callable[[Update], Tensor], rank: int | None
) -> tuple[Adapter, dict[str, Loss]]:
    """Return the best update of a rank in place of each DoRA update of scaling 1, and its loss.

    weight_of: reads the base's weight of an update, one at a time.
    rank: of each update; None for its own.
    """
    updates, losses = [], {}
    for key, update in adapter.updates.items():
        if update.magnitude is None:
            updates.append(update)
            continue
        plain, losses[key] = _truncate(update, weight_of(update), rank)
        updates.append(plain)
    return adapter.with_updates(updates), losses


def _truncate(update: Update, weight: Tensor, rank: int | None) -> tuple[Update, Loss]:
    product = update.lora_B.float() @ update.lora_A.float()
    merged = dora_weight(weight, product, update.magnitude)
    (lora_B, lora_A), S, norm = best_pair(merged, rank or update.rank, minus=weight)
    lost = math.sqrt(max(norm**2 - S.double().square().sum().item(), 0.0))
    return update.with_factors(lora_A, lora_B, magnitude=None), Loss(len(S), lost, norm)


def check_lora(adapter: Adapter, *, initial: bool, base: bool) -> None:
    """Raise AdapterError for what the request lacks, or has in vain, to make plain LoRA of it."""
    method = changed_base(adapter.config)
    dora = next((key for key, one in adapter.updates.items() if one.magnitude is not None), None)
    if method and not initial:
        raise AdapterError(
            f"{adapter.source}: init_lora_weights: {method} changed the base: expected --initial, "
            "the adapter as it was before training"
        )
    if dora and initial:
        raise AdapterError(f"{adapter.source}: {dora}: DoRA beside --initial is no plain LoRA")
    if dora and not base:
        raise AdapterError(
            f"{adapter.source}: {dora}: DoRA, which plain LoRA only approximates: expected --base"
        )
