"""Plan of the files of a merged checkpoint: what becomes of each tensor, and where it lies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peftkern.formats.nf4 import NESTED_BLOCKSIZE, STATE_BYTES, STATE_KEY
from peftkern.formats.table import NF4_CODE
from peftkern.tools.checkpoints.checkpoint import DTYPES, SINGLE, Checkpoint, CheckpointError
from peftkern.tools.checkpoints.streaming import Slot, layout, read_header
from peftkern.tools.checkpoints.weights import FLOATS, Weight
from peftkern.tools.merge.arithmetic import in_panels
from peftkern.tools.merge.edits import Edit
from peftkern.tools.merge.embeddings import Untied
from peftkern.tools.merge.placement import Place, Places

NF4_LAYOUT = (64, True)  # blocksize and nested absmax, as `peftkern quantize` has it
TRAINED_LAYOUT = (64, False)  # bitsandbytes' default
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPE_OUT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT = (*_DTYPE_OUT, "nf4", "keep")


@dataclass(frozen=True)
class Options:
    """Options that decide the written bytes: a run resumes only with the same.

    out: "keep", every tensor as it is stored; "bf16", "fp16", "fp32"; "nf4". residual: rank of an
    adapter for what NF4 loses, 0 for none. as_trained: "nf4" if the adapter was trained on the base
    in NF4, "" if on the base as it is. changed_base: as for `match_adapters`.
    """

    out: str = "keep"
    residual: int = 0
    as_trained: str = ""
    changed_base: bool = False

    def __post_init__(self) -> None:
        if self.out not in OUT:
            raise CheckpointError(f"out: expected one of {', '.join(OUT)}, got {self.out!r}")
        if self.as_trained not in ("", "nf4"):
            raise CheckpointError(f"as_trained: expected nf4, got {self.as_trained!r}")
        if self.residual < 0:
            raise CheckpointError(f"residual: expected a rank of at least 1, got {self.residual}")


@dataclass(frozen=True)
class Unit:
    """What becomes of a weight of the base: some tensors of the output.

    edits: those of the parameters whose rows it holds. nf4: layout of the output if that is NF4.
    trained_nf4: it is rounded to NF4 before the edits. transposed: it is for either, as for Conv1D.
    """

    name: str
    weight: Weight
    slots: tuple[Slot, ...]
    edits: tuple[tuple[Place, Edit], ...] = ()
    nf4: tuple[int, bool] | None = None
    transposed: bool = False
    trained_nf4: bool = False

    @property
    def copied(self) -> bool:
        """Whether the output has the bytes of the base."""
        same = self.nf4 == self.weight.nf4 and self.slots[0].dtype is DTYPES[self.weight.info.dtype]
        return same and not self.edits and not self.trained_nf4

    @property
    def streamed(self) -> bool:
        """Whether panels of rows go from file to file."""
        dense = self.nf4 is None and self.weight.nf4 is None and not self.trained_nf4
        panels = all(in_panels(edit, place) for place, edit in self.edits)
        return dense and panels and len(self.weight.shape) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values: in which they are stored, or quantized."""
        return self.weight.dtype if self.nf4 is not None else self.slots[0].dtype


@dataclass(frozen=True)
class File:
    """A file to be written: its header, and the units with the places of their tensors."""

    name: str
    header: bytes
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(slot.nbytes for unit in self.units for slot in unit.slots)


def plan_files(
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    places: Places,
    edits: Mapping[str, Edit],
    untied: Sequence[Untied],
    options: Options,
    linear: Mapping[str, bool],
) -> list[File]:
    """Plan all files, under their names in the base and with its order of tensors.

    Args: linear, the weights that are, or were, quantized, as in `peftkern quantize`'s choice.
    """
    main = main_dtype(weights)
    files: dict[Path, list[Unit]] = defaultdict(list)
    home: dict[str, str] = {}
    for name, weight in weights.items():
        found = places.by_tensor.get(name, ())
        own = tuple(
            (place, _at(place, edits[place.parameter], weight))
            for place in found
            if place.parameter in edits
        )
        unit = Unit(name, weight, (), own, *_format(weight, options, linear))
        files[weight.info.file].append(_with_slots(unit, main, options))
        home |= {place.parameter: name for place in found}
    for new in untied:
        weight = weights[home[new.source]]
        place, edit = Place(new.parameter, weight.shape[0]), edits.get(new.parameter)
        unit = Unit(new.parameter, weight, (), () if edit is None else ((place, edit),))
        files[weight.info.file].append(_with_slots(unit, main, options))
    return [_file(path, files[path]) for path in checkpoint.files if path in files]


def main_dtype(weights: Mapping[str, Weight]) -> torch.dtype:
    """Return the dtype of most of the values; others are kept on purpose, and stay."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        if weight.dtype in FLOATS:
            sizes[weight.dtype] += torch.Size(weight.shape).numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _format(
    weight: Weight, options: Options, linear: Mapping[str, bool]
) -> tuple[tuple[int, bool] | None, bool, bool]:
    """Return a unit's nf4, transposed and trained_nf4."""
    trained = bool(options.as_trained) and weight.name in linear
    if weight.nf4 is not None:
        kept = weight.nf4 if options.out in ("keep", "nf4") else None
        return kept, weight.transposed, False
    if options.out == "nf4" and weight.name in linear:
        return NF4_LAYOUT, linear[weight.name], trained
    return None, trained and linear[weight.name], trained


def _with_slots(unit: Unit, main: torch.dtype, options: Options) -> Unit:
    weight = unit.weight
    if unit.nf4 is not None:
        if not unit.edits and unit.nf4 == weight.nf4:
            slots = tuple(Slot(i.name, DTYPES[i.dtype], i.shape) for i in weight.infos)
        else:
            slots = nf4_slots(unit.name, weight.shape, unit.nf4)
        return replace(unit, slots=slots)
    wanted = _DTYPE_OUT.get(options.out, weight.dtype)
    dtype = wanted if weight.dtype is main or weight.nf4 is not None else weight.dtype
    shape = weight.shape
    for place, edit in unit.edits:
        if edit.value is not None and _is_whole(place, weight):
            shape = tuple(edit.value.shape)
    return replace(unit, slots=(Slot(unit.name, dtype, shape),))


def _is_whole(place: Place, weight: Weight) -> bool:
    """Return whether a tensor is a parameter as it is."""
    rows = weight.shape[0] if weight.shape else 1
    return place.expert is None and place.rows == rows and not place.row and not place.transposed


def _at(place: Place, edit: Edit, weight: Weight) -> Edit:
    """Return what an edit of a parameter does to the rows that a tensor holds.

    Raises: CheckpointError for an edit that needs the parameter as one tensor.
    """
    if _is_whole(place, weight):
        return edit
    if edit.rows is not None or (edit.updates and not in_panels(edit, place)):
        raise CheckpointError(
            f"{place.parameter}: {weight.name} holds a part of it, and this update needs all rows"
        )
    value = None if edit.value is None else place.cut(edit.value)
    added = [(place.cut(vector), factor) for vector, factor in edit.added]
    return replace(edit, value=value, added=added)


def nf4_slots(name: str, shape: Sequence[int], layout: tuple[int, bool]) -> tuple[Slot, ...]:
    """Return the tensors of an NF4 weight, in the order of `NF4Weight.state_dict`."""
    blocksize, nested = layout
    numel = torch.Size(shape).numel()
    blocks = -(-numel // blocksize)
    slots = [
        Slot(name, torch.uint8, ((numel + 1) // 2, 1)),
        Slot(f"{name}.absmax", torch.uint8 if nested else torch.float32, (blocks,)),
        Slot(f"{name}.quant_map", torch.float32, (len(NF4_CODE),)),
    ]
    if nested:
        count = -(-blocks // NESTED_BLOCKSIZE)
        slots.append(Slot(f"{name}.nested_absmax", torch.float32, (count,)))
        slots.append(Slot(f"{name}.nested_quant_map", torch.float32, (256,)))
    return (*slots, Slot(f"{name}.{STATE_KEY}", torch.uint8, (STATE_BYTES,)))


def _file(path: Path, units: list[Unit]) -> File:
    """Give all tensors their places: those of the base's file, if nothing else fits there."""
    header, names, metadata = read_header(path)
    infos = {info.name: info for unit in units for info in unit.weight.infos}
    slots = [slot for unit in units for slot in unit.slots]
    there = {
        (info.name, DTYPES[info.dtype], info.shape)
        for info in infos.values()
        if info.file == path and info.name in names
    }
    same = len(slots) == len(names) and there == {(s.name, s.dtype, s.shape) for s in slots}
    if same:
        placed = [replace(slot, offset=infos[slot.name].offset) for slot in slots]
    else:
        header, placed = layout(slots, metadata or {"format": "pt"})
    offsets = {slot.name: slot.offset for slot in placed}
    units = [
        replace(unit, slots=tuple(replace(s, offset=offsets[s.name]) for s in unit.slots))
        for unit in units
    ]
    return File(path.name, header, tuple(units))


def merged_config(
    config: Mapping[str, Any],
    main: torch.dtype,
    options: Options,
    quantization: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the config for the formats of the output."""
    changed = dict(config)
    if quantization is not None:
        changed["quantization_config"] = dict(quantization)
    if options.out in _DTYPE_OUT:
        changed.pop("quantization_config", None)
        names = (str(main).removeprefix("torch."), str(_DTYPE_OUT[options.out])[6:])
        changed = _renamed(changed, *names)
    return changed


def _renamed(config: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Replace a dtype's name, also in the configs of parts of the model."""
    return {
        key: new
        if key in _DTYPE_KEYS and value == old
        else _renamed(value, old, new)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def index_of(files: Sequence[File]) -> dict[str, Any] | None:
    """Return the index of the files; None for a single one of the usual name."""
    if [file.name for file in files] == [SINGLE]:
        return None
    slots = [(slot, file.name) for file in files for unit in file.units for slot in unit.slots]
    size = sum(slot.nbytes for slot, _ in slots)
    return {
        "metadata": {"total_size": size},
        "weight_map": {slot.name: name for slot, name in sorted(slots, key=lambda s: s[0].name)},
    }
