"""Adapters of diffusers: pytorch_lora_weights.safetensors, PEFT's tensors under `unet.` and kin.

    name      component + "." + module + `.lora_A.weight` | `.lora_B.weight` | `.lora_B.bias` |
              `.lora_magnitude_vector`
    config    JSON under "lora_adapter_metadata" in the file's header, of each component:
              {"unet.r": 16, "unet.lora_alpha": 16, ...}

Without a config scaling is 1. diffusers gives its fields to LoraConfig; without it, it takes alpha
from the first module where ranks differ, so it is always written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkern.formats.json_files import parse_json
from peftkern.formats.rank_patterns import rank_fields
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update, check_config
from peftkern.tools.adapters.convert.pairs import check_floating, to_update
from peftkern.tools.adapters.scaling import scale_of
from peftkern.tools.adapters.source import Source

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")
COMPONENTS += ("text_encoder_3", "prior", "decoder", "controlnet")
A, B, BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"
_EARLIER = (".lora.down.", ".lora.up.", "lora_linear_layer", "_lora.down", "_lora.up")


def recognizes(source: Source) -> bool:
    heads = tuple(f"{component}." for component in COMPONENTS)
    parts = (A, B, *_EARLIER)
    return any(n.startswith(heads) and any(part in n for part in parts) for n in source.tensors)


def read(opened: Source, _: str | None = None) -> Adapter:
    """Return the adapter; modules are named `component.name`.

    Raises: AdapterError naming the tensor or the field of the config.
    """
    source = str(opened.path)
    configs = _configs(opened.metadata, source)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in opened.tensors.items():
        suffix = next((s for s in (A, B, BIAS, MAGNITUDE) if name.endswith(s)), None)
        if name.endswith(MAGNITUDE + ".weight"):
            suffix = MAGNITUDE + ".weight"
        if suffix is None or name.partition(".")[0] not in COMPONENTS:
            what = "a name of diffusers before 0.26" if any(p in name for p in _EARLIER) else "it"
            raise AdapterError(
                f"{source}: {name}: expected a component ({', '.join(COMPONENTS)}), a module and "
                f"{A}, {B}, {BIAS} or {MAGNITUDE}, got {what}"
            )
        check_floating(name, tensor, source)
        part = MAGNITUDE if suffix.startswith(MAGNITUDE) else suffix
        modules.setdefault(name.removesuffix(suffix), {})[part] = tensor
    updates = [_update(module, parts, configs, source) for module, parts in modules.items()]
    config: dict[str, Any] = {"peft_type": "LORA"}
    config["use_dora"] = any(update.magnitude is not None for update in updates)
    config["lora_bias"] = any(update.bias is not None for update in updates)
    return Adapter(config, {}, {}, source).with_updates(updates)


def _configs(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
    """Return each component's config from the header."""
    text = metadata.get(METADATA)
    try:
        fields = parse_json(text.encode()) if text else {}
    except ValueError as error:
        raise AdapterError(f"{source}: {METADATA}: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterError(f"{source}: {METADATA}: expected an object, got {text!r:.80}")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        configs.setdefault(component, {"peft_type": "LORA"})[field] = value
    for component, config in configs.items():
        check_config(config, f"{source}: {component}")
    return configs


def _update(
    module: str, parts: Mapping[str, Tensor], configs: Mapping[str, dict[str, Any]], source: str
) -> Update:
    for suffix in (A, B):
        if suffix not in parts:
            raise AdapterError(f"{source}: {module}{suffix}: expected it in the file")
    component, _, name = module.partition(".")
    said, scaling = None, 1.0
    if component in configs:
        said, scaling = scale_of(configs[component], name, f"{source}: {component}")
    extra = {"magnitude": parts.get(MAGNITUDE), "bias": parts.get(BIAS)}
    update = to_update(module, parts[A], parts[B], scaling, source, **extra)
    if said not in (None, update.rank):
        raise AdapterError(
            f"{source}: {module}: expected rank {said} as in {METADATA}, got {update.rank}"
        )
    return update


def write(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file, of updates whose scaling is 1.

    Raises: AdapterError for what the layout cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    components: dict[str, dict[str, Update]] = {}
    for update in adapter.updates.values():
        component, _, name = update.module.partition(".")
        if component not in COMPONENTS or update.kind not in ("linear", "conv"):
            what = "an update of kind " + update.kind if component in COMPONENTS else component
            raise AdapterError(
                f"{adapter.source}: {update.key}: diffusers' layout has linear layers and "
                f"convolutions of {', '.join(COMPONENTS)}, and cannot hold {what}"
            )
        tensors |= _parts(update)
        components.setdefault(component, {})[name] = update
    fields: dict[str, Any] = {}
    for component, updates in components.items():
        fields |= {f"{component}.{key}": value for key, value in _config(updates).items()}
    return tensors, {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}


def _parts(update: Update) -> dict[str, Tensor]:
    lora_A, lora_B = update.shaped()
    parts = {A: lora_A, B: lora_B, BIAS: update.bias, MAGNITUDE: update.magnitude}
    return {update.module + s: tensor for s, tensor in parts.items() if tensor is not None}


def _config(updates: Mapping[str, Update]) -> dict[str, Any]:
    """Return the arguments of LoraConfig for one component."""
    return {
        **rank_fields({name: update.rank for name, update in updates.items()}),
        "target_modules": list(updates),
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "lora_bias": any(update.bias is not None for update in updates.values()),
        "bias": "none",
    }
