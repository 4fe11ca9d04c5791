"""Ranks of layers from a file: what `peftkern ranks --json` printed, or a config of LoRA."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkern.formats.json_files import brief, read_json
from peftkern.tools.checkpoints.checkpoint import CheckpointError


def read_ranks(path: Path) -> tuple[dict[str, Any], tuple[str, ...] | str]:
    """Read settings of a `Request`, and the names of the layers, or a regular expression for them.

    Raises: CheckpointError naming the file, or the field.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise CheckpointError(f"ranks: {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"ranks: {error}") from None
    config = value.get("config", value) if isinstance(value, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"ranks: {path}: expected what `peftkern ranks --json` prints, got {brief(value)}"
        )
    if config.get("target_parameters"):
        config = {**config, "target_modules": _with_parameters(config, path)}
    for name, (_, holds, expected) in _FIELDS.items():
        needed = name in ("r", "target_modules")
        if (needed or name in config) and not holds(config.get(name)):
            came = brief(config.get(name))
            raise CheckpointError(f"ranks: {path}: {name}: expected {expected}, got {came}")
    found = {own: config[name] for name, (own, _, _) in _FIELDS.items() if own and name in config}
    targets = config["target_modules"]
    return found, targets if isinstance(targets, str) else tuple(targets)


def _with_parameters(config: dict[str, Any], path: Path) -> list[str]:
    """Return the names of layers and those of parameters of experts. Raises: CheckpointError."""
    modules, parameters = config.get("target_modules") or [], config["target_parameters"]
    if not _is_targets(parameters) or isinstance(parameters, str):
        name, came, expected = "target_parameters", parameters, "a list of names"
    elif isinstance(modules, list):
        return [*modules, *parameters]
    else:
        name, came, expected = "target_modules", modules, "a list beside target_parameters"
    raise CheckpointError(f"ranks: {path}: {name}: expected {expected}, got {brief(came)}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_targets(value: Any) -> bool:
    if isinstance(value, str):
        with contextlib.suppress(re.error):
            return bool(value) and re.compile(value) is not None
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


# {field of LoraConfig: (that of Request, what it has to be, in words)}
_FIELDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "r": ("rank", _is_rank, "a positive integer"),
    "lora_alpha": ("alpha", _is_alpha, "a number above 0"),
    "use_rslora": ("rslora", lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": ("rank_pattern", _all(_is_rank), "{layer: positive integer}"),
    "alpha_pattern": ("alpha_pattern", _all(_is_alpha), "{layer: number above 0}"),
    "target_modules": ("", _is_targets, "a list of names, or a regular expression"),
}
