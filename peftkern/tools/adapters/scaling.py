r"""Rank and scaling of each module, as PEFT takes them from a config.

r = rank_pattern.get(key, r), alpha = alpha_pattern.get(key, lora_alpha), scaling = alpha / r, or
alpha / sqrt(r) with use_rslora. A key of a pattern is a regular expression, matched by the first
that fits: `(.*\.)?(key)$` from the start of the module's name, of a targeted parameter with the
parameter's. AdaLoRA scales by alpha / (init_r + 1e-5), whatever rank is left; an alpha of 0 or less
means init_r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from peftkern.formats.json_files import brief
from peftkern.formats.rank_patterns import pattern_key
from peftkern.tools.adapters.adapter import AdapterError

_RANKNUM_EPS = 1e-5  # of PEFT's AdaLoRA


class Scale(NamedTuple):
    """Rank that the config says, None where it says none, and scaling."""

    rank: int | None
    scaling: float


def scale_of(config: Mapping[str, Any], name: str, source: str) -> Scale:
    """Return what a config, checked, says of a module, or of a parameter by its full name.

    Raises: AdapterError naming the field: no number, a rank below 1.
    """
    if config["peft_type"] == "ADALORA":
        init_r, alpha = _number(config, "init_r", 12, source), _alpha(config, source)
        if not float(init_r).is_integer() or init_r < 1:
            raise AdapterError(f"{source}: init_r: expected an integer above 0, got {init_r}")
        return Scale(None, (alpha if alpha > 0 else float(init_r)) / (init_r + _RANKNUM_EPS))
    rank = _patterned(config, "rank_pattern", name, source)
    rank = _number(config, "r", 8, source) if rank is None else rank
    alpha = _patterned(config, "alpha_pattern", name, source)
    alpha = _alpha(config, source) if alpha is None else alpha
    if not float(rank).is_integer() or rank < 1:
        raise AdapterError(f"{source}: r: expected an integer above 0 of {name}, got {rank}")
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return Scale(int(rank), alpha / root)


def _alpha(config: Mapping[str, Any], source: str) -> float:
    return _number(config, "lora_alpha", 8, source)


def _patterned(config: Mapping[str, Any], field: str, name: str, source: str) -> float | None:
    patterns = config.get(field) or {}
    key = pattern_key(patterns, name)
    return _number(patterns, key, None, f"{source}: {field}") if key in patterns else None


def _number(values: Mapping[str, Any], key: str, default: Any, source: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{source}: {key}: expected a number, got {brief(value)}")
    return value
