"""Architecture of a checkpoint by transformers' own code: its modules, without memory for weights,
and what the loader does with each tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.initialization import no_tie_weights

from peftkern.formats.json_files import brief
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo

_COUNT = re.compile(r"(layers?|experts|blocks)$")  # num_hidden_layers, n_layer, n_routed_experts
_MOST_MODULES = 10_000
EXPERT = re.compile(r"experts\W+(\d+)\W")  # in the name of a tensor, or in a pattern for it


class Load(NamedTuple):
    """Tensor of the checkpoint, the first parameter that it is loaded into, and how; converter and
    its source pattern: None if it is loaded as it is."""

    info: TensorInfo
    target: str
    converter: WeightConverter | None
    pattern: str | None


def model_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """Return the class that config.json names, of transformers' own only."""
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise CheckpointError(
            f"{checkpoint.folder}: transformers {transformers.__version__} has no architecture "
            f"{brief(name)}, and code of a checkpoint is not run"
        )
    return known


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the architecture that config.json names, without memory for its weights."""
    known = model_class(checkpoint)
    _check_counts(checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"), no_tie_weights():  # as from_pretrained does
            return known(config)
    except Exception as error:  # a config can make its model raise anything
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build {known.__name__} from config.json: "
            f"{error}"
        ) from error


def _check_counts(config: Any) -> None:
    """Bound the counts: every layer becomes an object, even on meta; a billion do not fit."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif _COUNT.search(key) and isinstance(value, int | float) and not value <= _MOST_MODULES:
            raise CheckpointError(
                f"config.json: {brief(key)}: expected at most {_MOST_MODULES}, got {brief(value)}"
            )


def find_loads(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Load]:
    """Say of each tensor what transformers' loader does with it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    for name, info in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        used = (c for c in converters if pattern in c.source_patterns)
        yield Load(info, target, None if pattern is None else next(used), pattern)


def by_target(loads: Iterable[Load]) -> dict[str, list[Load]]:
    """Return the loads of each parameter."""
    found: dict[str, list[Load]] = {}
    for load in loads:
        found.setdefault(load.target, []).append(load)
    return found


def load_targets(load: Load) -> list[str]:
    first, *_ = patterns = load.converter.target_patterns
    return [load.target.replace(first, wanted) for wanted in patterns]


def stacks_experts(converter: WeightConverter) -> bool:
    """Return whether experts [N, K] are stacked to [E, N, K], gate and up one after the other."""
    dims = {type(operation): operation.dim for operation in converter.operations
            if isinstance(operation, MergeModulelist | Concatenate)}  # fmt: skip
    plain = len(dims) == len(converter.operations) and all(
        EXPERT.search(pattern.replace("*", "0")) for pattern in converter.source_patterns
    )
    return plain and dims in ({MergeModulelist: 0}, {MergeModulelist: 0, Concatenate: 1})


def expert_tensors(target: str, loads: Sequence[Load], count: int) -> list[tuple[TensorInfo, ...]]:
    """Return the tensors of each of the `count` experts that are stacked in a parameter, in the
    order of their rows there.

    Raises: CheckpointError unless all of them are there once, under the numbers from 0 on.
    """
    patterns = loads[0].converter.source_patterns
    placed = [
        (int(EXPERT.search(load.info.name)[1]), patterns.index(load.pattern)) for load in loads
    ]
    parts = range(len(patterns))
    if sorted(placed) != [(expert, part) for expert in range(count) for part in parts]:
        short = [e for e in range(count) if any((e, part) not in placed for part in parts)]
        which = f", expert {short[0]} is not whole" if short else ""
        raise CheckpointError(
            f"{target}: expected {len(patterns)} tensors of each of {count} experts, numbered from "
            f"0, got {len(loads)}{which}"
        )
    infos = dict(zip(placed, (load.info for load in loads), strict=True))
    return [tuple(infos[expert, part] for part in parts) for expert in range(count)]


def transposes_experts(converter: WeightConverter) -> bool:
    """Return whether experts [K, N] become [N, K] if they have to: what is written never has."""
    (operation,) = converter.operations if len(converter.operations) == 1 else (None,)
    turns = isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}
    return turns and operation.check_dims


def is_turned(experts: nn.Module) -> bool:
    """Return whether the parameters of fused experts are [E, in, out]."""
    return bool(getattr(experts, "is_transposed", False))


def check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name}: shape {list(info.shape)} does not fit {list(shape)} of config.json"
        )
