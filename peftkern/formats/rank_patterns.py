"""rank_pattern and alpha_pattern of LoRA's config, as PEFT matches them with names of modules."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

PREFIX = "base_model.model."  # of every key in PEFT's files, before the name in the base model
# Patterns that end in the word that a name has to end in, after an escaped or unescaped dot.
_PLAIN = re.compile(r"(?:[\w.\\^]*\.)?(\w+)")


@functools.lru_cache(maxsize=1 << 14)  # re's own cache holds fewer than a config has
def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@functools.lru_cache(maxsize=256)
def _candidates(patterns: tuple[str, ...], last: str) -> list[str]:
    """List the patterns that can match names with this last part: experts have 10^4 names."""
    found = []
    for pattern in patterns:
        plain = _PLAIN.fullmatch(pattern)
        if plain is None or last.endswith(plain[1]):
            found.append(pattern)
    return found


def pattern_key(patterns: Iterable[str], name: str) -> str:
    """Return the first key of rank_pattern or alpha_pattern that matches a name, or the name."""
    possible = _candidates(tuple(patterns), name.rpartition(".")[2])
    return next((pattern for pattern in possible if compiled(pattern).match(name)), name)


def exact_targets(names: Collection[str], others: Collection[str]) -> set[str] | str:
    """Return target_modules of layers by their whole names, of none of the others.

    PEFT also takes what ends in a name: where one of the others does, a regular expression.
    """
    ends = {f".{name}" for name in names}
    for other in others:
        places = (place for place, letter in enumerate(other) if letter == ".")
        if any(other[place:] in ends for place in places):
            return "|".join(map(re.escape, sorted(names)))
    return set(names)


def rank_fields(ranks: Mapping[str, int], r: int | None = None) -> dict[str, Any]:
    """Return the fields of LoRA's config that give modules these ranks, and a scaling of 1.

    Args: r: the rank of modules that no pattern names; None for the one that most have.
    """
    r = r or Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != r}
    patterns: dict[str, int] = {}
    for exact in (False, True):  # a name may match others, or be no regular expression for itself
        patterns = {f"^{re.escape(name)}" if exact else name: rank for name, rank in others.items()}
        with contextlib.suppress(re.error):
            found = {name: patterns.get(pattern_key(patterns, name), r) for name in ranks}
            if found == dict(ranks):
                break
    fields = {"r": r, "lora_alpha": r, "use_rslora": False}
    return {**fields, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}
