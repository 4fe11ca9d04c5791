"""Tied and resized embeddings: one table of the file may be two layers of the model.

An adapter of one of them belongs to that alone. The other keeps the base's values, so that the
merged model is no longer tied: its second table is written apart, and the config says so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftkern.tools.checkpoints.checkpoint import CheckpointError
from peftkern.tools.checkpoints.weights import Weight
from peftkern.tools.merge.edits import Edit

_TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """A parameter that had the values of another one, which the file holds, and gets its own."""

    parameter: str
    source: str


def untie(
    model: PreTrainedModel,
    stored: Mapping[str, Weight],
    edits: dict[str, Edit],
    *,
    keep_tied: bool,
) -> tuple[list[Untied], bool]:
    """Find the parameters to be written apart, and whether any tables come out different; edits of
    those that stay tied go to those stored.

    Args: stored, the parameters that the files hold, and where; keep_tied, adapters say that they
        hold the same update for both (PEFT's ensure_weight_tying).
    Raises: CheckpointError if more than the input and output embeddings share the table.
    """
    groups: dict[str, list[str]] = {}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        groups.setdefault(source, [source]).append(target)
    apart, differ = [], False
    for members in groups.values():
        edited = [name for name in members if name in edits]
        held = [name for name in members if name in stored]
        if not edited:
            continue
        if len(held) == len(members) and not _one_table([stored[name] for name in held]):
            differ = True
            continue  # transformers does not tie them either
        if not held:
            raise CheckpointError(f"{members[0]}: the files hold none of {', '.join(members)}")
        _share_tables(members, edits)
        if keep_tied or _equal(members, edits):
            edit = edits[edited[0]]
            for name in members:
                edits.pop(name, None)
            edits |= dict.fromkeys(held, edit)
            continue
        differ = True
        if len(members) > 2 and len(held) < len(members):
            raise CheckpointError(
                f"{edited[0]}: is one tensor with {', '.join(n for n in members if n != edited[0])}"
                ", and an update of one cannot be merged alone"
            )
        apart += [Untied(name, held[0]) for name in members if name not in stored]
    return apart, differ


def _one_table(weights: list[Weight]) -> bool:
    """Return whether the files hold one table under several names, which loading ties."""
    first, *others = (weight.read() for weight in weights)
    return all(torch.equal(first, other) for other in others)


def _share_tables(members: list[str], edits: dict[str, Edit]) -> None:
    """Give all members the table that one of them brings beside an update, or rows of tokens.

    A table without an update is a module of its own (modules_to_save), a copy that was trained.
    """
    for name in members:
        edit = edits.get(name)
        if edit is None:
            continue
        for other in members:
            twin = edits.setdefault(other, Edit()) if other != name else edit
            if edit.updates and twin.value is None:
                twin.value = edit.value
            if twin.rows is None:
                twin.rows = edit.rows
    for name in members:
        if name in edits and edits[name] == Edit():
            del edits[name]


def _equal(members: list[str], edits: Mapping[str, Edit]) -> bool:
    """Return whether all members come out the same."""
    first, *others = (edits.get(name, Edit()) for name in members)
    if any(edit.updates or edit.added for edit in (first, *others)):
        return False
    return all(_same(first, other) for other in others)


def _same(one: Edit, other: Edit) -> bool:
    tables = _same_tensor(one.value, other.value)
    if one.rows is None or other.rows is None:
        return tables and one.rows is other.rows
    return tables and all(map(_same_tensor, one.rows, other.rows))


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def change_config(
    config: Mapping[str, Any], model: PreTrainedModel, edits: Mapping[str, Edit], untied: bool
) -> dict[str, Any]:
    """Return the config of the merged model: no longer tied, with another vocabulary.

    Raises: CheckpointError if the embeddings have different numbers of rows then.
    """
    changed = copy.deepcopy(dict(config))
    text = changed["text_config"] if isinstance(changed.get("text_config"), dict) else changed
    if untied:
        changed[_TIE] = text[_TIE] = False
    tied = {} if untied else model.get_expanded_tied_weights_keys(all_submodels=True)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    resized = {
        name: len(edit.value)
        for name, edit in edits.items()
        if edit.value is not None and edit.value.shape != shapes[name]
    }
    embeddings = _embeddings(model)
    for name, count in resized.items():
        if name not in embeddings or "vocab_size" not in text:
            raise CheckpointError(f"{name}: {count} rows do not fit the base's {shapes[name][0]}")
    if resized:
        sizes = {name: resized.get(name, shapes[name][0]) for name in embeddings - tied.keys()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in sorted(sizes.items()))
            raise CheckpointError(f"embeddings of different numbers of rows: {told}")
        text["vocab_size"] = next(iter(resized.values()))
    return changed


def _embeddings(model: PreTrainedModel) -> set[str]:
    layers = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with contextlib.suppress(NotImplementedError):  # a model that has no tokens
            layers.append(get())
    named = model.named_modules()
    return {f"{name}.weight" for name, module in named if any(module is one for one in layers)}
