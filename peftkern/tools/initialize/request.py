"""Request of an initialization: the method and its settings, and the layers of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from peft import EvaConfig, LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import exact_targets, pattern_key
from peftkern.methods.initialization.factors import check_rank
from peftkern.tools.checkpoints.architecture import find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.weights import find_weights

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Request:
    """Method and settings; steps and seed as for `peftkern.initialize_`."""

    method: str
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    tol: float = 1e-3
    certify: bool = True
    steps: int = 5
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("rank", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < low:
                came = getattr(self, name)
                raise CheckpointError(f"{name}: expected at least {low}, got {came}")
        for name, value in (("alpha", self.lora_alpha), ("tol", self.tol)):
            if not 0 < value < math.inf:
                raise CheckpointError(f"{name}: expected a number above 0, got {value}")

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        rank, patterns = self.rank_of(module), self.alpha_pattern
        alpha = patterns.get(pattern_key(patterns, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def complete(self, config: LoraConfig) -> LoraConfig:
        """Return a config with these ranks, which says the targets already."""
        found = copy(config)
        found.r, found.lora_alpha, found.use_rslora = self.rank, self.lora_alpha, self.rslora
        found.rank_pattern, found.alpha_pattern = dict(self.rank_pattern), dict(self.alpha_pattern)
        if self.rank_pattern and self.method == "eva":
            found.eva_config = EvaConfig(rho=1.0)  # the ranks stay
        return found

    @property
    def svd_options(self) -> dict[str, Any]:
        return {"tol": self.tol, "certify": self.certify, "seed": self.seed}

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes that are written."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """Linear layer of the model; transposed: the checkpoint keeps its weight as [n, m]."""

    module: str
    shape: tuple[int, int]
    transposed: bool


def find_targets(
    checkpoint: Checkpoint,
    names: Sequence[str] | str,
    rank_of: Callable[[str], int] = lambda module: 1,
    *,
    half: bool = False,
) -> tuple[dict[str, Target], LoraConfig]:
    """Find the linear layers to start, by the names of their weights, and a config that says so.

    Args: names, of layers, whole or their ends: "q_proj"; a string is a regular expression for
        whole names; none for all linear layers but the output embeddings. rank_of(layer), which it
        must have, or with `half` twice of it.
    Raises: CheckpointError naming a layer that does not exist, has no such rank, or is tied.
    """
    model = meta_model(checkpoint)
    linear = _linear_layers(model, checkpoint)
    head = model.get_output_embeddings()
    wanted = _wanted(names)
    chosen = {
        tensor: target
        for tensor, target in linear.items()
        if any(fits(target.module) for fits in wanted.values())
        or (not wanted and model.get_submodule(target.module) is not head)
    }
    for name, fits in wanted.items():
        if not any(fits(target.module) for target in chosen.values()):
            known = dict.fromkeys(t.module.rpartition(".")[2] for t in linear.values())
            raise CheckpointError(
                f"target: no linear layer is called {name!r}; there are {', '.join(known)}"
            )
    if not chosen:
        raise CheckpointError(f"{checkpoint.folder}: holds no linear layer")
    for target in chosen.values():
        if model.get_submodule(target.module) is head and model.config.tie_word_embeddings:
            raise CheckpointError(
                f"target: the weight of {target.module} is the embeddings', too, which would change"
            )
        try:
            check_rank(rank_of(target.module), target.shape, half=half)
        except ValueError as error:
            raise CheckpointError(f"{target.module}: {error}") from None
    return chosen, _config(model, chosen, linear)


def _wanted(names: Sequence[str] | str) -> dict[str, Callable[[str], Any]]:
    """Return {name or regular expression: whether it fits a module}."""
    if isinstance(names, str):
        return {names: re.compile(names).fullmatch}
    return {name: partial(_ends, name=name) for name in names}


def _linear_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Target]:
    """Find the weights that are a linear layer's as they are, dense or in 4 bits."""
    found, weights = {}, find_weights(checkpoint)
    for load in find_loads(model, checkpoint):
        name, _, parameter = load.target.rpartition(".")
        weight = weights.get(load.info.name)
        if load.converter is not None or parameter != "weight" or weight is None:
            continue
        module = model.get_submodule(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        shape = tuple(module.weight.shape)
        transposed = isinstance(module, Conv1D)
        if transposed and weight.four_bit is not None:  # what is quantized is never transposed
            shape, transposed = shape[::-1], False
        if weight.shape == shape and (weight.four_bit or load.info.dtype in _DTYPES):
            found[load.info.name] = Target(name, shape[::-1] if transposed else shape, transposed)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[1].module]))


def _config(
    model: PreTrainedModel, chosen: dict[str, Target], linear: dict[str, Target]
) -> LoraConfig:
    """Return a config that targets the chosen layers alone, by short names if those say it all."""
    modules = [target.module for target in chosen.values()]
    short = {name.rpartition(".")[2] for name in modules}
    others = {n for n, _ in model.named_modules()} - set(modules)
    unique = not any(_ends(name, end) for name in others for end in short)
    causal = type(model).__name__.endswith("ForCausalLM")
    whole = short if unique else exact_targets(modules, others)
    return LoraConfig(
        target_modules=whole if isinstance(whole, str) else sorted(whole),
        fan_in_fan_out=any(target.transposed for target in chosen.values()),
        task_type="CAUSAL_LM" if causal else None,
    )


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
