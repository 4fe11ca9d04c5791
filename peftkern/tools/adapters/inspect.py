"""What is in an adapter: the spectrum of every update, and what its file and config tell.

All spectra come from one call of `low_rank_svdvals`: no update is formed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from peftkern.functional.low_rank_svd import low_rank_svdvals, spectral_stats
from peftkern.tools.adapters.adapter import (
    UNMERGEABLE,
    Adapter,
    changed_base,
    named_tensors,
    not_finite,
)

_TABLES = ".base_layer.weight"  # of the base, which loading overwrites
_REAL_RANKS = ("stable_rank", "effective_rank")


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one update scaling * B A, of a stack of experts that of one of them.

    rank: of the factors; true_rank: of their product, up to float64's rounding of it.
    energy: |update|_F^2. Without numbers (NaN) where a factor is not finite.
    """

    key: str
    kind: str
    expert: int | None
    size: tuple[int, int]
    rank: int
    true_rank: int
    scaling: float
    energy: float
    stable_rank: float
    effective_rank: float
    sigma: tuple[float, ...]

    @property
    def norm(self) -> float:
        return math.sqrt(self.energy)


@dataclass(frozen=True)
class Inspection:
    """Spectra of all updates, and the tensors that are not finite, each with a count."""

    adapter: Adapter
    spectra: tuple[Spectrum, ...]
    not_finite: dict[str, int]

    @property
    def norm(self) -> float:
        return math.sqrt(_total(self.spectra))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in named_tensors(self.adapter))

    @property
    def dtypes(self) -> dict[str, int]:
        """Count the factors of each dtype."""
        updates = self.adapter.updates.values()
        found = (tensor.dtype for one in updates for tensor in (one.lora_A, one.lora_B))
        return dict(Counter(str(dtype).removeprefix("torch.") for dtype in found).most_common())

    @property
    def tables(self) -> dict[str, list[int]]:
        """Tables of the base inside the file, by shape: loading replaces the base's with them."""
        extras = self.adapter.extras.items()
        return {name: list(one.shape) for name, one in extras if name.endswith(_TABLES)}

    @property
    def refusals(self) -> list[str]:
        """List what a merge of this adapter into its base's original weights runs into."""
        config = self.adapter.config
        found = [f"{name}: {why}" for name, why in UNMERGEABLE.items() if config.get(name)]
        if init := changed_base(config):
            found.append(f"init_lora_weights: {init} changed the base, the update is of that one")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON: an update for each expert, None for what is not finite."""
        config, adapter = self.adapter.config, self.adapter
        return {
            "source": adapter.source,
            "method": method(config),
            "base": config.get("base_model_name_or_path"),
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "norm": finite(self.norm),
            "updates": [
                {name: finite(value) for name, value in asdict(one).items()}
                | {"norm": finite(one.norm)}
                for one in self.spectra
            ],
            "not_finite": self.not_finite,
            "extras": {name: list(tensor.shape) for name, tensor in adapter.extras.items()},
            "base_tables": self.tables,
            "refusals": self.refusals,
            "notes": list(adapter.notes),
        }


@dataclass(frozen=True)
class Row:
    """Updates of one name together: least and largest of what differs, medians of the ranks that
    are no integers; share of all energy."""

    name: str
    count: int
    sizes: tuple[tuple[int, int], ...]
    rank: tuple[int, int]
    true_rank: tuple[int, int]
    scaling: tuple[float, float]
    norm: float
    share: float
    stable_rank: float
    effective_rank: float


def inspect(adapter: Adapter) -> Inspection:
    """Compute the spectra of all updates of an adapter."""
    flat = [
        (update, number if update.kind == "experts" else None, B, A)
        for update in sorted(adapter.updates.values(), key=lambda one: _in_order(one.key))
        for number, (B, A) in enumerate(update.pairs())
    ]
    factors = [one[2].detach() for one in flat], [one[3].detach() for one in flat]
    S = low_rank_svdvals(*factors, [one[0].scaling for one in flat])
    stats = torch.stack(spectral_stats(S), 1).tolist()
    spectra = []
    for (update, expert, _, _), values, numbers in zip(flat, S, stats, strict=True):
        sigma = tuple(values.tolist())
        ranks = update.rank, sum(value > 0 for value in sigma)
        given = update.key, update.kind, expert, update.size, *ranks, update.scaling
        spectra.append(Spectrum(*given, *numbers, sigma))
    bad = {name: not_finite(tensor) for name, tensor in named_tensors(adapter)}
    return Inspection(adapter, tuple(spectra), {name: n for name, n in bad.items() if n})


def _in_order(key: str) -> list[tuple[int, str]]:
    """Return what sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in key.split(".")]


def rows(spectra: Sequence[Spectrum], name: Callable[[Spectrum], str]) -> list[Row]:
    """Put the spectra of one name together."""
    groups: dict[str, list[Spectrum]] = {}
    for one in spectra:
        groups.setdefault(name(one), []).append(one)
    total = _total(spectra)
    return [_row(name, parts, total) for name, parts in groups.items()]


def _total(spectra: Iterable[Spectrum]) -> float:
    """Return the energy of all updates that have one."""
    return sum(one.energy for one in spectra if not math.isnan(one.energy))


def _row(name: str, parts: list[Spectrum], total: float) -> Row:
    energy = sum(one.energy for one in parts)
    ranges = (
        (min(values), max(values))
        for values in zip(*((one.rank, one.true_rank, one.scaling) for one in parts), strict=True)
    )
    sizes = tuple(dict.fromkeys(one.size for one in parts))
    middle = (median(getattr(one, field) for one in parts) for field in _REAL_RANKS)
    share = energy / total if total else 0.0
    return Row(name, len(parts), sizes, *ranges, math.sqrt(energy), share, *middle)


def labels(keys: Iterable[str]) -> dict[str, str]:
    """Name what modules of all layers have in common: the end of their names that tells them apart
    from others, with * for numbers."""
    kinds = {key: re.sub(r"(?<![^.])\d+(?![^.])", "*", key) for key in keys}
    found = {kind: kind.rpartition(".")[2] for kind in kinds.values()}
    while len(set(found.values())) < len(found):
        seen = Counter(found.values())
        for kind, label in found.items():
            if seen[label] > 1 and len(label) < len(kind):
                found[kind] = kind[: -len(label) - 1].rpartition(".")[2] + "." + label
    return {key: found[kind] for key, kind in kinds.items()}


def method(config: Mapping[str, Any]) -> str:
    """Name the method of a config."""
    if config["peft_type"] == "ADALORA":
        return "AdaLoRA"
    name = "DoRA" if config.get("use_dora") else "LoRA"
    return f"{name}, rank-stabilized" if config.get("use_rslora") else name


def finite(value: Any) -> Any:
    """Return a value for JSON: None for what is not finite."""
    if isinstance(value, tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
