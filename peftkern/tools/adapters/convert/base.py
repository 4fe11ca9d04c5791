"""What a conversion asks of a base: names of modules, its kind of model, single weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkern.formats.json_files import brief, read_json
from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.convert.diffusers import COMPONENTS
from peftkern.tools.checkpoints.checkpoint import (
    READ_ERRORS,
    CheckpointError,
    open_safetensors,
    read_checkpoint,
)
from peftkern.tools.checkpoints.decoded import decoded

# Fused gate and up whose rows alternate: no projections can be cut out of them.
_INTERLEAVED = re.compile(r"gpt[-_]oss|openai[-_]privacy[-_]filter", re.IGNORECASE)
_MIXTRAL = re.compile("mixtral|minimax", re.IGNORECASE)


def component_modules(base: str | os.PathLike) -> Iterator[str]:
    """Yield `component.name` of every module with a weight, of a pipeline of diffusers.

    Raises: AdapterError if it holds no component, or a file that cannot be read.
    """
    folders = [Path(base) / name for name in COMPONENTS if (Path(base) / name).is_dir()]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise AdapterError(
            f"{base}: expected a pipeline of diffusers: safetensors in {', '.join(COMPONENTS)}"
        )
    for file in files:
        try:
            with open_safetensors(file) as opened:
                names = list(opened.keys())
        except READ_ERRORS as error:
            raise AdapterError(f"{file}: damaged, cut off or not safetensors: {error}") from None
        for name in names:
            if name.endswith(".weight"):
                yield f"{file.parent.name}.{name.removesuffix('.weight')}"


def is_mixtral(base: str | os.PathLike | None, adapter: Adapter) -> bool:
    """Return whether the experts' projections are w1, w3 and w2 in a block_sparse_moe.

    The base's config.json tells, of the folder that the adapter names if no base was given: a name
    alone tells neither that nor how gate and up lie in a stack.

    Raises: AdapterError for stacks of experts if nothing tells, or if they have no projections.
    """
    stacks = [update for update in adapter.updates.values() if update.kind == "experts"]
    if not stacks:
        return False
    stacks.sort(key=lambda update: "gate" not in update.parameter)
    where, kind = f"{adapter.source}: {stacks[0].key}", _model_type(base, adapter.config)
    if kind is None:
        raise AdapterError(
            f"{where}: only the base's config.json tells how gate and up lie in a stack and what "
            "its projections are called: expected --base"
        )
    if _INTERLEAVED.search(kind):
        rows = "rows of gate and up alternate" if "gate" in stacks[0].parameter else "an update"
        raise AdapterError(f"{where}: {rows} in {kind}, whose experts have no projections apart")
    return _MIXTRAL.search(kind) is not None


def _model_type(base: str | os.PathLike | None, config: Mapping[str, Any]) -> str | None:
    """Return the kind of model of a base; None if none was given and no folder tells."""
    said = base if base is not None else config.get("base_model_name_or_path")
    path = Path(str(said)) / "config.json"
    if base is None and not (said and os.path.isfile(path)):
        return None
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise AdapterError(f"{error}") from None
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise AdapterError(f"{path}: model_type: expected a name, got {brief(kind)}")
    return kind


def base_table(update: Update) -> str:
    """Return the name of the base's own weight in PEFT's file, where it is kept with an update."""
    return f"{PREFIX}{update.module}.base_layer.weight"


class Weights:
    """Weights of a base's checkpoint, one at a time, as an update has them: [m, n].

    A table of the base that the adapter holds counts, as it does for PEFT.
    """

    def __init__(self, base: str | os.PathLike, adapter: Adapter) -> None:
        try:
            self._checkpoint = decoded(read_checkpoint(base, quantized=True))
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        self._tensors = self._checkpoint.tensors
        self._fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
        self._tables = adapter.extras
        self._base = base

    def __call__(self, update: Update) -> Tensor:
        """Read a weight. Raises: AdapterError if the base has none of that name and shape."""
        name = f"{update.module}.{update.parameter}"
        weight = self._tables.get(base_table(update))
        if weight is None:
            if name not in self._tensors:
                raise AdapterError(f"{self._base}: {name}: expected it in the base")
            try:
                weight = self._tensors[name].read()
            except CheckpointError as error:
                raise AdapterError(str(error)) from None
        weight = weight.flatten(1) if update.kind == "conv" else weight
        square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
        turned = tuple(weight.shape) == update.size[::-1]
        if square:
            turned = update.kind == "embedding" or self._is_conv1d(update.module)
        weight = weight.T if turned else weight
        if tuple(weight.shape) != update.size or not weight.is_floating_point():
            raise AdapterError(
                f"{self._base}: {name}: expected floating point {list(update.size)}, "
                f"got {weight.dtype} {list(weight.shape)}"
            )
        return weight

    def _is_conv1d(self, module: str) -> bool:
        """Return whether a layer keeps its weight as [n, m], which no shape tells of a square one.

        The config says so of an adapter over the dense model, but not of one over the model in 4
        bits, whose layers are not Conv1D; and alone where transformers does not know the base.
        """
        from transformers.pytorch_utils import Conv1D

        from peftkern.tools.checkpoints.architecture import meta_model

        try:
            return isinstance(meta_model(self._checkpoint).get_submodule(module), Conv1D)
        except (CheckpointError, AttributeError):
            return self._fan_in_fan_out
