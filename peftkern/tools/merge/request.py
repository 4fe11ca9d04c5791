"""Request of a merge: everything that can be refused, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from peftkern.tools.adapters import Adapter
from peftkern.tools.adapters.adapter import base_made_with
from peftkern.tools.checkpoints.architecture import find_loads, meta_model
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.companions import Companions, find_companions
from peftkern.tools.checkpoints.weights import Weight, find_weights
from peftkern.tools.merge.edits import Edit, check_shapes, match_adapters
from peftkern.tools.merge.embeddings import Untied, change_config, untie
from peftkern.tools.merge.placement import Places, as_parameters, find_places
from peftkern.tools.merge.plan import File, Options, main_dtype, merged_config, plan_files

Adapters = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class Plan:
    """A merge whose parts fit together."""

    files: list[File]
    config: dict[str, Any]
    places: Places
    untied: list[Untied]
    companions: Companions

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + self.companions.nbytes


def plan_merge(checkpoint: Checkpoint, adapters: Adapters, options: Options) -> Plan:
    """Check that everything fits, and plan the files.

    Raises: CheckpointError for the first thing that does not.
    """
    if not options.changed_base:
        _check_home(checkpoint, adapters)
    weights = find_weights(checkpoint)
    linear, quantization = _nf4_choice(checkpoint, weights, options)
    model = meta_model(checkpoint)
    loads = list(find_loads(model, checkpoint))
    weights = as_parameters(model, loads, weights)
    places = find_places(model, loads, weights)
    edits = match_adapters(model, adapters, on_changed_base=options.changed_base)
    home = {p.parameter: weights[name] for name, ps in places.by_tensor.items() for p in ps}
    _forget_same_tables(model, home, edits)
    sources = " and ".join(adapter.source for adapter, _ in adapters)
    tied = all(adapter.config.get("ensure_weight_tying") for adapter, _ in adapters)
    apart, differ = untie(model, home, edits, keep_tied=tied)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(edits, shapes, sources)
    _check_stored(model, places, edits, apart, sources)
    config = change_config(checkpoint.config, model, edits, differ)
    files = plan_files(checkpoint, weights, places, edits, apart, options, linear)
    if options.residual:
        _check_residual(files, places, shapes)
    config = merged_config(config, main_dtype(weights), options, quantization)
    companions = find_companions(checkpoint, adapters=False)
    return Plan(files, config, places, apart, companions)


def _check_home(checkpoint: Checkpoint, adapters: Adapters) -> None:
    """Refuse adapters that belong to another base, which was made with them."""
    for adapter, _ in adapters:
        home = base_made_with(adapter.config)
        if home is not None and not os.path.samefile(home, checkpoint.folder):
            raise CheckpointError(
                f"{adapter.source}: belongs to {home}, whose weights peftkern init changed for it: "
                "merge into that one, or into a copy of it with --changed-base"
            )


def _nf4_choice(
    checkpoint: Checkpoint, weights: Mapping[str, Weight], options: Options
) -> tuple[Mapping[str, bool], Mapping[str, Any] | None]:
    """Find the weights that are, or were, quantized, and the config for those that are."""
    quantized = any(weight.nf4 is not None for weight in weights.values())
    if options.residual and options.out != "nf4" and not (quantized and options.out == "keep"):
        raise CheckpointError(
            f"{checkpoint.folder}: a residual adapter, but nothing is written in NF4: --out nf4"
        )
    if quantized and options.as_trained:
        raise CheckpointError(f"{checkpoint.folder}: as_trained, but the base is in NF4 as it is")
    if quantized or (options.out != "nf4" and not options.as_trained):
        return {}, None
    from peftkern.tools.quantize.linear_weights import find_weights as find_linear

    choice, config = find_linear(checkpoint)
    if options.out != "nf4":
        return choice.linear, None
    if choice.stacks:
        raise CheckpointError(
            f"{next(iter(choice.stacks))}: experts are written in NF4 by `peftkern quantize` "
            "of the merged checkpoint"
        )
    return choice.linear, config


def _check_residual(
    files: Sequence[File], places: Places, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless what is written in NF4 are whole weights of layers, which alone
    an adapter of target_modules can update."""
    for unit in (unit for file in files for unit in file.units if unit.nf4 is not None):
        found = places.by_tensor.get(unit.name, ())
        parameter = found[0].parameter if len(found) == 1 else ""
        whole = len(unit.weight.shape) == 2 and shapes.get(parameter) == unit.weight.shape
        if not whole or not parameter.endswith(".weight"):
            part = f"a part of {found[0].parameter}" if found else "nothing of the model"
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
    places: Places,
    edits: Mapping[str, Edit],
    apart: Sequence[Untied],
    sources: str,
) -> None:
    """Raise CheckpointError unless the files hold all of each parameter to be changed."""
    new = {untied.parameter for untied in apart}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    rows: dict[str, int] = dict.fromkeys(edits, 0)
    for found in places.by_tensor.values():
        for place in found:
            if place.parameter in rows:
                shape = shapes[place.parameter]
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
