"""Extraction of an adapter from a full fine-tune: W_tuned - W_base of every layer, cut to a rank.

Weights are read layer by layer, and their difference is taken in float32 within panels. 16-bit
weights of the fine-tune are rounded: the rounding of each is a matrix of independent errors of
variance ulp^2 / 12, whose largest singular value is near

    sigma* = rms(ulp) / sqrt(12) * (sqrt(m) + sqrt(n)),

and what lies below that edge is noise: by default the rank is the number of singular values above
1.1 sigma*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.layers.quantize import expert_parameters
from peftkern.methods.low_rank_algebra import Choice, Loss, above, best_pair, keeping, loss_of_part
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.extract_experts import Stack, find_stack, read_tensor, stack_update
from peftkern.tools.checkpoints.architecture import Load, find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, TensorInfo, read_checkpoint

MARGIN = 1.1  # of the edge of noise
MOST = 256  # default bound on the rank, of rules that choose it
_LOW_RANK = ("linear", "turned", "embedding")
_PANEL = 1 << 21  # values
# Bits of a number that are its power of two.
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80, 7),
    torch.float16: (torch.int16, 0x7C00, 10),
    torch.float32: (torch.int32, 0x7F800000, 23),
}
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

    Args: folders of safetensors of one architecture, which transformers knows; progress: called
        with the bytes of each finished tensor and its name.
    Raises: AdapterError or CheckpointError naming the folder and the tensor: other tensors or
        shapes than the base's, nothing that changed, or what is not finite.
    """
    checkpoints = read_checkpoint(base), read_checkpoint(tuned)
    places, stacks = _layout(*checkpoints)
    updates: dict[str, Update] = {}
    extracted: dict[str, Extracted] = {}
    changed: list[_Place] = []
    for place in places:
        before, after = read_tensor(place.base), read_tensor(place.tuned)
        if not torch.equal(before, after):
            if place.kind in _LOW_RANK:
                updates[place.module], extracted[place.module] = _update(place, before, after, rule)
            else:
                changed.append(place)
        progress(place.base.nbytes, place.base.name)
    for stack in stacks:
        found = stack_update(stack, *(one.tensors for one in checkpoints), functools.partial(
            _cut, f"{tuned}: {stack.module}.{stack.parameter}", rule))  # fmt: skip
        if found is not None:
            update, loss, noise, weight = found
            change = math.sqrt(loss.energy / max(weight, 1e-30))
            updates[update.key], extracted[update.key] = update, Extracted(loss, change, noise)
        progress(sum(checkpoints[0].tensors[name].nbytes for name in stack.names), stack.parameter)
    if not updates:
        raise AdapterError(f"{tuned}: no matrix of a layer differs from {base}")
    extras, fields, notes = _carried(places, changed, updates)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), **_task(Path(base))}
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
            extras[f"{PREFIX}{place.module}.base_layer.bias"] = read_tensor(place.tuned)
            bias = "lora_only" if bias == "none" else bias
        elif place.kind == "bias":
            extras[f"{PREFIX}{place.module}.bias"], bias = read_tensor(place.tuned), "all"
        elif place.kind == "tied":
            saved |= dict.fromkeys(place.tied)
            extras |= {
                f"{PREFIX}{name}.weight": read_tensor(place.tuned).clone() for name in place.tied
            }
        elif any(name.startswith(f".{place.module}.".replace("..", ".")) for name in inside):
            name = place.tuned.name
            notes.append(f"{name}: changed, and not carried, as layers in its module have updates")
        else:
            saved[place.module] = None
    for place in places:
        if place.module in saved and place.kind == "other":
            extras[f"{PREFIX}{place.module}.{place.parameter}"] = read_tensor(place.tuned)
    return extras, {"bias": bias, "modules_to_save": list(saved) or None}, tuple(notes)


def _task(base: Path) -> dict[str, str]:
    """Return the task that PEFT knows an architecture by."""
    names = read_checkpoint(base).config.get("architectures") or [""]
    task = next((task for end, task in _TASKS.items() if str(names[0]).endswith(end)), None)
    return {} if task is None else {"task_type": task}


def noise_edge(weight: Tensor) -> float:
    """Return sigma* of a weight [m, n], the largest singular value of its rounding."""
    integer, exponent, bits = _EXPONENT[weight.dtype]
    squares = 0.0
    for rows in weight.split(max(1, _PANEL // weight.shape[1])):
        powers = rows.contiguous().view(integer).bitwise_and(exponent).view(weight.dtype)
        squares += powers.float().square().sum(dtype=torch.float64).item()
    rms = math.sqrt(squares / weight.numel()) * 2.0**-bits
    return rms / math.sqrt(12) * sum(map(math.sqrt, weight.shape))


def _cut(
    where: str, rule: ExtractRule, before: Tensor, after: Tensor
) -> tuple[LoraFactors, Tensor, float, float]:
    """Cut a difference; return factors, singular values, its norm and the edge of its noise."""
    for weight in (before, after):
        if weight.dtype not in _EXPONENT:
            raise AdapterError(f"{where}: expected F32, F16 or BF16, got {weight.dtype}")
    noise = noise_edge(after)
    try:
        return *best_pair(after, rule.choice(noise), minus=before, most=rule.most), noise
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from error


def _update(
    place: _Place, before: Tensor, after: Tensor, rule: ExtractRule
) -> tuple[Update, Extracted]:
    where = f"{place.tuned.file}: {place.tuned.name}"
    pair, S, norm, noise = _cut(where, rule, before, after)
    lora_B, lora_A = pair
    if place.kind != "linear":  # an embedding [V, d] and Conv1D [n, m] are kept turned
        lora_B, lora_A = lora_A.T.contiguous(), lora_B.T.contiguous()
    kind = "embedding" if place.kind == "embedding" else "linear"
    change = norm / max(before.float().norm().item(), 1e-30)
    loss = loss_of_part(S, norm**2, min(after.shape))
    return Update(place.module, "weight", kind, lora_A, lora_B, 1.0), Extracted(loss, change, noise)


def _layout(base: Checkpoint, tuned: Checkpoint) -> tuple[list[_Place], list[Stack]]:
    """Return every tensor of both with its place in the model, and the stacks of experts.

    Raises: AdapterError if they have other tensors or shapes.
    """
    for name in sorted(base.tensors.keys() ^ tuned.tensors.keys()):
        without = tuned if name in base.tensors else base
        raise AdapterError(f"{without.folder}: {name}: missing, the other checkpoint has it")
    for name, info in base.tensors.items():
        if info.shape != (other := tuned.tensors[name]).shape:
            raise AdapterError(
                f"{other.file}: {name}: expected {list(info.shape)}, got {list(other.shape)}"
            )
    model = meta_model(base)
    modules, parameters = dict(model.named_modules()), model.state_dict()
    loads = [load for load in find_loads(model, base) if load.target in parameters]
    tied = _tied(model, {load.target for load in loads})
    places: list[_Place] = []
    experts: dict[str, list[Load]] = {}
    for load in loads:
        module, _, parameter = load.target.rpartition(".")
        if parameter in expert_parameters(modules[module]):
            experts.setdefault(load.target, []).append(load)
            continue
        kind = _kind(modules[module], parameter)
        if load.target in (f"{name}.weight" for name in tied):
            kind = "tied"
        elif load.converter is not None or parameters[load.target].shape != load.info.shape:
            kind = "rearranged"
        other = tuned.tensors[load.info.name]
        places.append(_Place(load.info, other, module, parameter, kind, tied))
    stacks = []
    for target, parts in experts.items():
        stack = find_stack(model, target, parts)
        if stack is None:
            module, _, parameter = target.rpartition(".")
            infos = (load.info for load in parts)
            places += [_Place(one, tuned.tensors[one.name], module, parameter, "rearranged")
                       for one in infos]  # fmt: skip
        else:
            stacks.append(stack)
    return places, stacks


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
