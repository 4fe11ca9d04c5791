"""Readers of adapters: the first of READERS that recognizes a file reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters import experts, peft_keys
from peftkern.tools.adapters.adapter import Adapter, AdapterError
from peftkern.tools.adapters.convert import diffusers, grouped, kohya, mlx
from peftkern.tools.adapters.source import CONFIG, Source, open_source

PEFT = "PEFT"


class Reader(NamedTuple):
    """Format: does a file have it, and what adapter does it then hold."""

    name: str
    recognizes: Callable[[Source], bool]
    read: Callable[[Source, str | None], Adapter]


def read_adapter(path: str | os.PathLike, *, expert_layout: str | None = None) -> Adapter:
    """Read an adapter from a folder, or from a safetensors file.

    Args: expert_layout: one of `experts.LAYOUTS`, where nothing in the file tells; checked against
        what does.
    Returns: an Adapter; tensors in the file's dtype, AdaLoRA's lora_E multiplied into lora_A.
    Raises: AdapterError, one line that names the file and the tensor.
    """
    if expert_layout is not None and expert_layout not in experts.LAYOUTS:
        expected = ", ".join(experts.LAYOUTS)
        raise AdapterError(f"expert_layout: expected one of {expected}, got {expert_layout!r}")
    source = open_source(path)
    return reader_of(source).read(source, expert_layout)


def reader_of(source: Source) -> Reader:
    """Return the reader of a file. Raises: AdapterError if none recognizes it."""
    for reader in READERS:
        if reader.recognizes(source):
            return reader
    first, formats = next(iter(source.tensors)), ", ".join(reader.name for reader in READERS)
    expected = f"tensors as one of {formats} names them"
    if first.startswith(PREFIX):
        expected = f"{CONFIG} with a peft_type beside it"
    raise AdapterError(f"{source.path}: {first}: expected {expected}")


def from_model(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """Return an adapter of a live PEFT model, patched or not. Its tensors are the model's own.

    Scalings are those of the layers, also where a call has changed them since the config.

    Raises: AdapterError for an adapter that the model does not have, or is no low-rank update.
    """
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.lora import LoraLayer

    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(
            f"adapter {adapter_name!r}: the model has {', '.join(configs) or 'no adapter'}"
        )
    known = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            scaling = float(layer.scaling[adapter_name])
            if isinstance(layer, AdaLoraLayer):
                scaling /= float(layer.ranknum[adapter_name]) + 1e-5
            name = name.removeprefix(PREFIX)
            module, _ = experts.split_wrapper(name)
            parameter = getattr(layer, "parameter_name", "weight")
            known[name] = peft_keys.Known(module, parameter, scaling)
    state = _state(model, adapter_name)
    tensors = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    config = _plain(configs[adapter_name].to_dict())
    if config["peft_type"] == "ADALORA":
        config["rank_pattern"] = _cut_triplets(tensors, config.get("rank_pattern"), adapter_name)
    source = f"adapter {adapter_name!r} of {type(model).__name__}"
    return peft_keys.parse(tensors, config, source, known=known)


def _state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors that PEFT saves, of AdaLoRA all triplets."""
    from peft import get_peft_model_state_dict

    config = model.peft_config[adapter_name]
    options = {"adapter_name": adapter_name, "save_embedding_layers": False}
    if getattr(config, "rank_pattern", None) is None or config.peft_type != "ADALORA":
        return get_peft_model_state_dict(model, **options)
    pattern, config.rank_pattern = config.rank_pattern, None  # PEFT cuts by it and renames its keys
    try:  # of a state that it is given PEFT does not complain that ranks of 0 were lost shards
        return get_peft_model_state_dict(model, model.state_dict(), **options)
    finally:
        config.rank_pattern = pattern


def _cut_triplets(
    tensors: dict[str, Tensor], pattern: dict[str, list[bool]] | None, adapter_name: str
) -> dict[str, list[bool]] | None:
    """Cut triplets to those that the last mask kept and those that have revived since.

    Returns: rank_pattern as a file has it.
    """
    if pattern is None:
        return None
    found = {}
    for key, kept in pattern.items():
        name = key.removesuffix(f".{adapter_name}")
        module = PREFIX + name.removesuffix(".lora_E")
        alive = tensors[f"{module}.lora_E"].flatten() != 0
        if len(alive) == len(kept):  # fewer are those that compact_ has left
            alive |= torch.tensor(kept, device=alive.device)
        else:
            alive.fill_(True)
        for group in ("lora_E", "lora_A"):
            tensors[f"{module}.{group}"] = tensors[f"{module}.{group}"][alive]
        tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, alive]
        found[name] = alive.tolist()
    return found


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as its file has it."""
    return json.loads(json.dumps(config, default=lambda value: sorted(value)))


def _is_peft(source: Source) -> bool:
    config = source.config or {}
    return "peft_type" in config


def _read_peft(source: Source, layout: str | None) -> Adapter:
    config_source = str(source.path.with_name(CONFIG))
    return peft_keys.parse(
        source.tensors, source.config, str(source.path), config_source=config_source, layout=layout
    )


READERS = (
    Reader("grouped", grouped.recognizes, grouped.read),
    Reader(PEFT, _is_peft, _read_peft),
    Reader("kohya", kohya.recognizes, kohya.read),
    Reader("mlx", mlx.recognizes, mlx.read),
    Reader("diffusers", diffusers.recognizes, diffusers.read),
)
