"""AdaLoRA's state for what saves objects: accelerate's `save_state`, torch.distributed.checkpoint.

The triplets are parameters and lie with the model's. Here is the rest, as bytes: a state dict to
load into is of the time before the first step, and none of its entries says how large one is later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.model import AdaLoraModel
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from peftkern.integrations.peft import zero
from peftkern.integrations.peft.adalora import PatchedRankAllocator
from peftkern.integrations.peft.adalora_compact import look_again, rebuild, wrappers_of
from peftkern.integrations.peft.adalora_layers import layers_of, parameters_of
from peftkern.integrations.peft.adalora_state import (
    GROUPS,
    AdaLoraState,
    collect,
    fit,
    on_the_cpu,
    parse,
    restore_allocator,
)
from peftkern.methods.processes import is_sharded

__all__ = ["fit_when_loading", "load_state_dict", "state_dict"]
_SOURCE = "state_dict"


def state_dict(tuner: AdaLoraModel, step: int) -> dict[str, bytes]:
    """Return all but the triplets of what a training needs to go on after `step`.

    Every process has the same; under FSDP2 and ZeRO-3 they gather it together.
    """
    tensors, record = collect(tuner, step, triplets=False)
    return {"record": json.dumps(record).encode(), "tensors": save(on_the_cpu(tensors))}


def load_state_dict(tuner: AdaLoraModel, state: Mapping[str, bytes]) -> int:
    """Set masks, importance and schedule of a model whose parameters are loaded; return the step.

    Raises: ValueError if the state is none of `state_dict`, of other layers, of a budget that a
        model without `peftkern.patch` has no use for, or of other numbers of triplets than the
        parameters. The model is then as it was.
    """
    if not isinstance(state, Mapping) or {"record", "tensors"} - state.keys():
        raise ValueError(f"{_SOURCE}: expected what AdaLoraSteps.state_dict gave")
    read = parse(load(state["tensors"]), json.loads(state["record"]), _SOURCE)
    name, layers = tuner.trainable_adapter_name, layers_of(tuner)
    if read.ranknum.keys() != layers.keys():
        other = sorted(read.ranknum.keys() ^ layers.keys())[0]
        raise ValueError(f"{_SOURCE}: expected the layers of the model, differs in {other}")
    if read.limits is not None and not isinstance(tuner.rankallocator, PatchedRankAllocator):
        raise ValueError("model: expected a patched one, for the state has a budget of peftkern's")
    ranknums = [layer.ranknum[name] for layer in layers.values()]
    with zero.whole(parameters_of(tuner)), zero.whole(ranknums, written=True):
        _set_state(tuner, layers, read)
    return read.step


def _set_state(tuner: AdaLoraModel, layers: dict[str, AdaLoraLayer], read: AdaLoraState) -> None:
    """Check the layers' numbers of triplets, then set all that a state has of them."""
    name = tuner.trainable_adapter_name
    for path, layer in layers.items():
        rows = layer.lora_E[name].shape[0]
        held = sum(read.rows[path]) if read.rows else _init_r(read.averages, read.kept, path, rows)
        if held != rows:
            raise ValueError(
                f"{_SOURCE}: {path} had {held} triplets, in the model {rows}; load the model's "
                "parameters of that step before it"
            )
    resized = read.rows != getattr(tuner.rankallocator, "rows", None)
    wrappers = wrappers_of(tuner) if resized else []
    for path, layer in layers.items():
        layer.ranknum[name].data.fill_(read.ranknum[path])
        layer.r[name] = layer.lora_E[name].shape[0]
    restore_allocator(tuner, read)
    look_again(tuner)
    for wrapper in wrappers:
        rebuild(wrapper)


def _init_r(
    averages: dict[str, dict[str, Tensor]], kept: dict[str, list[bool]] | None, path: str, rows: int
) -> int:
    """Return the triplets of a layer in a state from which none was dropped."""
    average = averages["exp_avg_ipt"].get(f"{path}.lora_E")
    if average is not None:
        return average.shape[0]
    return rows if kept is None else len(kept[path])


def fit_when_loading(tuner: AdaLoraModel) -> list[RemovableHandle]:
    """Let `load_state_dict` of a model take layers of which compaction has dropped triplets.

    It checks shapes before anyone knows of a mask. Returns: what ends it.
    """
    layers = layers_of(tuner).values()
    return [layer.register_load_state_dict_pre_hook(_fit_layer) for layer in layers]


def _fit_layer(layer: AdaLoraLayer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the parameters of a layer the shapes of what they are to hold: other triplets alone."""
    for name, E in layer.lora_E.items():
        loaded = [state.get(f"{prefix}{group}.{name}") for group in GROUPS]
        parameters = [getattr(layer, group)[name] for group in GROUPS]
        if any(not _is_matrix(tensor) for tensor in (*loaded, *parameters)):
            continue
        (rows, _), (_, K), (N, _) = (tensor.shape for tensor in loaded)
        shapes = [(rows, 1), (rows, K), (N, rows)]
        same = (parameters[2].shape[0], parameters[1].shape[1]) == (N, K)
        if same and rows != E.shape[0] and [tuple(t.shape) for t in loaded] == shapes:
            for parameter, tensor in zip(parameters, loaded, strict=True):
                fit(parameter, tensor.to(parameter.dtype))


def _is_matrix(tensor: Any) -> bool:
    """Return whether something is two-dimensional, and all of it here."""
    return isinstance(tensor, Tensor) and tensor.dim() == 2 and not is_sharded(tensor)
