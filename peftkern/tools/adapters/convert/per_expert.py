"""Adapters with a pair for every expert: `experts.3.gate_proj.lora_A.weight`.

transformers 4 had experts as modules; PEFT still loads such adapters into the fused parameters of
transformers 5, vLLM reads no others for most models. In memory each is a plain linear update.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.convert.halves import Pair, fuse_halves, split_halves

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")  # the same, as Mixtral and its kin name them
_ONE = re.compile(rf"(.*\bexperts)\.(0|[1-9]\d*)\.({'|'.join((*PROJECTIONS, *MIXTRAL))})")
_BLOCK, _MLP = ".block_sparse_moe.", ".mlp."  # what holds them, before transformers 5 and since


def is_per_expert(update: Update) -> bool:
    return update.kind == "linear" and _ONE.fullmatch(update.module) is not None


def gather_experts(adapter: Adapter) -> Adapter:
    """Stack the updates of single experts, of scaling 1, into updates of the fused parameters.

    Raises: AdapterError for an expert that is missing or differs from the first in shape, and for
        what a fused parameter's update cannot hold.
    """
    stacks: dict[str, dict[str, dict[int, Update]]] = {}
    updates = []
    for update in adapter.updates.values():
        if not is_per_expert(update):
            updates.append(update)
            continue
        module, number, name = _ONE.fullmatch(update.module).groups()
        module = model_name(module)
        name = dict(zip(MIXTRAL, PROJECTIONS, strict=True)).get(name, name)
        _check_plain(adapter, update)
        stacks.setdefault(module, {}).setdefault(name, {})[int(number)] = update
    for module, projections in stacks.items():
        pairs = {name: _stack(adapter, items) for name, items in projections.items()}
        for parameter, pair in fused_parameters(adapter.source, module, pairs):
            updates.append(Update(module, parameter, "experts", *pair, scaling=1.0))
    return adapter.with_updates(updates)


def _check_plain(adapter: Adapter, update: Update) -> None:
    if update.magnitude is not None or update.bias is not None:
        what = "a DoRA magnitude" if update.magnitude is not None else "a bias"
        raise AdapterError(
            f"{adapter.source}: {update.module}: expected lora_A and lora_B alone, which is all "
            f"that a fused parameter's update holds, got {what}"
        )


def _stack(adapter: Adapter, items: dict[int, Update]) -> Pair:
    """Return lora_A [E, r, n] and lora_B [E, m, r] of experts 0 to E-1."""
    first = next(iter(items.values()))
    missing = next((number for number in range(len(items)) if number not in items), None)
    if missing is not None:
        raise AdapterError(
            f"{adapter.source}: {first.module}: expected every expert from 0 to {max(items)}, "
            f"got none of number {missing}"
        )
    ordered = [items[number] for number in range(len(items))]
    for update in ordered:
        for name in ("lora_A", "lora_B"):
            mine, wanted = getattr(update, name), getattr(first, name)
            if (mine.shape, mine.dtype) != (wanted.shape, wanted.dtype):
                raise AdapterError(
                    f"{adapter.source}: {update.module}.{name}: expected {list(wanted.shape)} "
                    f"{wanted.dtype} as of {first.module}, got {list(mine.shape)} {mine.dtype}"
                )
    return torch.stack([u.lora_A for u in ordered]), torch.stack([u.lora_B for u in ordered])


def fused_parameters(
    source: str, module: str, pairs: Mapping[str, Pair]
) -> Iterator[tuple[str, Pair]]:
    """Yield the fused parameters' names and pairs of stacked projections, gate_up_proj first.

    Raises: AdapterError for gate_proj without up_proj, or of other sizes.
    """
    gate, up, down = map(pairs.get, PROJECTIONS)
    if (gate is None) != (up is None):
        present, absent = ("up", "gate") if gate is None else ("gate", "up")
        raise AdapterError(
            f"{source}: {module}: expected {absent}_proj beside {present}_proj, with which "
            "it is one parameter"
        )
    if gate is not None:
        (E, _, n), (E_up, _, n_up) = gate[0].shape, up[0].shape
        if (E, n, gate[1].shape[1]) != (E_up, n_up, up[1].shape[1]):
            raise AdapterError(
                f"{source}: {module}: expected as many experts, inputs and outputs in "
                f"gate_proj and up_proj, got {[E, n, gate[1].shape[1]]} and "
                f"{[E_up, n_up, up[1].shape[1]]}"
            )
        yield GATE_UP, fuse_halves(gate, up)
    if down is not None:
        yield DOWN, down


def projections(adapter: Adapter, update: Update) -> Iterator[tuple[str, Pair]]:
    """Yield gate_proj, up_proj and down_proj of a fused parameter's update, stacked.

    Raises: AdapterError for a parameter that is none of a known mixture's.
    """
    pair = update.lora_A, update.lora_B
    if update.parameter == DOWN:
        yield DOWN, pair
    elif update.parameter == GATE_UP and update.lora_B.shape[-2] % 2 == 0:
        yield from zip(PROJECTIONS, split_halves(*pair), strict=False)
    else:
        raise AdapterError(
            f"{adapter.source}: {update.module}: expected {GATE_UP} of an even number of rows or "
            f"{DOWN}, got {update.parameter} of {update.lora_B.shape[-2]} rows, whose projections "
            "are unknown"
        )


def model_name(module: str) -> str:
    """Return what transformers 5 calls a module of experts."""
    return module.replace(_BLOCK, _MLP)


def checkpoint_name(module: str, mixtral: bool) -> str:
    """Return what checkpoints call a module of experts, of Mixtral and its kin or of others."""
    return module.replace(_MLP, _BLOCK) if mixtral else module


def scatter_experts(adapter: Adapter, mixtral: bool) -> Adapter:
    """Give every expert updates of its own, named as in Mixtral's checkpoints or in others.

    Raises: AdapterError as `projections`.
    """
    names = dict(zip(PROJECTIONS, MIXTRAL if mixtral else PROJECTIONS, strict=True))
    updates = []
    for update in adapter.updates.values():
        if update.kind != "experts":
            updates.append(update)
            continue
        for name, (lora_A, lora_B) in projections(adapter, update):
            for expert, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
                module = f"{checkpoint_name(update.module, mixtral)}.{expert}.{names[name]}"
                updates.append(Update(module, "weight", "linear", A, B, update.scaling))
    return adapter.with_updates(updates)


def warnings(names: Iterable[str]) -> Iterator[str]:
    """Yield what readers make of the tensors of these names."""
    found: dict[str, set[str]] = {}
    for name in names:
        if one := _ONE.fullmatch(name.removesuffix(".lora_A.weight")):
            found.setdefault(one[1], set()).add(one[3])
    if any(not one & {PROJECTIONS[2], MIXTRAL[2]} for one in found.values()):
        yield (
            "warning: PEFT (0.21.2) reads single experts' gate and up only beside down_proj, else "
            "as updates of zero: for PEFT convert to peft"
        )
