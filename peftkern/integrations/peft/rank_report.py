"""Ranks that were chosen before training, as a config of PEFT's, as Python and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
from peft import LoraConfig

from peftkern.formats.rank_patterns import exact_targets, rank_fields
from peftkern.methods.rank_choice import LayerRank

__all__ = ["RankReport"]

_UNTOLD = ("base_model_name_or_path", "peft_type", "peft_version", "revision", "runtime_config")


@dataclass(frozen=True)
class RankReport:
    """Report of `peftkern.suggest_ranks` and `peftkern ranks`.

    by: what the ranks were chosen by. layers: in the order of the model. config: for
    `get_peft_model`, with rank_pattern, and alpha_pattern so that the scaling of every layer stays
    that of the config that was given. budget and unit: what all layers may cost, in "rank",
    in "parameters", or in "cost" if each layer's was given. uniform: parameters of LoRA of that
    config's rank. skipped: {name: reason} of targets whose rank
    stays.
    """

    by: str
    layers: tuple[LayerRank, ...]
    config: LoraConfig
    budget: float
    unit: str = "rank"
    uniform: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: rank}, 0 for those without an adapter."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def unreached(self) -> dict[str, str]:
        """{layer: what of it the data did not reach}: its rank says nothing of the task."""
        return {layer.name: layer.unreached for layer in self.layers if layer.unreached}

    @property
    def spent(self) -> float:
        """What the ranks cost, in units of the budget."""
        return sum(layer.rank * layer.cost for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of trained parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def certificate(self) -> float | None:
        """Largest bound on the excess error of a layer's spectrum; None if there is none."""
        return max((la.certificate for la in self.layers if la.certificate is not None),
                   default=None)  # fmt: skip

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the config that differ from PEFT's defaults, fit for json.dumps."""
        return {name: _plain(value) for name, value in _told(self.config).items()}

    def python(self) -> str:
        """Return a program that makes the config."""
        told = _told(self.config)
        imports: dict[str, set[str]] = {"peft": {"LoraConfig"}}
        for kind in (type(v) for v in told.values() if dataclasses.is_dataclass(v)):
            name = kind.__name__  # of which peft gives some only where they are defined
            module = "peft" if hasattr(peft, name) else kind.__module__
            imports.setdefault(module, set()).add(name)
        lines = [f"from {module} import {', '.join(sorted(n))}" for module, n in imports.items()]
        lines += ["", "config = LoraConfig("]
        for name, value in told.items():
            value = value if dataclasses.is_dataclass(value) else _plain(value)
            if isinstance(value, dict) and value:
                lines.append(f"    {name}={{")
                lines += [f"        {key!r}: {one!r}," for key, one in value.items()]
                lines.append("    },")
            else:
                lines.append(f"    {name}={value!r},")
        return "\n".join([*lines, ")"]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as values fit for json.dumps."""
        layers = [
            {**asdict(layer), "shape": list(layer.shape), "S": list(layer.S)}
            for layer in self.layers
        ]
        return {
            "by": self.by,
            "budget": self.budget,
            "unit": self.unit,
            "spent": self.spent,
            "parameters": self.parameters,
            "uniform_parameters": self.uniform,
            "layers": layers,
            "skipped": dict(self.skipped),
            "config": self.config_fields(),
        }

    def __str__(self) -> str:
        ranks = sorted(self.ranks.values())
        said = [
            f"ranks by {self.by}: {len(ranks)} layers, ranks {ranks[0]} to {ranks[-1]}",
            f"{self.spent:,.6g} of a budget of {self.budget:,.6g} in {self.unit}",
            f"{self.parameters:,} parameters (LoRA: {self.uniform:,})",
        ]
        if 0 in ranks:
            said.append(f"{ranks.count(0)} without an adapter")
        if self.certificate is not None:
            said.append(
                f"excess error of the spectra at most {self.certificate:.1e}, of each with "
                "probability 0.999"
            )
        if self.unreached:
            said.append(f"{len(self.unreached)} not reached by the data")
        if self.skipped:
            said.append(f"{len(self.skipped)} keep their rank")
        return ", ".join(said)


def _told(config: LoraConfig) -> dict[str, Any]:
    """Return the fields of a config that differ from the defaults, in order."""
    default = LoraConfig()
    found = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    return {
        name: value
        for name, value in found.items()
        if name in ("r", "lora_alpha")
        or (name not in _UNTOLD and value != getattr(default, name, None))
    }


def _plain(value: Any) -> Any:
    """Return a value of a config for JSON, and for people: a set in order, an enum as its text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value):
        return asdict(value)
    return str(value.value) if hasattr(value, "value") else value


def ranked_config(
    config: LoraConfig,
    ranks: Mapping[str, int],
    others: Sequence[str] = (),
    parameters: Collection[str] = (),
) -> LoraConfig:
    """Return a copy of a config that gives layers these ranks, each with the scaling it had.

    Args: ranks, {layer: rank}; those of rank 0 are no targets any more. others, layers that the
        config targets, too, whose rank stays. parameters, which of both are those of
        `target_parameters`.
    """
    found = copy(config)
    kept = {name: rank for name, rank in ranks.items() if rank}
    kept |= dict.fromkeys(others, config.r)
    # What is no linear layer has no pattern, and the rank it had.
    fields = rank_fields(kept, config.r if others else None)
    found.r, found.rank_pattern = fields["r"], fields["rank_pattern"]
    found.lora_alpha, found.alpha_pattern = config.lora_alpha, {}
    if not config.use_rslora:  # whose alpha / sqrt(r) is meant to differ with the rank
        scaling = config.lora_alpha / config.r
        found.lora_alpha = _whole(scaling * found.r)
        patterns = fields["alpha_pattern"].items()
        found.alpha_pattern = {key: _whole(scaling * rank) for key, rank in patterns}
    dropped = ranks.keys() - kept.keys()
    if dropped.intersection(parameters):
        found.target_parameters = [name for name in kept if name in parameters] or None
    if dropped.difference(parameters):
        modules = [name for name in kept if name not in parameters]
        found.target_modules = exact_targets(modules, dropped.difference(parameters))
        found.layers_to_transform = found.layers_pattern = None  # which these names had passed
    return found


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
