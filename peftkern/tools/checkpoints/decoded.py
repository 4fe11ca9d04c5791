"""Checkpoints in 4 bits as dense ones, whose tensors are decoded as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.layers.expert_stack import ExpertStack, expert_weight
from peftkern.tools.checkpoints.checkpoint import Checkpoint, TensorInfo
from peftkern.tools.checkpoints.streaming import DTYPE_NAMES
from peftkern.tools.checkpoints.weights import Weight, find_weights, join_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftkern.tools.checkpoints.architecture import Load


@dataclass(frozen=True)
class DecodedInfo(TensorInfo):
    """A weight in 4 bits as the dense tensor that it stands for."""

    weight: Weight

    @classmethod
    def of(cls, weight: Weight) -> DecodedInfo:
        name, nbytes = DTYPE_NAMES[weight.dtype], math.prod(weight.shape) * weight.dtype.itemsize
        file, written = weight.info.file, weight.info.written
        return cls(weight.name, file, name, weight.shape, nbytes, 0, written, weight)

    def read(self) -> Tensor:
        return self.weight.read()

    def items(self) -> Iterator[Tensor]:
        if not self.weight.stack:
            return iter(self.weight.read())
        return (one.read() for one in self.weight.experts())

    def quantized(self) -> Iterator[QuantizedWeight]:
        """Yield the weight as it is stored, that of each expert of a stack.

        Raises: CheckpointError if its file has changed since it was checked.
        """
        for one in self.weight.experts() if self.weight.stack else (self.weight,):
            stored = one.stored()
            yield expert_weight(stored) if isinstance(stored, ExpertStack) else stored


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as a dense one, which it may be already.

    Raises: CheckpointError for one that is quantized otherwise, or whose architecture transformers
        does not know.
    """
    if checkpoint.config.get("quantization_config") is None:
        return checkpoint
    from peftkern.tools.checkpoints.architecture import find_loads, meta_model

    weights = find_weights(checkpoint, stacks=True)
    model = meta_model(checkpoint)
    loads = find_loads(model, checkpoint)
    return as_dense(checkpoint, as_parameters(model, checkpoint, loads, weights))


def as_dense(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> Checkpoint:
    """Return the dense checkpoint of these weights, as the model has them."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    tensors = {
        name: weight.info if weight.four_bit is None else DecodedInfo.of(weight)
        for name, weight in weights.items()
    }
    return replace(checkpoint, config=config, tensors=tensors)


def as_parameters(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    loads: Iterable[Load],
    weights: Mapping[str, Weight],
) -> dict[str, Weight]:
    """Return the weights of `find_weights` as the model has them: stacks of experts in one, and
    Conv1D's [K, N], which are quantized as [N, K], what no shape tells of a square one.

    Raises: CheckpointError as `join_stacks`.
    """
    from transformers.pytorch_utils import Conv1D

    turned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    found = join_stacks(model, checkpoint, weights)
    for load in loads:
        weight = found.get(load.info.name)
        if load.target in turned and weight is not None and weight.four_bit is not None:
            found[weight.name] = replace(weight, shape=weight.shape[::-1], transposed=True)
    return found
