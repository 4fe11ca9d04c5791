"""Places of stored tensors in the parameters of a model, by the rules of transformers' loader.

A file may hold an expert's projection where the model has a stack of all of them, or several
parameters in one tensor. A merge cuts an update of the parameter accordingly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from peftkern.tools.checkpoints.architecture import (
    Load,
    expert_tensors,
    load_targets,
    stacks_experts,
    transposes_experts,
)
from peftkern.tools.checkpoints.checkpoint import TensorInfo
from peftkern.tools.checkpoints.weights import Weight, spellings


class Place(NamedTuple):
    """Rows of a stored tensor that are rows of a parameter.

    expert: that the tensor is, of a stack [E, ...]; None for a tensor of as many dimensions as the
    parameter. row: of the parameter (or of its expert), and at: of the tensor, where the first of
    `rows` rows lies. transposed: the tensor is [..., K, N] of the parameter's [..., N, K].
    """

    parameter: str
    rows: int
    expert: int | None = None
    row: int = 0
    at: int = 0
    transposed: bool = False

    def cut(self, value: Tensor) -> Tensor:
        """Return the part of a parameter's value that belongs here."""
        value = value if self.expert is None else value[self.expert]
        value = value.mT if self.transposed else value
        return value[self.row : self.row + self.rows] if value.dim() else value


@dataclass(frozen=True)
class Places:
    """Places by the name of the stored tensor; rearranged: parameters that loading makes of tensors
    in another way, and one of these."""

    by_tensor: dict[str, tuple[Place, ...]]
    rearranged: dict[str, str]


def find_places(
    model: PreTrainedModel, loads: Iterable[Load], weights: Mapping[str, Weight]
) -> Places:
    """Find the places of all weights in a model without memory for its weights.

    Raises: CheckpointError as `expert_tensors`.
    """
    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, list[Place]] = defaultdict(list)
    together: dict[str, list[Load]] = defaultdict(list)
    rearranged: dict[str, str] = {}
    for weight in weights.values():
        if weight.stack:  # under the name of its parameter
            names = spellings(weight.name, model.base_model_prefix)
            target = next(name for name in names if name in parameters)
            found[weight.name].append(Place(target, weight.shape[0]))
    for load in loads:
        weight = weights.get(load.info.name)
        if weight is None or weight.stack:
            continue  # a part of a weight in 4 bits
        targets = [load.target] if load.converter is None else load_targets(load)
        shape = parameters.get(load.target)
        if shape is None:
            continue  # a tensor that the model does not load
        rows = weight.shape[0] if weight.shape else 1
        if load.converter is None or weight.shape == shape:
            found[weight.name].append(Place(load.target, rows))
        elif transposes_experts(load.converter):
            stored = (shape[0], shape[2], shape[1]) if len(shape) == 3 else None
            if weight.shape == stored:
                found[weight.name].append(Place(load.target, rows, transposed=True))
        elif _concatenates(load.converter):
            together[load.target].append(load)
        elif _chunks(load.converter):
            found[weight.name] += _chunked(targets, parameters)
        else:
            rearranged |= dict.fromkeys(targets, weight.name)
    for target, loads in together.items():
        for name, place in _concatenated(target, loads, parameters[target][0], weights):
            found[name].append(place)
    return Places({name: tuple(places) for name, places in found.items()}, rearranged)


def _concatenates(converter: WeightConverter) -> bool:
    return stacks_experts(converter) or _is_one(converter, Concatenate)


def _chunks(converter: WeightConverter) -> bool:
    return _is_one(converter, Chunk) and converter.operations[0].num_shards_attribute is None


def _is_one(converter: WeightConverter, kind: type) -> bool:
    """Return whether a converter does nothing but this, along the rows."""
    operations = converter.operations
    return len(operations) == 1 and type(operations[0]) is kind and operations[0].dim == 0


def _chunked(targets: Iterable[str], parameters: Mapping[str, tuple[int, ...]]) -> list[Place]:
    places, at = [], 0
    for target in targets:
        rows = parameters[target][0] if target in parameters else 0
        places.append(Place(target, rows, at=at))
        at += rows
    return places


def _concatenated(
    target: str, loads: list[Load], count: int, weights: Mapping[str, Weight]
) -> Iterable[tuple[str, Place]]:
    parts: Iterable[tuple[int | None, Sequence[TensorInfo]]]
    if stacks_experts(loads[0].converter):
        parts = enumerate(expert_tensors(target, loads, count))
    else:
        patterns = loads[0].converter.source_patterns
        ordered = sorted(loads, key=lambda load: patterns.index(load.pattern))
        parts = [(None, [load.info for load in ordered])]
    for expert, infos in parts:
        row = 0
        for info in infos:
            rows = weights[info.name].shape[0]
            yield info.name, Place(target, rows, expert, row)
            row += rows
