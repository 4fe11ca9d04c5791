"""Request of a merge: everything that can be refused, before anything is written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from peftkern.formats.nf4 import STATE_KEYS
from peftkern.formats.table import NUMBERS
from peftkern.layers.quantize import expert_parameters
from peftkern.tools.adapters import Adapter
from peftkern.tools.adapters.adapter import base_made_with
from peftkern.tools.checkpoints.architecture import find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.companions import Companions, find_companions
from peftkern.tools.checkpoints.decoded import as_dense, as_parameters
from peftkern.tools.checkpoints.four_bit import FourBit
from peftkern.tools.checkpoints.weights import FLOATS, Weight, find_weights, main_dtype
from peftkern.tools.merge.edits import Edit, check_shapes, match_adapters
from peftkern.tools.merge.embeddings import Untied, change_config, untie
from peftkern.tools.merge.placement import Place, Places, find_places
from peftkern.tools.merge.plan import (
    Experts,
    File,
    Options,
    Quantized,
    merged_config,
    plan_files,
)
from peftkern.tools.quantize import file_plan

Adapters = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class Plan:
    """A merge whose parts fit together; unfit: as in `peftkern quantize`'s choice."""

    files: list[File]
    config: dict[str, Any]
    places: Places
    untied: list[Untied]
    companions: Companions
    unfit: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + self.companions.nbytes


def plan_merge(checkpoint: Checkpoint, adapters: Adapters, options: Options) -> Plan:
    """Check that everything fits, and plan the files.

    Raises: CheckpointError for the first thing that does not.
    """
    if not options.changed_base:
        _check_home(checkpoint, adapters)
    weights = find_weights(checkpoint, stacks=True)
    model = meta_model(checkpoint)
    loads = list(find_loads(model, checkpoint))
    weights = as_parameters(model, checkpoint, loads, weights)
    quantized = _quantized(checkpoint, weights, options)
    if quantized.config is not None:
        _check_experts(model, quantized, options.out)
    places = find_places(model, loads, weights)
    edits = match_adapters(model, adapters, on_changed_base=options.changed_base)
    home = {p.parameter: weights[name] for name, ps in places.by_tensor.items() for p in ps}
    _forget_same_tables(model, home, edits)
    sources = " and ".join(adapter.source for adapter, _ in adapters)
    tied = all(adapter.config.get("ensure_weight_tying") for adapter, _ in adapters)
    apart, differ = untie(model, home, edits, keep_tied=tied)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(edits, shapes, sources)
    _check_stored(model, weights, places, edits, apart, sources)
    config = change_config(checkpoint.config, model, edits, differ)
    files = plan_files(checkpoint, weights, places, edits, apart, options, quantized)
    if options.residual:
        _check_residual(files, places, shapes)
    config = merged_config(config, main_dtype(weights.values()), options, quantized.config)
    companions = find_companions(checkpoint, adapters=False)
    return Plan(files, config, places, apart, companions, quantized.out.unfit)


def _check_home(checkpoint: Checkpoint, adapters: Adapters) -> None:
    """Refuse adapters that belong to another base, which was made with them."""
    for adapter, _ in adapters:
        home = base_made_with(adapter.config)
        if home is not None and not os.path.samefile(home, checkpoint.folder):
            raise CheckpointError(
                f"{adapter.source}: belongs to {home}, whose weights peftkern init changed for it: "
                "merge into that one, or into a copy of it with --changed-base"
            )


def _quantized(
    checkpoint: Checkpoint, weights: Mapping[str, Weight], options: Options
) -> Quantized:
    """Find the weights that will be, or were, quantized, and the config for those that will."""
    stored = [w.four_bit for w in weights.values() if w.four_bit is not None]
    if options.residual and options.out not in NUMBERS and not (stored and options.out == "keep"):
        raise CheckpointError(
            f"{checkpoint.folder}: a residual adapter, but nothing is written in 4 bits: --out nf4"
        )
    if not stored:
        out, config = _choice(checkpoint, options.stored)
        dense = options.as_trained in STATE_KEYS and not options.trained_experts
        trained, _ = _choice(checkpoint, options.trained, experts=not dense)
        if options.trained_experts:
            _check_rows(trained.stacks, weights, options.trained.blocksize)
        return Quantized(out, trained, config)
    if options.as_trained:
        raise CheckpointError(
            f"{checkpoint.folder}: as_trained, but the base is in {stored[0].format} as it is"
        )
    form, size = options.out, options.blocksize
    if form not in NUMBERS or all(w.format == form and size in (None, w.blocksize) for w in stored):
        return Quantized()
    out, config = _choice(as_dense(checkpoint, weights), options.stored)
    return Quantized(out, config=config)


def _choice(
    checkpoint: Checkpoint, four_bit: FourBit | None, *, experts: bool = True
) -> tuple[file_plan.Choice, Mapping[str, Any] | None]:
    """Return what `peftkern quantize` would quantize, and its config.

    Args: experts, whether fused ones are, too: bitsandbytes leaves them as they are.
    Raises: CheckpointError for what it refuses.
    """
    if four_bit is None:
        return file_plan.Choice({}), None
    from peftkern.tools.quantize.linear_weights import find_weights as find_linear

    how = dict(zip(("format", "blocksize", "double_quant"), four_bit, strict=True))
    choice, config = find_linear(checkpoint, **how)
    choice = choice if experts else choice._replace(stacks={})
    file_plan.plan_files(checkpoint, choice, file_plan.Options(**how))
    return choice, config


def _check_rows(
    stacks: Mapping[str, file_plan.Stack], weights: Mapping[str, Weight], blocksize: int
) -> None:
    """Raise CheckpointError for rows of an expert in a tensor of their own that share a block with
    those of another."""
    for name in (source for stack in stacks.values() for source in stack.sources):
        if math.prod(weights[name].shape) % blocksize:
            raise CheckpointError(
                f"{name}: trained_experts: expected a multiple of {blocksize} values, got "
                f"{list(weights[name].shape)}"
            )


def _check_experts(model: PreTrainedModel, quantized: Quantized, out: str) -> None:
    """Raise CheckpointError for fused experts that would stay dense beside layers in 4 bits."""
    for name, module in model.named_modules():
        for parameter in expert_parameters(module):
            if f"{name}.{parameter}" not in quantized.out.stacks:
                raise CheckpointError(
                    f"{name}.{parameter}: these experts cannot be written in {out}: merge with "
                    "--out bf16, which `peftkern quantize --partial` takes"
                )


def _check_residual(
    files: Sequence[File], places: Places, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless what is written in 4 bits are whole weights of layers, which
    alone an adapter of target_modules can update."""
    for unit in (unit for file in files for unit in file.units if unit.four_bit is not None):
        found = places.by_tensor.get(unit.name, ())
        parameter = found[0].parameter if len(found) == 1 else ""
        stack = isinstance(unit, Experts) or unit.weight.stack
        if stack or shapes.get(parameter) != unit.weight.shape or not parameter.endswith(".weight"):
            part = f"a part of {found[0].parameter}" if found else "nothing of the model"
            part = "a stack of experts" if stack else part
            raise CheckpointError(
                f"{unit.name}: is {part}, and a residual adapter is for whole weights of layers"
            )


def _forget_same_tables(
    model: PreTrainedModel,
    home: Mapping[str, Weight],
    edits: dict[str, Edit],
) -> None:
    """Drop tables that came with an adapter and are the base's own, as PEFT saves those of
    embeddings that it targets."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, edit in list(edits.items()):
        weight = home.get(name) or home.get(tied.get(name))
        if edit.value is None or weight is None or weight.shape != tuple(edit.value.shape):
            continue
        if torch.equal(edit.value.to(weight.dtype), weight.read()):
            edit.value = None
            if edit == Edit():
                del edits[name]


def _check_stored(
    model: PreTrainedModel,
    weights: Mapping[str, Weight],
    places: Places,
    edits: Mapping[str, Edit],
    apart: Sequence[Untied],
    sources: str,
) -> None:
    """Raise CheckpointError unless the files hold all of each parameter to be changed."""
    new = {untied.parameter for untied in apart}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    rows: dict[str, int] = dict.fromkeys(edits, 0)
    for name, found in places.by_tensor.items():
        for place in found:
            if place.parameter in rows:
                shape = shapes[place.parameter]
                _check_place(weights[name], place, shape)
                size = shape[1:] if place.expert is not None else shape
                whole = place.transposed or not size
                rows[place.parameter] += size.numel() if whole else place.rows * size[1:].numel()
    for name in edits:
        if name in new or rows[name] == shapes[name].numel():
            continue
        if name in places.rearranged:
            raise CheckpointError(
                f"{sources}: {name}: transformers puts it together from other tensors "
                f"({places.rearranged[name]!r}); save_pretrained() the model with this version of "
                "it first"
            )
        raise CheckpointError(f"{sources}: {name}: the base's files do not hold it, or not all")


def _check_place(weight: Weight, place: Place, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError for a tensor that no update can be merged into, or with more rows than
    an expert of the parameter, of this shape, has."""
    name = weight.name
    if weight.dtype not in FLOATS:
        raise CheckpointError(f"{name}: expected floating point to merge into, got {weight.dtype}")
    if place.expert is not None:
        count, *matrix = shape
        if place.row + place.rows > matrix[0]:
            raise CheckpointError(f"{name}: expected rows of one of {count} experts {matrix} once")
