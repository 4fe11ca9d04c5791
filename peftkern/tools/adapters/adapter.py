"""An adapter as one value: a low-rank update for each module, and whatever else came with them.

Nothing here knows a file format: `read` and `write` do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.formats.rank_patterns import compiled
from peftkern.tools.adapters.targets import exact_targets

TYPES = ("LORA", "ADALORA")

# Fields of a config that make the update something else than scaling * B A on a given weight.
REFUSED = {
    "kasa_config": "KaSA's update needs lora_diag and a base that was truncated",
    "arrow_config": "Arrow routes between adapters for each token",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QA-LoRA pools the inputs of its update",
    "layer_replication": "layers of the base are replicated",
}
# Fields that change which tokens an update applies to: no merge holds them.
UNMERGEABLE = {"alora_invocation_tokens": "aLoRA applies after its invocation tokens alone"}
# Initializations that subtract from the base what they put into the factors.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

_FIELDS = {
    "target_modules": ((str, list), "a regular expression or a list of names"),
    "target_parameters": (list, "a list of names"),
    "modules_to_save": (list, "a list of names"),
    "rank_pattern": (dict, "an object"),
    "alpha_pattern": (dict, "an object"),
    "auto_mapping": (dict, "an object"),
}


class AdapterError(ValueError):
    """Unusable adapter or request: one line that names the file and the tensor."""


@dataclass(frozen=True)
class Update:
    """One module's low-rank update of a weight [m, n]: scaling * lora_B @ lora_A.

    module: its name in the base model, of experts the module that holds the stack.
    parameter: "weight", or the name of the experts' parameter, like "gate_up_proj".
    kind: "linear", "embedding", "conv" or "experts".
    lora_A, lora_B: [r, n] and [m, r]. Of a convolution the weight is flattened to [cout, n]. Of an
        embedding they are [r, V] and [d, r], and the update of its weight [V, d] is their product
        transposed, as PEFT keeps it. Of experts [E, r, n] and [E, m, r], one pair for each.
    scaling: exact, of this module.
    shape: of lora_A in the file, of a convolution.
    magnitude: DoRA's, shaped as in the file.   bias: of lora_B; it is scaled, too.
    """

    module: str
    parameter: str
    kind: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    shape: tuple[int, ...] = ()
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def key(self) -> str:
        """Name in `Adapter.updates`, and in the patterns of a config."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def rank(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def size(self) -> tuple[int, int]:
        """m and n, of each expert."""
        return self.lora_B.shape[-2], self.lora_A.shape[-1]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (lora_B, lora_A), of experts one after the other."""
        if self.kind != "experts":
            return [(self.lora_B, self.lora_A)]
        return list(zip(self.lora_B.unbind(), self.lora_A.unbind(), strict=True))

    def shaped(self) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B, of a convolution in the shapes of its two layers."""
        if self.kind != "conv":
            return self.lora_A, self.lora_B
        ones = (1,) * (len(self.shape) - 2)
        lora_A = self.lora_A.reshape(-1, *self.shape[1:])
        return lora_A, self.lora_B.reshape(*self.lora_B.shape, *ones)

    def with_factors(self, lora_A: Tensor, lora_B: Tensor, **others: Any) -> Update:
        """Return an update of the same weight with other factors, for a scaling of 1."""
        shape = self.shape and (lora_A.shape[0], *self.shape[1:])
        return replace(self, lora_A=lora_A, lora_B=lora_B, scaling=1.0, shape=shape, **others)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what it holds, by name."""
        for name in ("lora_A", "lora_B", "magnitude", "bias"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor


@dataclass(frozen=True)
class Adapter:
    """Config as it stands in the file, updates by their key, and all other tensors by theirs.

    extras: modules_to_save, biases, token rows, whole tables of the base.
    source: path or model, for messages.
    notes: what was concluded, with evidence, and what in the config has no effect.
    """

    config: dict[str, Any]
    updates: dict[str, Update]
    extras: dict[str, Tensor] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()

    def with_updates(self, updates: Iterable[Update]) -> Adapter:
        """Return an adapter with other updates; if other modules have them, the config names them.

        Raises: AdapterError if there is none.
        """
        found = {update.key: update for update in updates}
        if not found:
            raise AdapterError(f"{self.source}: no module has an update left")
        if found.keys() == self.updates.keys():
            return replace(self, updates=found)
        named = exact_targets(self.config, [(one.module, one.parameter) for one in found.values()])
        return replace(self, updates=found, config={**self.config, **named})


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise AdapterError unless the config's updates are scaling * B A, of modules it can name."""
    kind = config.get("peft_type")
    if kind not in TYPES:
        raise AdapterError(
            f"{source}: peft_type: expected one of {', '.join(TYPES)}, got {brief(kind)}"
        )
    for name, why in REFUSED.items():
        if config.get(name):
            raise AdapterError(f"{source}: {name}: {why}")
    for name, (expected, what) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not isinstance(value, expected):
            raise AdapterError(f"{source}: {name}: expected {what}, got {brief(value)}")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise AdapterError(f"{source}: {name}: expected names, got {brief(value)}")
    whole = config.get("target_modules")
    patterns = [("target_modules", whole)] if isinstance(whole, str) else []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += [(name, key) for key in config.get(name) or {}]
    for name, pattern in patterns:
        try:
            re.compile(pattern) if name == "target_modules" else compiled(pattern)
        except re.error as error:
            why = f"{brief(pattern)} is no regular expression: {error}"
            raise AdapterError(f"{source}: {name}: {why}") from None


def changed_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialization that changed the base, if one did; None of others."""
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    return init if name.startswith(CHANGED_BASE) else None


def base_made_with(config: Mapping[str, Any]) -> Path | None:
    """Return the base that `peftkern init` made with an adapter, while it is where it was.

    PEFT has to load such an adapter as if nothing had changed, so that nothing else tells.
    """
    base = config.get("base_model_name_or_path")
    found = isinstance(base, str) and os.path.isfile(f"{base}/adapter/adapter_config.json")
    return Path(base) if found else None


def check_finite(adapter: Adapter) -> None:
    """Raise AdapterError naming the first tensor that holds NaN or infinity."""
    for name, tensor in named_tensors(adapter):
        if not_finite(tensor):
            raise AdapterError(f"{adapter.source}: {name}: holds NaN or infinity")


def not_finite(tensor: Tensor) -> int:
    """Count the values that are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.sum(dtype=wide).isfinite():  # three times as fast, and enough for most
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def named_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, those of updates as "module.lora_A"."""
    for key, update in adapter.updates.items():
        yield from ((f"{key}.{name}", tensor) for name, tensor in update.tensors())
    yield from adapter.extras.items()
