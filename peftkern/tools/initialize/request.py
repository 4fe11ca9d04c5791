"""Request of an initialization: the method and its settings, and the layers of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.methods.initialization.factors import check_rank
from peftkern.tools.checkpoints.architecture import find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError

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

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

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
    checkpoint: Checkpoint, names: Sequence[str], rank: int, *, half: bool = False
) -> tuple[dict[str, Target], LoraConfig]:
    """Find the linear layers to start, by the names of their weights, and a config that says so.

    Args: names, of layers, whole or their ends: "q_proj"; none for all linear layers but the
        output embeddings. rank, which every one of them must have, or with `half` twice of it.
    Raises: CheckpointError naming a layer that does not exist, has no such rank, or is tied.
    """
    model = meta_model(checkpoint)
    linear = _linear_layers(model, checkpoint)
    head = model.get_output_embeddings()
    chosen = {
        tensor: target
        for tensor, target in linear.items()
        if any(_ends(target.module, name) for name in names)
        or (not names and model.get_submodule(target.module) is not head)
    }
    for name in names:
        if not any(_ends(target.module, name) for target in chosen.values()):
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
            check_rank(rank, target.shape, half=half)
        except ValueError as error:
            raise CheckpointError(f"{target.module}: {error}") from None
    return chosen, _config(model, chosen, linear)


def _linear_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Target]:
    """Find the weights that are a linear layer's as they are."""
    found = {}
    for load in find_loads(model, checkpoint):
        name, _, parameter = load.target.rpartition(".")
        if load.converter is not None or parameter != "weight" or load.info.dtype not in _DTYPES:
            continue
        module = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)) and load.info.shape == module.weight.shape:
            transposed = isinstance(module, Conv1D)
            shape = load.info.shape[::-1] if transposed else load.info.shape
            found[load.info.name] = Target(name, shape, transposed)
    return found


def _config(
    model: PreTrainedModel, chosen: dict[str, Target], linear: dict[str, Target]
) -> LoraConfig:
    """Return a config that targets the chosen layers alone, by short names if those say it all."""
    modules = [target.module for target in chosen.values()]
    short = {name.rpartition(".")[2] for name in modules}
    others = {n for n, _ in model.named_modules()} - set(modules)
    unique = not any(_ends(name, end) for name in others for end in short)
    causal = type(model).__name__.endswith("ForCausalLM")
    return LoraConfig(
        target_modules=sorted(short if unique else modules),
        fan_in_fan_out=any(target.transposed for target in chosen.values()),
        task_type="CAUSAL_LM" if causal else None,
    )


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
