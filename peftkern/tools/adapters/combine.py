"""Weighted sums of adapters: exact, truncated, or sparsified (TIES, DARE, magnitude pruning).

Scaling, rslora and patterns are honored, as every update brings its own scaling; sums are never
formed densely, but for the sparsified ones, whose elements are dropped one by one: those take one
layer at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.methods.low_rank_algebra import Loss, best_pair, concatenate, loss_of_part
from peftkern.methods.rank_rules import RankRule
from peftkern.methods.sparse_sums import METHODS, sparse_sum
from peftkern.tools.adapters.adapter import UNMERGEABLE, Adapter, AdapterError, Update
from peftkern.tools.adapters.resize import Losses, check_base, truncated

EXACT = ("svd", "cat")
_BIASES = ("none", "lora_only", "all")  # values of a config's `bias`, each with those before it


@dataclass(frozen=True)
class Combination:
    """Kind of a sum: "svd" (cut to a rank), "cat" (exact, of the sum of all ranks), or one of
    `sparse_sums.METHODS`, cut to a rank, with its density, signs, and seed of random choices."""

    method: str = "svd"
    rank: int | None = None  # default: the largest of the adapters
    density: float | None = None
    signs: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in (*EXACT, *METHODS):
            known = ", ".join((*EXACT, *METHODS))
            raise ValueError(f"method: expected one of {known}, got {self.method!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: Combination = Combination(),
    *,
    progress: Callable[[int], None] = lambda updates: None,
) -> tuple[Adapter, Losses]:
    """Add adapters of one base, weights[i] * adapters[i].

    A module that only some of them update takes the sum of those. Tensors that replace ones of the
    base (modules_to_save, token rows, biases, whole tables) are taken from the adapter that has
    them; where several have one, it must be equal.

    Returns: the adapter, factors in float32 with a scaling of 1, and the loss of each update.
    Raises: AdapterError naming the adapter and the module or tensor: DoRA, aLoRA, a changed base,
        shapes or replaced tensors that differ, factors that are not finite.
    """
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"weights: expected one for each of {len(adapters)} adapters")
    for adapter in adapters:
        check_base(adapter)
        _check_plain(adapter)
    merged = _merged(adapters)
    groups = _groups(adapters, weights)
    rank = how.rank or max(u.rank for adapter in adapters for u in adapter.updates.values())
    sums = [_sum(group) for group in groups.values()]
    if how.method == "svd":
        found, losses = truncated(merged, sums, RankRule("rank", rank), 4, progress)
        return _biased(found), losses
    if how.method == "cat":
        losses = {u.key: _none_lost(u) for u in sums}
    else:
        try:
            sums, losses = _sparse(groups, how, rank, progress)
        except ValueError as error:
            raise AdapterError(str(error)) from error
    return _biased(merged.with_updates(sums)), losses


Group = list[tuple[Update, float]]


def _groups(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Group]:
    """Return the updates of each module with the weights of their adapters.

    Raises: AdapterError if those of one module do not fit each other.
    """
    groups: dict[str, Group] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, update in adapter.updates.items():
            if not update.rank:  # of AdaLoRA, pruned away
                continue
            group = groups.setdefault(key, [])
            if group and _weight_of(group[0][0]) != _weight_of(update):
                raise AdapterError(
                    f"{adapter.source}: {key}: expected an update of {_weight_of(group[0][0])}, "
                    f"as the other adapters have, got {_weight_of(update)}"
                )
            group.append((update, float(weight)))
    return groups


def _weight_of(update: Update) -> str:
    """Describe the weight that an update is of."""
    m, n = update.size
    experts = f"{update.lora_A.shape[0]} x " if update.kind == "experts" else ""
    kernel = f" ({list(update.shape[1:])})" if update.shape else ""
    return f"{update.kind} {experts}{m} x {n}{kernel}"


def _sum(group: Group) -> Update:
    """Return the exact sum, of the sum of all ranks."""
    terms = [(update.lora_B, update.lora_A, weight * update.scaling) for update, weight in group]
    return _with_sum(group, *concatenate(terms))


def _with_sum(group: Group, lora_B: Tensor, lora_A: Tensor) -> Update:
    biases = [u.bias.float() * (w * u.scaling) for u, w in group if u.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return group[0][0].with_factors(lora_A, lora_B, bias=bias)


def _none_lost(update: Update) -> Loss:
    """Return the loss of an update that is kept as it is; its energy from Gram matrices."""
    energy = 0.0
    for B, A in update.pairs():
        energy += (B.double().mT @ B.double()).mul(A.double() @ A.double().mT).sum().item()
    return Loss(update.rank, update.rank, max(energy, 0.0), 0.0, None, None)


def _sparse(
    groups: dict[str, Group], how: Combination, rank: int, progress: Callable[[int], None]
) -> tuple[list[Update], Losses]:
    """Sum sparsified updates, each layer and expert densely in its turn.

    Random choices are drawn in the order of the names, so that they depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(how.seed)
    found, losses = [], {}
    for key in sorted(groups):
        group = groups[key]
        weights = [weight for _, weight in group]
        options = {"signs": how.signs, "generator": generator}
        factors, spectra, energy = [], [], 0.0
        for pairs in zip(*(update.pairs() for update, _ in group), strict=True):
            dense = [
                functools.partial(_dense, B, A, update.scaling)
                for (B, A), (update, _) in zip(pairs, group, strict=True)
            ]
            total = sparse_sum(how.method, dense, weights, how.density, **options)
            if not total.isfinite().all():
                raise AdapterError(f"{key}: the sum of its updates is not finite in float32")
            pair, S, norm = best_pair(total, rank)
            factors.append(pair)
            spectra.append(S)
            energy += norm**2
        stack = map(torch.stack, zip(*factors, strict=True))
        B, A = stack if group[0][0].kind == "experts" else factors[0]
        found.append(_with_sum(group, B, A))
        size = min(group[0][0].size)
        losses[key] = loss_of_part(torch.stack(spectra).norm(dim=0), energy, size)
        progress(1)
    order = {key: place for place, key in enumerate(groups)}
    return sorted(found, key=lambda update: order[update.key]), losses


def _dense(B: Tensor, A: Tensor, scaling: float) -> Tensor:
    return (B.float() @ A.float()).mul_(scaling)


def _biased(adapter: Adapter) -> Adapter:
    """Return the adapter with a bias of zeros where others have one: a file has all or none."""
    if not adapter.config["lora_bias"]:
        return adapter
    return adapter.with_updates(
        replace(u, bias=torch.zeros(u.size[0]) if u.bias is None else u.bias)
        for u in adapter.updates.values()
    )


def _check_plain(adapter: Adapter) -> None:
    for name, why in UNMERGEABLE.items():
        if adapter.config.get(name):
            raise AdapterError(f"{adapter.source}: {name}: {why}, so that its updates have no sum")
    bias = adapter.config.get("bias") or "none"
    if bias not in _BIASES:
        expected = ", ".join(_BIASES)
        raise AdapterError(f"{adapter.source}: bias: expected one of {expected}, got {brief(bias)}")
    for key, update in adapter.updates.items():
        if update.magnitude is not None:
            raise AdapterError(
                f"{adapter.source}: {key}: DoRA's magnitude divides by the norm of the weight, so "
                "that its updates have no sum; merge it, or convert it to lora with its base first"
            )


def _merged(adapters: Sequence[Adapter]) -> Adapter:
    """Return the first adapter with the replaced tensors and the config of all."""
    first = adapters[0]
    extras: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, tensor in adapter.extras.items():
            held = extras.setdefault(name, tensor)
            if held.shape != tensor.shape or not torch.equal(held, tensor.to(held.dtype)):
                raise AdapterError(
                    f"{adapter.source}: {name}: replaces a tensor of the base by other values than "
                    "another adapter does; replaced tensors have no sum"
                )
    notes = tuple(dict.fromkeys(itertools.chain(*(adapter.notes for adapter in adapters))))
    return replace(first, config=_config(adapters), extras=extras, notes=notes)


def _config(adapters: Sequence[Adapter]) -> dict[str, object]:
    """Return the first config with the fields that say what the extras of all are.

    Raises: AdapterError for token rows of different tokens.
    """
    configs = [adapter.config for adapter in adapters]
    modules = [name for config in configs for name in config.get("modules_to_save") or ()]
    rows = [(a.config["trainable_token_indices"], a.source) for a in adapters
            if a.config.get("trainable_token_indices")]  # fmt: skip
    for other, source in rows:
        if other != rows[0][0]:
            raise AdapterError(
                f"{source}: trainable_token_indices: {brief(other)}, another adapter has "
                f"{brief(rows[0][0])}; rows that replace those of the base have no sum"
            )
    return {
        **configs[0],
        "init_lora_weights": True,
        "lora_bias": any(config.get("lora_bias") for config in configs),
        "bias": max((config.get("bias") or "none" for config in configs), key=_BIASES.index),
        "modules_to_save": list(dict.fromkeys(modules)) or None,
        "trainable_token_indices": rows[0][0] if rows else None,
    }
