"""Adapters of kohya's sd-scripts: one file of `lora_unet_down_blocks_0_..._to_q.lora_down.weight`.

    name     prefix of the component + the module's name with "." written as "_"
    tensors  .lora_down.weight (lora_A), .lora_up.weight (lora_B), .alpha, .dora_scale (magnitude)
    scaling  alpha / rank, 1 without alpha

"_" in a name may have been "." or "_": the base's names decide, and nothing else does. An adapter
that was read keeps the names of the file until `resolve` gives it those of the base.
Source: networks/lora.py of sd-scripts; `dora_scale` as LyCORIS has it and diffusers reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.convert.pairs import check_floating, to_update
from peftkern.tools.adapters.source import Source

FILE = "pytorch_lora_weights.safetensors"  # any name serves sd-scripts; diffusers finds this one
DOWN, UP, ALPHA, DORA = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
_UNET, _TEXT, _TEXT_1, _TEXT_2 = "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"
# Components as diffusers names them. A transformer's modules have other names in sd-scripts.
COMPONENTS = {
    _UNET: "unet",
    _TEXT: "text_encoder",
    _TEXT_1: "text_encoder",
    _TEXT_2: "text_encoder_2",
}
# Of other methods that share files with this one; none is a pair of factors.
_OTHERS = ("hada_", "lokr_", "lora_mid", "oft_", "boft_", "glora_", "on_input", "bias_")


def recognizes(source: Source) -> bool:
    return any(name.endswith((DOWN, UP)) for name in source.tensors)


def read(source: Source, _: str | None = None) -> Adapter:
    """Return the adapter, its modules named as in the file.

    Raises: AdapterError naming the tensor: of another method, without its partner, of a shape that
        does not fit, an alpha that readers take differently.
    """
    where = str(source.path)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.tensors.items():
        module, suffix = _parse(name, where)
        if suffix != ALPHA:
            check_floating(name, tensor, where)
        modules.setdefault(module, {})[suffix] = tensor
    updates = [_update(module, parts, where) for module, parts in modules.items()]
    dora = any(update.magnitude is not None for update in updates)
    return Adapter({"peft_type": "LORA", "use_dora": dora}, {}, {}, where).with_updates(updates)


def _parse(name: str, source: str) -> tuple[str, str]:
    for suffix in (DOWN, UP, ALPHA, DORA):
        module = name.removesuffix(suffix)
        if module != name and module.startswith(tuple(COMPONENTS)):
            return module, suffix
    known = next((part for part in _OTHERS if part in name), None)
    what = f"{known.strip('_.')}, another method's" if known else "another name"
    raise AdapterError(
        f"{source}: {name}: expected {', '.join(COMPONENTS)} and .lora_down.weight, "
        f".lora_up.weight, .alpha or .dora_scale, got {what}"
    )


def _update(module: str, parts: Mapping[str, Tensor], source: str) -> Update:
    for suffix in (DOWN, UP):
        if suffix not in parts:
            raise AdapterError(f"{source}: {module}{suffix}: expected it in the file")
    down, up = parts[DOWN], parts[UP]
    plain = to_update(module, down, up, 1.0, source)
    magnitude = _magnitude(module, parts.get(DORA), up, source)
    alpha = _alpha(module, parts.get(ALPHA), source)
    scaling = 1.0 if alpha is None else alpha / plain.rank
    return dataclasses.replace(plain, scaling=scaling, magnitude=magnitude)


def _alpha(module: str, alpha: Tensor | None, source: str) -> float | None:
    if alpha is None:
        return None
    value = alpha.item() if alpha.numel() == 1 else math.nan
    if not math.isfinite(value) or value == 0:  # 0 is the rank for sd-scripts, and 0 for diffusers
        raise AdapterError(
            f"{source}: {module}{ALPHA}: expected one finite number other than 0, got "
            f"{brief(alpha.flatten()[:4].tolist())}"
        )
    return value


def _magnitude(module: str, scale: Tensor | None, up: Tensor, source: str) -> Tensor | None:
    """Return DoRA's magnitude in PEFT's shape: [m], of a convolution [1, m, 1, 1]."""
    if scale is None:
        return None
    if list(scale.shape) != [up.shape[0], *[1] * (up.ndim - 1)]:  # [1, n]: norms of columns
        raise AdapterError(
            f"{source}: {module}{DORA}: expected a norm for each of {up.shape[0]} outputs, got "
            f"shape {list(scale.shape)}"
        )
    return scale.flatten() if up.ndim == 2 else scale.transpose(0, 1)


def resolve(adapter: Adapter, modules: Iterable[str]) -> Adapter:
    """Give the updates the names of a base's modules, `component.name`.

    Raises: AdapterError for a name that belongs to none of them, or to two.
    """
    known: dict[str, list[str]] = {}
    for name in modules:
        component, _, module = name.partition(".")
        for prefix in (p for p, c in COMPONENTS.items() if c == component):
            known.setdefault(prefix + module.replace(".", "_"), []).append(name)
    updates = []
    for update in adapter.updates.values():
        found = known.get(update.module, [])
        if len(found) != 1:
            which = f"both {' and '.join(found)}" if found else "no module of the base"
            raise AdapterError(f"{adapter.source}: {update.module}: is the name of {which}")
        updates.append(dataclasses.replace(update, module=found[0]))
    return adapter.with_updates(updates)


def write(adapter: Adapter, *, two_encoders: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the metadata of a file; modules are named `component.name` or as read.

    two_encoders: the pipeline has text_encoder_2, so that the first one's prefix is lora_te1_.
    Raises: AdapterError for what the layout cannot hold.
    """
    two_encoders |= any(name.startswith("text_encoder_2.") for name in adapter.updates)
    prefixes = {"unet": _UNET, "text_encoder_2": _TEXT_2}
    prefixes["text_encoder"] = _TEXT_1 if two_encoders else _TEXT
    tensors: dict[str, Tensor] = {}
    for update in adapter.updates.values():
        name = _name(adapter, update, prefixes)
        if name + DOWN in tensors:
            raise AdapterError(
                f"{adapter.source}: {update.module}: another module is {name} in kohya's names, too"
            )
        tensors |= {name + suffix: tensor for suffix, tensor in _parts(update).items()}
    return tensors, {}


def _name(adapter: Adapter, update: Update, prefixes: Mapping[str, str]) -> str:
    if update.kind not in ("linear", "conv") or update.bias is not None:
        what = "lora_B.bias" if update.bias is not None else f"an update of kind {update.kind}"
        raise AdapterError(f"{adapter.source}: {update.key}: kohya's layout cannot hold {what}")
    component, dot, module = update.module.partition(".")
    if dot and component in prefixes:
        return prefixes[component] + module.replace(".", "_")
    if not dot and component.startswith(tuple(COMPONENTS)):
        return component
    raise AdapterError(
        f"{adapter.source}: {update.module}: kohya's layout has modules of "
        f"{', '.join(prefixes)} alone, by names that are those of diffusers with _ for ."
    )


def _parts(update: Update) -> dict[str, Tensor]:
    down, up = update.shaped()
    parts = {DOWN: down, UP: up, ALPHA: torch.tensor(update.scaling * update.rank)}
    if update.magnitude is not None:
        parts[DORA] = update.magnitude.reshape(-1, *[1] * (up.ndim - 1))
    return parts
