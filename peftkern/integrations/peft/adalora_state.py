"""State with which an AdaLoRA training goes on: all triplets, their importance, mask and schedule.

PEFT saves the triplets that the current mask keeps, although the others may still revive, and none
of the moving averages. A training that resumes from that fails with a size mismatch after the first
mask, and silently differs before it. Here the rest lies in a file beside PEFT's adapter, which
anyone can load as before.
"""

from __future__ import annotations

import json
import os
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.model import AdaLoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftkern.integrations.peft import zero
from peftkern.integrations.peft.adalora import PatchedRankAllocator
from peftkern.integrations.peft.adalora_budget import adopt_limits
from peftkern.integrations.peft.adalora_compact import look_again
from peftkern.integrations.peft.adalora_layers import layers_of, parameters_of, widen_diagonals
from peftkern.methods.processes import is_sharded, stepped_by_deepspeed, with_gradient
from peftkern.methods.rank_budget import RankLimits

__all__ = [
    "FILE",
    "AdaLoraState",
    "keep_state_when_loading",
    "load_allocator",
    "load_state",
    "save_state",
]

FILE = "adalora_state.safetensors"
_KEY = "adalora"  # of the record, in the metadata
_VERSION = 1
GROUPS = ("lora_E", "lora_A", "lora_B")
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
_SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT", "target_r")


class AdaLoraState(NamedTuple):
    """Triplets by "layer.lora_E" and so on, averages by the same, kept triplets by layer.

    schedule: the fields of the config, with `init_bgt`, the triplets at first. step: the last one
    that was taken; -1 if unknown. scores: of all triplets; None if none are needed. limits: of a
    budget in other units; None for PEFT's. rows: which triplets of each layer are there, None if
    all; compaction has dropped the others.
    """

    triplets: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    kept: dict[str, list[bool]] | None
    ranknum: dict[str, float]
    schedule: dict[str, int]
    step: int
    scores: Tensor | None
    limits: RankLimits | None = None
    rows: dict[str, list[bool]] | None = None


def save_state(
    tuner: AdaLoraModel, folder: str | os.PathLike[str], step: int, *, write: bool = True
) -> None:
    """Write what a training needs to go on after `step`, beside the adapter in `folder`.

    Args: write, False in all processes but one; what FSDP2 and ZeRO-3 have sharded they gather
        together.
    """
    tensors, record = collect(tuner, step)
    if not write:
        return
    path = Path(folder, FILE)
    unfinished = path.with_suffix(".part")
    save_file(on_the_cpu(tensors), unfinished, {_KEY: json.dumps(record)})
    os.replace(unfinished, path)


def collect(
    tuner: AdaLoraModel, step: int, *, triplets: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gather what a training needs to go on after `step`: tensors, and what JSON takes."""
    name, allocator = tuner.trainable_adapter_name, tuner.rankallocator
    layers = layers_of(tuner)
    with zero.whole([*parameters_of(tuner), *(layer.ranknum[name] for layer in layers.values())]):
        tensors, ranknum = _tensors_of(tuner, layers, triplets)
    importance = getattr(allocator, "_importance", None)
    if importance is not None and importance.scores is not None:
        tensors["scores"] = importance.scores
    config = tuner.peft_config[name]
    schedule = {field: getattr(config, field) for field in _SCHEDULE}
    schedule["init_bgt"] = allocator.init_bgt
    limits = getattr(allocator, "limits", None)
    record = {"version": _VERSION, "step": step, "schedule": schedule, "ranknum": ranknum}
    record["limits"] = None if limits is None else limits.state_dict()
    return tensors, record


def on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors where safetensors takes them from."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _tensors_of(
    tuner: AdaLoraModel, layers: dict[str, AdaLoraLayer], triplets: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors of a state, and the ranks that scalings are divided by."""
    name, allocator = tuner.trainable_adapter_name, tuner.rankallocator
    config, tensors, ranknum = tuner.peft_config[name], {}, {}
    pattern = {k.removesuffix(f".{name}"): v for k, v in (config.rank_pattern or {}).items()}
    for path, layer in layers.items():
        ranknum[path] = with_gradient(layer.ranknum[name]).item()
        for group in GROUPS:
            if triplets:
                tensors[f"{path}.{group}"] = with_gradient(getattr(layer, group)[name]).detach()
            for average in _AVERAGES:
                held = getattr(allocator, average).get(f"{path}.{group}.{name}")
                if held is not None:
                    tensors[f"{path}.{group}.{average}"] = held
        if pattern:
            tensors[f"{path}.kept"] = torch.tensor(pattern[f"{path}.lora_E"], dtype=torch.bool)
        if getattr(allocator, "rows", None) is not None:
            tensors[f"{path}.rows"] = torch.tensor(allocator.rows[path], dtype=torch.bool)
    return tensors, ranknum


def read_state(folder: str | os.PathLike[str]) -> AdaLoraState | None:
    """Read what `save_state` wrote; None if the folder has nothing of it.

    Raises: ValueError on a file of another version.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return parse(tensors, record, str(path))


def parse(tensors: dict[str, Tensor], record: dict[str, Any], source: str) -> AdaLoraState:
    """Read what `collect` gave. Raises: ValueError on another version, naming the source."""
    if record.get("version") != _VERSION:
        raise ValueError(f"{source}: version {record.get('version')}, expected {_VERSION}")
    averages: dict[str, dict[str, Tensor]] = {name: {} for name in _AVERAGES}
    kept, rows, triplets, scores = {}, {}, {}, tensors.pop("scores", None)
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        if last == "kept":
            kept[name] = tensor.tolist()
        elif last == "rows":
            rows[name] = tensor.tolist()
        elif last in averages:
            averages[last][name] = tensor
        else:
            triplets[key] = tensor
    limits = record.get("limits")
    if limits is not None:
        limits = RankLimits.from_state(limits, list(record["ranknum"]))
    return AdaLoraState(
        triplets, averages, kept or None, record["ranknum"], record["schedule"], record["step"],
        scores, limits, rows or None,
    )  # fmt: skip


def load_state(model: PeftModel, folder: str | os.PathLike[str]) -> AdaLoraState:
    """Load a folder into the trained AdaLoRA adapter of a model, so that training goes on from it.

    With the file of `save_state` all is as it was then. Without it, as PEFT saves, the triplets
    that were kept return to their places, the others start anew, at zero, and so do the averages.

    Returns: the state; its step is -1 without that file.
    Raises: ValueError if the layers or their shapes are not those of the model, which is then as
        it was, and for a model that FSDP2 has sharded already or DeepSpeed has taken over.
    """
    tuner = model.base_model
    name = tuner.trainable_adapter_name
    layers, state = layers_of(tuner), read_state(folder)
    if any(stepped_by_deepspeed(layer.lora_A[name]) for layer in layers.values()):
        raise ValueError(
            "model: DeepSpeed holds its parameters: load before deepspeed.initialize, in every "
            "process, or its own checkpoint with `load_allocator`"
        )
    if any(is_sharded(layer.lora_A[name]) for layer in layers.values()):
        raise ValueError(
            "model: FSDP2 has sharded it, and a folder does not load into shards: load before "
            "fully_shard, in every process, or what AdaLoraSteps.state_dict gave"
        )
    weights = load_peft_weights(folder, device="cpu")
    if state is None:
        state = _scattered(tuner, layers, folder, weights)
    wanted = {f"{path}.{group}" for path in layers for group in GROUPS}
    if wanted != state.triplets.keys():
        other = sorted(wanted ^ state.triplets.keys())[0]
        raise ValueError(f"{folder}: expected the layers of the model, differs in {other}")
    _check_shapes(folder, layers, name, state)
    if state.limits is not None and not isinstance(tuner.rankallocator, PatchedRankAllocator):
        raise ValueError(f"model: expected a patched one, for {folder} has a budget of peftkern's")
    for path, layer in layers.items():
        for group in GROUPS:
            fit(getattr(layer, group)[name], state.triplets[f"{path}.{group}"])
        layer.ranknum[name].data.fill_(state.ranknum[path])
        layer.r[name] = state.triplets[f"{path}.lora_E"].shape[0]
    weights |= {f"base_model.model.{key}": tensor for key, tensor in state.triplets.items()}
    tuner.peft_config[name].rank_pattern = None  # PEFT would take layers to pieces by it
    set_peft_model_state_dict(model, weights, name)
    restore_allocator(tuner, state)
    widen_diagonals(tuner)
    look_again(tuner)
    return state


def load_allocator(tuner: AdaLoraModel, folder: str | os.PathLike[str]) -> AdaLoraState:
    """Load importance, mask and schedule alone, where an engine has loaded the parameters.

    Returns: the state. Raises: ValueError if the folder has none, or of other layers.
    """
    layers, state = layers_of(tuner), read_state(folder)
    if state is None:
        raise ValueError(f"{folder}: expected {FILE}, which `save_state` writes")
    if state.ranknum.keys() != layers.keys():
        other = sorted(state.ranknum.keys() ^ layers.keys())[0]
        raise ValueError(f"{folder}: expected the layers of the model, differs in {other}")
    with zero.whole(parameters_of(tuner)):
        restore_allocator(tuner, state)
    return state


def keep_state_when_loading(model: PeftModel) -> None:
    """Let `model.load_adapter`, as the Trainer calls it, load as `load_state` does.

    That is for the trained AdaLoRA adapter and folders on this machine; other calls are PEFT's.
    """
    model.load_adapter = types.MethodType(load_adapter, model)


def load_adapter(  # pickle looks for a method of this name
    model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    *args: Any,
    **options: Any,
) -> Any:
    """Load as PeftModel does; of a folder that `load_state` takes, PEFT's report is not made."""
    tuner = model.base_model
    trained = getattr(tuner, "trainable_adapter_name", None)
    if adapter_name != trained or not os.path.isdir(model_id):
        return type(model).load_adapter(
            model, model_id, adapter_name, is_trainable, *args, **options
        )
    state = load_state(model, model_id)
    if state.step < 0 and (is_trainable or state.kept is not None):
        warnings.warn(
            f"{model_id} has no {FILE}: the importance of triplets starts anew, and those that "
            "the mask had pruned are zero with random vectors; after the last mask that is as it "
            "was, before it training goes another way",
            stacklevel=2,
        )
    if not is_trainable:
        model.eval()
    return None


def _check_shapes(
    folder: str | os.PathLike[str], layers: dict[str, AdaLoraLayer], name: str, state: AdaLoraState
) -> None:
    """Raise ValueError unless a state has all of every layer, of any number of triplets."""
    file = Path(folder, FILE if state.step >= 0 else CONFIG_NAME)
    for path, layer in layers.items():
        ranks = []
        for group in GROUPS:
            tensor, parameter = state.triplets[f"{path}.{group}"], getattr(layer, group)[name]
            pruned = 1 if group == "lora_B" else 0  # the dimension that may differ
            if tensor.dim() != 2 or parameter.shape[1 - pruned] != tensor.shape[1 - pruned]:
                raise ValueError(
                    f"{folder}: {path}.{group} is {list(tensor.shape)}, of the model "
                    f"{list(parameter.shape)}"
                )
            ranks.append(tensor.shape[pruned])
        if len(set(ranks)) > 1:
            raise ValueError(f"{folder}: {path}: {' and '.join(GROUPS)} have {ranks} triplets")
        _held(state.ranknum, path, file)
        if state.kept is not None:
            _held(state.kept, path, file)
        if state.rows is not None and sum(_held(state.rows, path, file)) != ranks[0]:
            raise ValueError(f"{file}: {path} has {ranks[0]} triplets, not those of its rows")


def _held(values: Mapping[str, Any], key: str, file: Path) -> Any:
    """Return what a file has of a layer of the model. Raises: ValueError if it has nothing."""
    if key not in values:
        raise ValueError(f"{file}: expected the layers of the model, has nothing of {key}")
    return values[key]


def fit(parameter: torch.nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter the shape and dtype of what it is to hold, and its identity stays."""
    if parameter.shape != tensor.shape or parameter.dtype is not tensor.dtype:
        parameter.grad = None
        parameter.data = torch.empty_like(tensor, device=parameter.device)


def _scattered(
    tuner: AdaLoraModel,
    layers: dict[str, AdaLoraLayer],
    folder: str | os.PathLike[str],
    weights: dict[str, Tensor],
) -> AdaLoraState:
    """Make a state of a folder of PEFT's own, whose pruned triplets are not there."""
    name = tuner.trainable_adapter_name
    saved_config = PeftConfig.from_pretrained(folder)
    pattern = saved_config.rank_pattern
    names = [n for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if Path(folder, n).is_file()]
    file = Path(folder, *names[:1])
    triplets, kept, ranknum = {}, {}, {}
    for path, layer in layers.items():
        rows = layer.lora_E[name].shape[0]
        kept[path] = [True] * rows
        if pattern:
            kept[path] = list(_held(pattern, f"{path}.lora_E", Path(folder, CONFIG_NAME)))
        mask = torch.tensor(kept[path], dtype=torch.bool)
        if rows == sum(kept[path]):  # made of such a folder: what was pruned is in no place
            mask = torch.ones(rows, dtype=torch.bool)
        elif len(kept[path]) != rows:
            raise ValueError(
                f"{folder}: {path} had {len(kept[path])} triplets at first, in the model {rows}; "
                "make the model with the init_r of that training"
            )
        ranknum[path] = with_gradient(layer.ranknum[name]).item()
        for group in GROUPS:
            saved = _held(weights, f"base_model.model.{path}.{group}", file)
            full = getattr(layer, group)[name].detach().cpu().to(saved.dtype, copy=True)
            if group == "lora_E":
                full.zero_()
            place = (slice(None), mask) if group == "lora_B" else mask
            if saved.shape != full[place].shape:
                raise ValueError(
                    f"{file}: {path}.{group} is {list(saved.shape)}, of the model "
                    f"{list(full[place].shape)}"
                )
            full[place] = saved
            triplets[f"{path}.{group}"] = full
    schedule = {field: getattr(saved_config, field) for field in _SCHEDULE}
    schedule["init_bgt"] = sum(map(len, kept.values()))
    averages: dict[str, dict[str, Tensor]] = {average: {} for average in _AVERAGES}
    return AdaLoraState(triplets, averages, kept if pattern else None, ranknum, schedule, -1, None)


def restore_allocator(tuner: AdaLoraModel, state: AdaLoraState) -> None:
    """Set mask, averages and budget; the rest of the schedule is the config's, with a warning."""
    name, allocator = tuner.trainable_adapter_name, tuner.rankallocator
    config = tuner.peft_config[name]
    kept = (state.kept or {}).items()
    config.rank_pattern = {f"{path}.lora_E.{name}": mask for path, mask in kept} or None
    others = [f for f in _SCHEDULE[1:] if getattr(config, f) != state.schedule[f]]
    if others:
        said = [f"{f} {getattr(config, f)} (was {state.schedule[f]})" for f in others]
        warnings.warn(f"AdaLoRA goes on with another schedule: {', '.join(said)}", stacklevel=5)
    allocator.set_total_step(state.schedule["total_step"])
    allocator.init_bgt = state.schedule["init_bgt"]
    allocator.reset_ipt()
    device = next(iter(layers_of(tuner).values())).lora_E[name].device
    for average, held in state.averages.items():
        moved = {f"{key}.{name}": tensor.to(device, copy=True) for key, tensor in held.items()}
        setattr(allocator, average, moved)
    if isinstance(allocator, PatchedRankAllocator):
        allocator._pattern, allocator.rows = None, state.rows
        if state.limits is not None:
            adopt_limits(allocator, state.limits, loaded=True)
        elif state.step >= 0 and allocator.limits_loaded:  # of another checkpoint
            allocator.limits, allocator.limits_loaded = None, False
        if state.averages["exp_avg_ipt"]:
            allocator.adopt_ipt(allocator.triplets(tuner.model))
            if state.scores is not None:
                allocator._importance.scores = state.scores.to(device)
    else:
        allocator.ipt = dict(allocator.exp_avg_ipt)
