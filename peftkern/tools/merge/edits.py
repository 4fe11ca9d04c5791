"""Changes that adapters make to the parameters of a model: matched and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters import Adapter, Update
from peftkern.tools.adapters.adapter import UNMERGEABLE, changed_base, check_finite
from peftkern.tools.adapters.targets import target_name
from peftkern.tools.checkpoints.architecture import is_turned
from peftkern.tools.checkpoints.checkpoint import CheckpointError
from peftkern.tools.checkpoints.weights import spellings

_TOKENS = ".token_adapter.trainable_tokens_delta"
_BASE = ".base_layer."
_MOST = 1 << 63  # that an index may be
_CONV = nn.modules.conv._ConvNd
_LAYERS = {"linear": (nn.Linear, Conv1D), "embedding": (nn.Embedding,), "conv": (_CONV,)}


@dataclass
class Edit:
    """What becomes of one parameter: first replaced, then updated, then some of its rows replaced.

    value: instead of the base's. updates: with the factor of their adapter. added: vectors that
    are added, with their factors. rows: numbers of rows, and their values. flipped: the parameter
    is [K, N] where an update of a linear layer is [N, K].
    """

    value: Tensor | None = None
    updates: list[tuple[Update, float]] = field(default_factory=list)
    added: list[tuple[Tensor, float]] = field(default_factory=list)
    rows: tuple[Tensor, Tensor] | None = None
    flipped: bool = False


def match_adapters(
    model: PreTrainedModel,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    on_changed_base: bool = False,
) -> dict[str, Edit]:
    """Find the edits of all parameters, by their names in a model on meta.

    Args: adapters, each with its weight; on_changed_base, the base is the one that an
        initialization such as PiSSA has written, not the original.
    Raises: CheckpointError, a line that names the adapter and its tensor, for what fits no
        parameter, belongs to another base, or cannot be combined; AdapterError for NaN or infinity.
    """
    matcher = _Matcher(model)
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise CheckpointError(f"{adapter.source}: expected a finite weight, got {weight}")
        _check_config(adapter, on_changed_base)
        check_finite(adapter)
        for update in adapter.updates.values():
            matcher.add_update(adapter, update, weight)
        for key, tensor in adapter.extras.items():
            if weight != 1 and not key.endswith(f"{_BASE}weight"):
                raise CheckpointError(
                    f"{adapter.source}: {key} replaces a tensor of the base, which a weight of "
                    f"{weight} cannot do"
                )
            matcher.add_extra(adapter, key, tensor)
    if not matcher.edits:
        raise CheckpointError(f"{adapters[0][0].source}: holds nothing to merge")
    return matcher.edits


def _check_config(adapter: Adapter, on_changed_base: bool) -> None:
    init = changed_base(adapter.config)
    if init is not None and not on_changed_base:
        raise CheckpointError(
            f"{adapter.source}: init_lora_weights {init!r} has changed the base that this adapter "
            "belongs to: merge into the changed base with --changed-base, or convert the adapter"
        )
    for name, why in UNMERGEABLE.items():
        if adapter.config.get(name):
            raise CheckpointError(f"{adapter.source}: {name}: {why}")


class _Matcher:
    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.prefix = model.base_model_prefix
        self.edits: dict[str, Edit] = {}

    def add_update(self, adapter: Adapter, update: Update, weight: float) -> None:
        where = f"{adapter.source}: {update.module}"
        name = self._known(update.module, self.modules)
        if name is None:
            raise CheckpointError(f"{where}: the base has no such layer")
        module = self.modules[name]
        if target_name(adapter.config, update.module, update.parameter) != update.module:
            update = _of_parameter(update)
        _check_layer(where, module, update)
        parameter = f"{name}.{update.parameter}"
        if parameter not in self.shapes:
            raise CheckpointError(f"{where}: has no parameter {update.parameter}")
        edit = self.edits.setdefault(parameter, Edit())
        edit.updates.append((update, weight))
        edit.flipped = _is_flipped(module, update, self.shapes[parameter])
        dora = any(u.magnitude is not None for u, _ in edit.updates)
        if dora and (len(edit.updates) > 1 or weight != 1):
            raise CheckpointError(
                f"{where}: is DoRA, which normalizes the sum: it is merged alone, with weight 1"
            )
        if update.bias is not None:
            bias = f"{name}.bias"
            if bias not in self.shapes:
                raise CheckpointError(f"{where}: lora_B.bias: the layer has no bias to add it to")
            added = (update.bias, update.scaling * weight)
            self.edits.setdefault(bias, Edit()).added.append(added)

    def add_extra(self, adapter: Adapter, key: str, tensor: Tensor) -> None:
        where = f"{adapter.source}: {key}"
        plain = key.removeprefix(PREFIX)
        if plain.endswith(_TOKENS):
            name = self._known(f"{plain.removesuffix(_TOKENS)}.weight", self.shapes)
        else:
            name = self._known(plain.replace(_BASE, "."), self.shapes)
        if name is None:
            raise CheckpointError(f"{where}: fits nothing of the base")
        edit = self.edits.setdefault(name, Edit())
        if plain.endswith(_TOKENS):
            if edit.rows is not None:
                raise CheckpointError(f"{where}: rows of two adapters for one table")
            edit.rows = (_token_indices(adapter, name, len(tensor), where), tensor)
            return
        if edit.value is not None and not torch.equal(edit.value, tensor):
            raise CheckpointError(f"{where}: differs from that of another adapter")
        edit.value = tensor

    def _known(self, name: str, names: Iterable[str]) -> str | None:
        """Return the base's name of a module or parameter: it may be the model with a head of the
        adapter's model, or that without the head."""
        return next((one for one in spellings(name, self.prefix) if one in names), None)


def check_shapes(
    edits: Mapping[str, Edit], shapes: Mapping[str, tuple[int, ...]], sources: str
) -> None:
    """Compare what is added or put in with the parameters, once it is known which are replaced.

    Raises: CheckpointError that names the parameter.
    """
    for name, edit in edits.items():
        shape = shapes[name]
        if edit.value is not None:
            came = tuple(edit.value.shape)
            table = name.endswith(".weight") and len(shape) == 2 and came[1:] == shape[1:]
            if came != shape and not table:
                raise CheckpointError(
                    f"{sources}: {name}: shape {list(came)} does not fit the base's {list(shape)}"
                )
            shape = came
        for update, _ in edit.updates:
            _check_update(f"{sources}: {name}", update, edit, shape)
        for vector, _ in edit.added:
            if tuple(vector.shape) != shape:
                raise CheckpointError(
                    f"{sources}: {name}: a bias of {list(vector.shape)} for {list(shape)}"
                )
        if edit.rows is not None:
            numbers, values = edit.rows
            if tuple(values.shape[1:]) != shape[1:] or int(numbers.max()) >= shape[0]:
                raise CheckpointError(
                    f"{sources}: {name}: rows {list(values.shape)} up to number "
                    f"{int(numbers.max())} do not fit {list(shape)}"
                )


def _check_update(where: str, update: Update, edit: Edit, shape: tuple[int, ...]) -> None:
    A, B = update.lora_A, update.lora_B
    experts = update.kind == "experts"
    rows, columns = B.shape[-2], A.shape[-1]
    if update.kind == "embedding" or edit.flipped:
        rows, columns = columns, rows
    count = 1 if len(shape) < 3 or not experts else shape[0]
    matrix = shape[-2:] if experts else (shape[0], math.prod(shape[1:]))
    if (rows, columns) != matrix or A.shape[-2] != B.shape[-1] or (experts and len(A) != count):
        hint = ": a resized vocabulary comes with base_layer.weight" * (update.kind == "embedding")
        hint = hint or ": another layout of the experts?" * experts
        raise CheckpointError(
            f"{where}: an update of {[rows, columns]} does not fit the base's {list(shape)}{hint}"
        )
    if update.magnitude is not None and update.magnitude.numel() not in matrix:
        raise CheckpointError(f"{where}: a magnitude of {update.magnitude.numel()} rows")


def _check_layer(where: str, module: nn.Module, update: Update) -> None:
    kinds = _LAYERS.get(update.kind)
    if kinds is not None and not isinstance(module, kinds):
        raise CheckpointError(
            f"{where}: an update of {update.kind} for a layer of type {type(module).__name__}"
        )
    if isinstance(module, _CONV) and module.groups > 1:
        raise CheckpointError(f"{where}: a convolution of {module.groups} groups is not merged")


def _of_parameter(update: Update) -> Update:
    """Return an update of target_parameters, of a matrix like that of the one expert there is."""
    if update.kind != "linear":
        return update
    return replace(update, kind="experts", lora_A=update.lora_A[None], lora_B=update.lora_B[None])


def _is_flipped(module: nn.Module, update: Update, shape: tuple[int, ...]) -> bool:
    if update.kind == "experts":
        return len(shape) == 3 and is_turned(module)
    return isinstance(module, Conv1D)


def _token_indices(adapter: Adapter, parameter: str, count: int, where: str) -> Tensor:
    wanted: Any = adapter.config.get("trainable_token_indices")
    if isinstance(wanted, dict):
        module = parameter.removesuffix(".weight")
        named = (v for k, v in wanted.items() if module == k or module.endswith(f".{k}"))
        wanted = next(named, None)
    whole = isinstance(wanted, list) and all(type(i) is int and 0 <= i < _MOST for i in wanted)
    if not whole or not 0 < len(set(wanted)) == len(wanted) == count:
        raise CheckpointError(
            f"{where}: {count} rows, but trainable_token_indices of the config does not say which"
        )
    return torch.tensor(wanted)
