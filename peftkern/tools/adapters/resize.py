"""Resizing of an adapter: every update cut to the rank that a rule chooses, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.methods.low_rank_algebra import Loss, truncate
from peftkern.methods.rank_rules import RankRule
from peftkern.tools.adapters.adapter import (
    Adapter,
    AdapterError,
    Update,
    base_made_with,
    changed_base,
)

Losses = dict[str, Loss]


def resize(
    adapter: Adapter,
    rule: RankRule,
    *,
    itemsize: int = 4,
    progress: Callable[[int], None] = lambda updates: None,
) -> tuple[Adapter, Losses]:
    """Cut every update to the rank that a rule chooses, with the least error there is.

    The experts of one parameter keep one rank. Scaling is folded into the factors; a bias of lora_B
    takes it, too. All else of the adapter stays; of DoRA the magnitudes, while the norm that they
    are divided by follows the new update.

    Args: itemsize: bytes of a value as it will be written, for budget_bytes; progress: called with
        the number of updates that were finished.
    Returns: the adapter, factors in float32 with a scaling of 1, and the loss of each update.
    Raises: AdapterError for factors that are not finite, for a rule that no rank fits, and for an
        adapter of a changed base, whose own part of the base would be lost.
    """
    check_base(adapter)
    updates = [update for update in adapter.updates.values() if update.rank]  # AdaLoRA prunes all
    return truncated(adapter, updates, rule, itemsize, progress)


def truncated(
    adapter: Adapter,
    updates: Sequence[Update],
    rule: RankRule,
    itemsize: int,
    progress: Callable[[int], None],
) -> tuple[Adapter, Losses]:
    """Return an adapter with these updates cut, and their losses."""
    names = [f"{adapter.source}: {update.key}" for update in updates]
    columns = zip(*((u.lora_B, u.lora_A, u.scaling) for u in updates), strict=True)
    options = {"itemsize": itemsize, "names": names, "progress": progress}
    try:
        factors, losses = truncate(*map(list, columns), rule, **options)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    cut = map(_with_factors, updates, factors)
    found = adapter.with_updates(cut)
    return found, {update.key: loss for update, loss in zip(updates, losses, strict=True)}


def _with_factors(update: Update, factors: LoraFactors) -> Update:
    bias = None if update.bias is None else update.bias.float() * update.scaling
    return update.with_factors(factors.lora_A, factors.lora_B, bias=bias)


def check_base(adapter: Adapter) -> None:
    """Raise AdapterError for an adapter whose initialization changed the base."""
    if (method := changed_base(adapter.config)) is not None:
        raise AdapterError(
            f"{adapter.source}: init_lora_weights {method!r}: its factors hold a part of the base, "
            "which was changed; convert it to lora with its initial adapter first"
        )
    if (base := base_made_with(adapter.config)) is not None:
        raise AdapterError(
            f"{adapter.source}: its factors hold a part of the base, which peftkern init changed: "
            f"peftkern adapter convert ADAPTER DST --to lora --initial {base / 'adapter'}"
        )
