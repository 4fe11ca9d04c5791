"""Adapters of mlx-lm: adapters.safetensors beside its own adapter_config.json.

    linear     lora_a [n, r], lora_b [r, m]: both transposed
    embedding  lora_a [V, r], lora_b [r, d]: both transposed, too
    experts    lora_a [E, r, n], lora_b [E, m, r], of gate_proj, up_proj and down_proj apart
    DoRA       m [m]; of an embedding [V], which has no counterpart in PEFT
    scaling    lora_parameters.scale itself, of all modules

mlx-lm wraps the modules that lora_parameters.keys names in the last num_layers layers, -1 for all,
and then takes the tensors of the file in whatever rank they have: modules without any keep a
lora_b of zeros. Its stacks of experts are called `switch_mlp` where transformers has `experts`.
Source: mlx_lm/tuner/{lora,dora,utils}.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.convert.pairs import check_floating
from peftkern.tools.adapters.convert.per_expert import (
    PROJECTIONS,
    checkpoint_name,
    fused_parameters,
    model_name,
    projections,
)
from peftkern.tools.adapters.source import CONFIG, Source

FILE = "adapters.safetensors"
A, B, M = ".lora_a", ".lora_b", ".m"
# The modules of mlx-lm that are tables of rows by token: a pair of 2-D tensors does not tell.
_TABLES = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"}
_TABLE_DORA = "of DoRA on an embedding mlx-lm has the norm of each token, PEFT of each feature"
_SWITCH, _EXPERTS = "switch_mlp", "experts"
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.(.+)")


def recognizes(source: Source) -> bool:
    return any(name.endswith((A, B)) for name in source.tensors)


def read(opened: Source, _: str | None = None) -> Adapter:
    """Return the adapter, with the names that transformers has.

    Raises: AdapterError naming the tensor or the field of the config.
    """
    source, config = str(opened.path), opened.config
    if config is None:
        raise AdapterError(f"{source}: expected {CONFIG} beside it, which has the scaling")
    scaling, dora = _settings(config, source)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in opened.tensors.items():
        module, dot, part = name.rpartition(".")
        if dot + part not in ((A, B, M) if dora else (A, B)) or not module:
            raise AdapterError(
                f"{source}: {name}: expected a module and {A}, {B}{' or ' + M if dora else ''}"
            )
        check_floating(name, tensor, source)
        modules.setdefault(module, {})[dot + part] = tensor
    updates: list[Update] = []
    stacks: dict[str, dict[str, Update]] = {}
    notes: list[str] = []
    for module, parts in modules.items():
        update = _update(module, parts, scaling, source)
        if update.kind == "experts":
            stacks.setdefault(update.module, {})[update.parameter] = update
        else:
            updates.append(update)
        if update.kind == "embedding":
            notes.append(f"{module}: taken for an embedding by its name")
    for module, apart in stacks.items():
        pairs = {name: (one.lora_A, one.lora_B) for name, one in apart.items()}
        for parameter, pair in fused_parameters(source, module, pairs):
            updates.append(Update(module, parameter, "experts", *pair, scaling))
    base = config.get("model")
    fields = {"peft_type": "LORA", "use_dora": dora, "base_model_name_or_path": base}
    return Adapter(fields, {}, {}, source, tuple(notes)).with_updates(updates)


def _settings(config: Mapping[str, Any], source: str) -> tuple[float, bool]:
    """Return scaling, and whether it is DoRA."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or config.get("adapter_quantization"):
        what = f"fine_tune_type {brief(kind)}" if kind not in ("lora", "dora") else "4-bit factors"
        raise AdapterError(f"{source}: expected fine_tune_type lora or dora, got {what}")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterError(
            f"{source}: lora_parameters.scale: expected a number, got {brief(scale)}"
        )
    return float(scale), kind == "dora"


def _update(module: str, parts: Mapping[str, Tensor], scaling: float, source: str) -> Update:
    for part in (A, B):
        if part not in parts:
            raise AdapterError(f"{source}: {module}{part}: expected it in the file")
    lora_a, lora_b = parts[A], parts[B]
    if lora_a.ndim == lora_b.ndim == 3:
        fits = lora_a.shape[:2] == (lora_b.shape[0], lora_b.shape[2]) and M not in parts
        holder, _, name = module.rpartition(".")
        fits &= name in PROJECTIONS
        if holder.endswith(_SWITCH):
            holder = model_name(holder.removesuffix(_SWITCH) + _EXPERTS)
        if fits:
            return Update(holder, name, "experts", lora_a, lora_b, scaling)
    elif lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[1] == lora_b.shape[0]:
        kind = "embedding" if module.rpartition(".")[2] in _TABLES else "linear"
        magnitude = parts.get(M)
        if magnitude is not None and kind == "embedding":
            raise AdapterError(f"{source}: {module}{M}: {_TABLE_DORA}")
        if magnitude is not None and magnitude.numel() != lora_b.shape[1]:
            raise AdapterError(
                f"{source}: {module}{M}: expected [{lora_b.shape[1]}], as lora_b has outputs, got "
                f"{list(magnitude.shape)}"
            )
        return Update(module, "weight", kind, lora_a.T, lora_b.T, scaling, magnitude=magnitude)
    raise AdapterError(
        f"{source}: {module}: expected lora_a [n, r] and lora_b [r, m], or those of the experts' "
        f"{', '.join(PROJECTIONS)}, [E, r, n] and [E, m, r], got {list(lora_a.shape)} and "
        f"{list(lora_b.shape)}"
    )


def write(adapter: Adapter, *, mixtral: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config, of updates whose scaling is 1.

    mixtral: its experts are in a block_sparse_moe.

    Raises: AdapterError for what the layout cannot hold.
    """
    dora = [update for update in adapter.updates.values() if update.magnitude is not None]
    tensors: dict[str, Tensor] = {}
    for update in adapter.updates.values():
        if update.kind not in ("linear", "embedding", "experts") or update.bias is not None:
            what = "lora_B.bias" if update.bias is not None else update.kind
            raise AdapterError(
                f"{adapter.source}: {update.key}: mlx-lm's layout cannot hold {what}"
            )
        if update.kind == "embedding" and update.magnitude is not None:
            raise AdapterError(f"{adapter.source}: {update.key}: {_TABLE_DORA}")
        if dora and update.magnitude is None:
            raise AdapterError(
                f"{adapter.source}: {update.key}: mlx-lm's layout has DoRA in all modules or none, "
                f"{dora[0].key} has it"
            )
        tensors |= _parts(adapter, update, mixtral)
    keys = dict.fromkeys(_key(name.rpartition(".")[0]) for name in tensors)
    return tensors, {
        "fine_tune_type": "dora" if dora else "lora",
        "model": adapter.config.get("base_model_name_or_path"),
        "num_layers": -1,
        "lora_parameters": {
            "rank": max(update.rank for update in adapter.updates.values()),
            "scale": 1.0,
            "dropout": 0.0,
            "keys": list(keys),
        },
    }


def _parts(adapter: Adapter, update: Update, mixtral: bool) -> dict[str, Tensor]:
    if update.kind == "experts":
        holder = checkpoint_name(update.module, mixtral)
        if holder.endswith(_EXPERTS):
            holder = holder.removesuffix(_EXPERTS) + _SWITCH
        found = {}
        for name, (lora_A, lora_B) in projections(adapter, update):
            found |= {f"{holder}.{name}{A}": lora_A, f"{holder}.{name}{B}": lora_B}
        return found
    parts = {A: update.lora_A.T, B: update.lora_B.T, M: update.magnitude}
    return {update.module + part: tensor for part, tensor in parts.items() if tensor is not None}


def _key(module: str) -> str:
    """Return what lora_parameters.keys calls a module: its name within its layer, if it has one."""
    found = _LAYER.fullmatch(module)
    return found[1] if found else module
