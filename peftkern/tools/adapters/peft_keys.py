"""Tensors as PEFT names them, in a file or in a live model, as updates and extras.

    base_model.model.<module>.lora_A.weight [r, n], .lora_B.weight [m, r], .lora_B.bias [m]
                             .lora_embedding_A [r, V], .lora_embedding_B [d, r]
                             .lora_magnitude_vector            DoRA
                             .lora_A, .lora_B, .lora_E [r, 1]  AdaLoRA

Everything else that is not called lora_ is an extra. Keys decide, not target_modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters import experts
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update, check_config
from peftkern.tools.adapters.scaling import scale_of
from peftkern.tools.adapters.targets import target_name, unused

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]"
    r"|lora_magnitude_vector(\.weight)?|lora_[ABE])"
)
_SHORT = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias"}
_SHORT |= {"lora_embedding_A": "EA", "lora_embedding_B": "EB", "lora_magnitude_vector": "magnitude"}
_SHORT |= {"lora_magnitude_vector.weight": "magnitude", "lora_A": "a", "lora_B": "b", "lora_E": "e"}
_FACTORS = ({"A", "B"}, {"EA", "EB"}, {"a", "b", "e"})  # a module has those of one kind
_HIDDEN = re.compile(r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj|query_key_value)$")


class Known(NamedTuple):
    """What a live layer says of itself: what it wraps, and its scaling now."""

    module: str
    parameter: str
    scaling: float


class _Found(NamedTuple):
    """Tensors of one wrapper by their short names, and the key of each."""

    tensors: dict[str, Tensor]
    keys: dict[str, str]


def parse(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    source: str,
    *,
    config_source: str = "",
    layout: str | None = None,
    known: Mapping[str, Known] | None = None,
) -> Adapter:
    """Return the adapter that these tensors are.

    Args: source and config_source, for messages; layout: of experts, where nothing tells; known:
        of a live model, by the name of each layer.
    Raises: AdapterError naming source and tensor: of another method, without its pair, of a shape
        or rank that disagrees with its pair or with the config, or not told apart.
    """
    config_source = config_source or source
    check_config(config, config_source)
    found, extras = _sort(tensors, source)
    if not found:
        raise AdapterError(f"{source}: {next(iter(tensors))}: no tensor is of a LoRA adapter")
    for name, one in found.items():
        _check_parts(name, one, config, source)
    if known is None:
        wrappers = [name for name, one in found.items() if _two_dimensional(one)]
        wrapped = experts.wrapped_parameters(config, wrappers, source)
    else:
        wrapped = {name: (one.module, one.parameter) for name, one in known.items()}
    updates: dict[str, Update] = {}
    counts: dict[str, int] = {}  # of the experts of stacks
    names = []
    for name, one in found.items():
        module, parameter = wrapped.get(name, (name, "weight"))
        names.append(target_name(config, module, parameter))
        scale = scale_of(config, names[-1], config_source)
        count = _count(one, scale.rank or _masked(config, module, config_source), parameter, source)
        scaling = scale.scaling if known is None else known[name].scaling
        update = _update(module, parameter, one, scaling)
        updates[update.key] = update
        if count > 1:
            counts[update.key] = count
    notes = [f"without effect: {entry}" for entry in unused(config, names, extras)]
    if counts:
        found_layout, evidence = "peft", "a live model"
        if known is None:
            stacks, hidden = [updates[key] for key in counts], _hidden_size(updates)
            found_layout, evidence = experts.find_layout(config, stacks, hidden, layout, source)
        notes.insert(0, f"experts in layout {found_layout}: {evidence}")
        for key, count in counts.items():
            flat = updates[key]
            A, B = experts.regroup(flat.lora_A, flat.lora_B, count, found_layout)
            updates[key] = replace(flat, kind="experts", lora_A=A, lora_B=B)
    return Adapter(config, updates, extras, source, tuple(notes))


def _sort(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, _Found], dict[str, Tensor]]:
    """Sort tensors by wrapper; what is no factor is an extra, under its key in the file."""
    found: dict[str, _Found] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterError(f"{source}: {key}: expected a name that begins with {PREFIX}")
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            if ".lora_" in key:
                raise AdapterError(f"{source}: {key}: no tensor of LoRA, DoRA or AdaLoRA")
            extras[key] = tensor
            continue
        if not tensor.is_floating_point():
            raise AdapterError(f"{source}: {key}: expected floating point, got {tensor.dtype}")
        one = found.setdefault(match["module"], _Found({}, {}))
        part = _SHORT[match["part"]]
        if part in one.tensors:
            raise AdapterError(f"{source}: {key}: the same as {one.keys[part]}")
        one.tensors[part], one.keys[part] = tensor, key
    return found, extras


def _check_parts(name: str, one: _Found, config: Mapping[str, Any], source: str) -> None:
    """Check that a wrapper has all parts of one kind, and those that the config promises."""
    parts = one.tensors.keys() - {"bias", "magnitude"}
    first = next(iter(one.keys.values()))
    if parts not in _FACTORS:
        kind = next((kind for kind in _FACTORS if parts < kind), None)
        short = {value: part for part, value in _SHORT.items()}
        lacks = ", ".join(sorted(short[part] for part in kind - parts)) if kind else ""
        why = f"without its {lacks}" if kind else "its module has factors of two methods"
        raise AdapterError(f"{source}: {first}: {why}")
    adalora = "e" in parts
    if adalora != (config["peft_type"] == "ADALORA"):
        raise AdapterError(f"{source}: {first}: not of peft_type {config['peft_type']}")
    for field, part in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        if bool(config.get(field)) and part not in one.tensors:
            raise AdapterError(f"{source}: {PREFIX}{name}: {field} is set, and it has none")
        if part in one.tensors and not config.get(field):
            raise AdapterError(f"{source}: {one.keys[part]}: {field} is not set")


def _two_dimensional(one: _Found) -> bool:
    return "A" in one.tensors and one.tensors["A"].dim() == one.tensors["B"].dim() == 2


def _count(one: _Found, expected: int, parameter: str, source: str) -> int:
    """Check shapes against each other and the rank of the config; return the number of experts."""
    (A, B), where = _pair(one), f"{source}: {next(iter(one.keys.values()))}"
    shapes = f"{list(A.shape)} and {list(B.shape)}"
    conv, rank = A.dim() > 2, A.shape[0] if A.dim() else 0
    if A.dim() < 2 or A.dim() != B.dim() or (conv and math.prod(B.shape[2:]) != 1):
        raise AdapterError(f"{where}: {shapes} are no pair of factors")
    if B.shape[1] != rank:
        grouped = ", or its convolution has groups" if conv else ""
        raise AdapterError(f"{where}: expected one rank, got {shapes}{grouped}")
    if 0 in (*A.shape[1:], B.shape[0]) or (rank == 0 and expected):
        raise AdapterError(f"{where}: {shapes} are empty")
    count = rank // expected if parameter != "weight" and rank % expected == 0 else 1
    if rank != expected * count:
        raise AdapterError(f"{where}: {list(A.shape)} has rank {rank}, the config says {expected}")
    for part, size in (("bias", B.shape[0]), ("magnitude", B.shape[0]), ("e", rank)):
        tensor = one.tensors.get(part)
        if tensor is not None and tensor.numel() != size:
            raise AdapterError(f"{source}: {one.keys[part]}: {list(tensor.shape)} beside {shapes}")
    return count


def _pair(one: _Found) -> tuple[Tensor, Tensor]:
    return next((one.tensors[a], one.tensors[b]) for a, b in ("AB", ("EA", "EB"), "ab")
                if a in one.tensors)  # fmt: skip


def _masked(config: Mapping[str, Any], key: str, source: str) -> int:
    """Return the rank that AdaLoRA's config says is left of a module."""
    mask = (config.get("rank_pattern") or {}).get(f"{key}.lora_E")
    if mask is None:
        return int(config.get("init_r", 12))
    if not isinstance(mask, list) or not all(isinstance(one, bool) for one in mask):
        raise AdapterError(f"{source}: rank_pattern: {key}: expected a list of true and false")
    return sum(mask)


def _update(module: str, parameter: str, one: _Found, scaling: float) -> Update:
    A, B = _pair(one)
    rest = {"magnitude": one.tensors.get("magnitude"), "bias": one.tensors.get("bias")}
    if "EA" in one.tensors:
        return Update(module, parameter, "embedding", A, B, scaling, **rest)
    if A.dim() > 2:
        shape = tuple(A.shape)
        return Update(module, parameter, "conv", A.flatten(1), B.flatten(1), scaling, shape, **rest)
    if "e" in one.tensors:  # as PEFT multiplies them, in float32
        A = A.float() * one.tensors["e"].float()
    return Update(module, parameter, "linear", A, B, scaling, **rest)


def _hidden_size(updates: Mapping[str, Update]) -> int | None:
    """Return the inputs of the attention's projections, if all agree."""
    sizes = {u.size[1] for name, u in updates.items() if _HIDDEN.search(name)}
    return sizes.pop() if len(sizes) == 1 else None


def named(update: Update, parameters: Mapping[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """Yield what PEFT's file has for an update.

    Args: parameters: of each module, those that have an update.
    """
    name, (A, B) = PREFIX + update.module, update.shaped()
    if update.parameter != "weight":
        name = PREFIX + experts.wrapper(update.module, update.parameter, parameters[update.module])
    if update.kind == "experts":
        A, B = experts.ungroup(A, B)
    if update.kind == "embedding":
        yield from ((f"{name}.lora_embedding_A", A), (f"{name}.lora_embedding_B", B))
    else:
        yield from ((f"{name}.lora_A.weight", A), (f"{name}.lora_B.weight", B))
    if update.bias is not None:
        yield f"{name}.lora_B.bias", update.bias
    if update.magnitude is not None:
        yield f"{name}.lora_magnitude_vector", update.magnitude
