"""Extraction of an adapter from a full fine-tune: W_tuned - W_base of every layer, cut to a rank.

Weights are read layer by layer, those in 4 bits decoded, and their difference is taken in float32
within panels. Weights of the fine-tune are rounded, to 16 or to 4 bits: what lies below the edge of
that noise, sigma* of `noise`, is none of the tuning. By default the rank is the number of singular
values above 1.1 sigma*.

Of a fine-tune in 4 bits the rounding of the base to 4 bits is noise, too. Under one in 16 bits it
is taken for what was tuned: the base as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import PREFIX
from peftkern.layers.quantize import expert_parameters
from peftkern.methods.low_rank_algebra import Choice, Loss, above, best_pair, keeping, loss_of_part
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.extract_experts import (
    Found,
    Stack,
    are_same,
    find_stack,
    stack_update,
    stored_roundings,
)
from peftkern.tools.adapters.noise import ROUNDED, dense_rounding, noise_edge
from peftkern.tools.checkpoints.architecture import Load, by_target, find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, TensorInfo, read_checkpoint
from peftkern.tools.checkpoints.decoded import decoded

MARGIN = 1.1  # of the edge of noise
MOST = 256  # default bound on the rank, of rules that choose it
_LOW_RANK = ("linear", "turned", "embedding")
_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}


class Extracted(NamedTuple):
    """Loss of a layer, |W_tuned - W_base|_F / |W_base|_F, and the edge of noise sigma*."""

    loss: Loss
    change: float
    noise: float


class ExtractRule(NamedTuple):
    """Rule for ranks: "rank" (value), "energy" (share to keep) or "noise"; most: bound on them."""

    rule: str = "noise"
    value: float = MARGIN
    most: int = MOST

    @classmethod
    def asked(cls, rank: int | None, energy: float | None, noise: bool = False) -> ExtractRule:
        """Return the rule of what was given: a rank alone is the rule, else it bounds.

        Raises: ValueError naming the argument.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy: expected a number in (0, 1], got {energy:g}")
        most = rank or MOST
        if energy is not None:
            return cls("energy", energy, most)
        return cls(most=most) if noise or rank is None else cls("rank", rank, most)

    def choice(self, noise: float) -> int | Choice:
        if self.rule == "rank":
            return int(self.value)
        return keeping(self.value) if self.rule == "energy" else above(self.value * noise)


_NOISE = ExtractRule()


class _Place(NamedTuple):
    """Tensor of both checkpoints, and the parameter of the model that it is.

    kind: "linear", "turned" (Conv1D) or "embedding", of their weights; "bias" of a linear layer;
    "tied", of the modules named so; "rearranged" by loading; or "other".
    """

    base: TensorInfo
    tuned: TensorInfo
    module: str
    parameter: str
    kind: str
    tied: tuple[str, ...] = ()


def extract(
    base: str | Path,
    tuned: str | Path,
    rule: ExtractRule = _NOISE,
    *,
    progress: Callable[[int, str], None] = lambda nbytes, name: None,
) -> tuple[Adapter, dict[str, Extracted]]:
    """Return an adapter that brings a base near to its fine-tune, and what it leaves of each layer.

    Linear layers, embeddings and experts get low-rank updates; biases, tied embeddings and other
    modules, norms above all, are carried whole if they changed. What did not change is left out.
    PEFT saves modules whole, so that a parameter beside layers that have updates (the sinks of
    gpt-oss' attention) has no place in an adapter: notes name those that changed.

    Args: folders of safetensors of one architecture, which transformers knows, each dense or in 4
        bits; progress: called with the bytes of each finished tensor, decoded, and its name.
    Raises: AdapterError or CheckpointError naming the folder and the tensor: other tensors or
        shapes than the base's, nothing that changed, or what is not finite.
    """
    checkpoints = tuple(decoded(read_checkpoint(one, quantized=True)) for one in (base, tuned))
    places, stacks = _layout(*checkpoints)
    updates: dict[str, Update] = {}
    extracted: dict[str, Extracted] = {}
    changed: list[_Place] = []
    for place in places:
        before, after = place.base.read(), place.tuned.read()
        if are_same(before, after):
            pass
        elif place.kind not in _LOW_RANK:
            changed.append(place)
        elif (found := _update(place, before, after, rule)) is not None:
            updates[place.module], extracted[place.module] = found
        progress(place.base.nbytes, place.base.name)
    for both in stacks:
        stack, tensors = both[0], [one.tensors for one in checkpoints]
        cut = functools.partial(_cut, f"{tuned}: {stack.module}.{stack.parameter}", rule)
        of_stack = stack_update(both, tensors, cut)
        if of_stack is not None:
            update, loss, noise, weight = of_stack
            change = math.sqrt(loss.energy / max(weight, 1e-30))
            updates[update.key], extracted[update.key] = update, Extracted(loss, change, noise)
        progress(sum(tensors[0][name].nbytes for name in stack.names), stack.parameter)
    if not updates:
        raise AdapterError(
            f"{tuned}: no matrix of a layer differs from {base}, but for what rounding explains"
        )
    extras, fields, notes = _carried(places, changed, updates)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    config |= _task(checkpoints[0])
    config |= {"r": 1, "lora_alpha": 1, "target_modules": [], **fields}
    adapter = Adapter(config, {}, extras, str(tuned), notes)
    return adapter.with_updates(updates.values()), extracted


def _carried(
    places: list[_Place], changed: list[_Place], updates: dict[str, Update]
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Return the tensors that are carried whole, the fields of the config that say so, and notes
    on what cannot be."""
    extras: dict[str, Tensor] = {}
    inside = tuple(f".{update.module}." for update in updates.values())
    notes = []
    saved: dict[str, None] = {}
    bias = "none"
    for place in changed:
        if place.kind == "rearranged":
            raise AdapterError(
                f"{place.tuned.file}: {place.tuned.name}: differs from the base's, and loading "
                "rearranges it: save_pretrained() both models with this transformers first"
            )
        if place.kind == "bias" and place.module in updates:
            extras[f"{PREFIX}{place.module}.base_layer.bias"] = place.tuned.read()
            bias = "lora_only" if bias == "none" else bias
        elif place.kind == "bias":
            extras[f"{PREFIX}{place.module}.bias"], bias = place.tuned.read(), "all"
        elif place.kind == "tied":
            saved |= dict.fromkeys(place.tied)
            extras |= {f"{PREFIX}{name}.weight": place.tuned.read().clone() for name in place.tied}
        elif any(name.startswith(f".{place.module}.".replace("..", ".")) for name in inside):
            name = place.tuned.name
            notes.append(f"{name}: changed, and not carried, as layers in its module have updates")
        else:
            saved[place.module] = None
    for place in places:
        if place.module in saved and place.kind == "other":
            extras[f"{PREFIX}{place.module}.{place.parameter}"] = place.tuned.read()
    return extras, {"bias": bias, "modules_to_save": list(saved) or None}, tuple(notes)


def _task(base: Checkpoint) -> dict[str, str]:
    """Return the task that PEFT knows an architecture by."""
    names = base.config.get("architectures") or [""]
    task = next((task for end, task in _TASKS.items() if str(names[0]).endswith(end)), None)
    return {} if task is None else {"task_type": task}


def _cut(
    where: str, rule: ExtractRule, before: Tensor, after: Tensor, roundings: Sequence[float]
) -> Found | None:
    """Cut a difference; return factors, singular values, its norm and the edge of its noise, None
    if it is nothing but that, and that is the rule.

    Args: roundings: energies of those of both weights to 4 bits, 0 of what is not in 4 bits.
    """
    for weight in (before, after):
        if weight.dtype not in ROUNDED:
            raise AdapterError(f"{where}: expected F32, F16 or BF16, got {weight.dtype}")
    energy = sum(roundings) if roundings[1] else dense_rounding(after)
    noise = noise_edge(energy, tuple(after.shape))
    try:
        pair, S, norm = best_pair(after, rule.choice(noise), minus=before, most=rule.most)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from error
    if rule.rule == "noise" and S[0] <= rule.value * noise:
        return None
    return pair, S, norm, noise


def _update(
    place: _Place, before: Tensor, after: Tensor, rule: ExtractRule
) -> tuple[Update, Extracted] | None:
    where = f"{place.tuned.file}: {place.tuned.name}"
    roundings = [sum(stored_roundings(info)) for info in (place.base, place.tuned)]
    found = _cut(where, rule, before, after, roundings)
    if found is None:
        return None
    (lora_B, lora_A), S, norm, noise = found
    if place.kind != "linear":  # an embedding [V, d] and Conv1D [n, m] are kept turned
        lora_B, lora_A = lora_A.T.contiguous(), lora_B.T.contiguous()
    kind = "embedding" if place.kind == "embedding" else "linear"
    change = norm / max(before.float().norm().item(), 1e-30)
    loss = loss_of_part(S, norm**2, min(after.shape))
    return Update(place.module, "weight", kind, lora_A, lora_B, 1.0), Extracted(loss, change, noise)


def _layout(base: Checkpoint, tuned: Checkpoint) -> tuple[list[_Place], list[tuple[Stack, Stack]]]:
    """Return every parameter of both with its place in the model, and the stacks of experts, which
    each may store in its own way.

    Raises: AdapterError if they have other tensors or shapes.
    """
    model = meta_model(base)
    modules, parameters = dict(model.named_modules()), model.state_dict()
    found = [by_target(find_loads(model, one)) for one in (base, tuned)]
    for target in sorted(found[0].keys() ^ found[1].keys()):
        missing = int(target in found[0])
        name, without = found[1 - missing][target][0].info.name, (base, tuned)[missing]
        raise AdapterError(f"{without.folder}: {name}: missing, the other checkpoint has it")
    tied = _tied(model, parameters.keys() & found[0].keys())
    places: list[_Place] = []
    stacks: list[tuple[Stack, Stack]] = []
    for target, parts in found[0].items():
        others = found[1][target]
        module, _, parameter = target.rpartition(".")
        experts = target in parameters and parameter in expert_parameters(modules[module])
        both = [find_stack(model, target, loads) for loads in (parts, others)] if experts else []
        if experts and None not in both:
            shapes = both[0].shape(base.tensors), both[1].shape(tuned.tensors)
            _check_shape(tuned.tensors[both[1].names[0]], *shapes)
            stacks.append((both[0], both[1]))
            continue
        for load, other in _pairs(parts, others, tuned):
            _check_shape(other.info, load.info.shape, other.info.shape)
            if target not in parameters:
                continue
            kind = _kind(modules[module], parameter)
            if experts:
                kind = "rearranged"
            elif target in (f"{name}.weight" for name in tied):
                kind = "tied"
            elif load.converter is not None or parameters[target].shape != load.info.shape:
                kind = "rearranged"
            places.append(_Place(load.info, other.info, module, parameter, kind, tied))
    return places, stacks


def _pairs(
    parts: Sequence[Load], others: Sequence[Load], tuned: Checkpoint
) -> Iterator[tuple[Load, Load]]:
    """Yield the tensors of a parameter in both checkpoints, by their names if they are several."""
    if len(parts) == len(others) == 1:
        yield parts[0], others[0]
        return
    named = {load.info.name: load for load in others}
    for load in parts:
        name = load.info.name
        if name not in named or len(parts) != len(others):
            raise AdapterError(f"{tuned.folder}: {name}: the other checkpoint has other tensors")
        yield load, named[name]


def _check_shape(info: TensorInfo, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if expected != got:
        raise AdapterError(f"{info.file}: {info.name}: expected {list(expected)}, got {list(got)}")


def _kind(module: nn.Module, parameter: str) -> str:
    kinds = {nn.Linear: "linear", Conv1D: "turned", nn.Embedding: "embedding"}
    kind = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), "other")
    if parameter == "weight":
        return kind
    return "bias" if kind in ("linear", "turned") else "other"


def _tied(model: PreTrainedModel, tensors: Collection[str]) -> tuple[str, ...]:
    """Return the names of the embeddings, if one tensor of the file is the weight of both."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [n for n, module in model.named_modules() if any(module is end for end in ends)]
    apart = sum(f"{name}.weight" in tensors for name in names) == len(names)
    return () if apart or len(names) < 2 else tuple(names)
