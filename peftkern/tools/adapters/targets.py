"""Names of a config against names of modules, as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peftkern.formats.rank_patterns import pattern_key


def is_module_target(config: Mapping[str, Any], module: str) -> bool:
    """Return whether target_modules names a module itself."""
    named = config.get("target_modules") or []
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(_ends([module], name) for name in named)


def parameter_targets(config: Mapping[str, Any], module: str) -> Iterator[str]:
    """Yield the parameters of a module that target_parameters may name."""
    for target in config.get("target_parameters") or []:
        path, _, parameter = target.rpartition(".")
        if not path or _ends([module], path):
            yield parameter


def target_name(config: Mapping[str, Any], module: str, parameter: str) -> str:
    """Return the name that patterns match: of a module, or of a parameter that is targeted."""
    apart = parameter != "weight"
    if not apart and "weight" in parameter_targets(config, module):
        apart = not is_module_target(config, module)
    return f"{module}.{parameter}" if apart else module


def exact_targets(config: Mapping[str, Any], names: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a config that name exactly these (module, parameter)."""
    fields = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    modules, parameters = [], []
    for module, parameter in names:
        name = target_name(config, module, parameter)
        (modules if name == module else parameters).append(name)
    return {**fields, "target_modules": modules, "target_parameters": parameters or None}


def unused(config: Mapping[str, Any], names: Iterable[str], extras: Iterable[str]) -> list[str]:
    """List "field: entry" of what a config names and the file has nothing of.

    Args: names: of all updates, as `target_name`; extras: keys of the other tensors.
    """
    names, extras = list(names), list(extras)
    found = []
    if config["peft_type"] == "LORA":  # AdaLoRA's rank_pattern holds masks, by name
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(field) or {}
            used = {pattern_key(patterns, name) for name in names}
            found += [f"{field}: {key}" for key in patterns if key not in used]
    for field in ("target_modules", "target_parameters"):
        listed = config.get(field) if isinstance(config.get(field), list) else None
        found += [f"{field}: {one}" for one in listed or [] if not _ends(names, one)]
    for one in config.get("modules_to_save") or []:
        if not any(f".{one}." in key for key in extras):
            found.append(f"modules_to_save: {one}")
    if config.get("trainable_token_indices") and not any("trainable_tokens" in k for k in extras):
        found.append("trainable_token_indices")
    return found


def _ends(names: Iterable[str], end: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for name in names)
