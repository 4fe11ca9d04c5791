"""Plan of the files of a merged checkpoint: what becomes of each tensor, and where it lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peftkern.formats.table import FORMATS, NUMBERS
from peftkern.tools.checkpoints.checkpoint import (
    DTYPES,
    SINGLE,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    read_header,
)
from peftkern.tools.checkpoints.four_bit import FourBit
from peftkern.tools.checkpoints.streaming import Slot, layout
from peftkern.tools.checkpoints.weights import Weight, main_dtype
from peftkern.tools.merge.arithmetic import in_panels
from peftkern.tools.merge.edits import Edit
from peftkern.tools.merge.embeddings import Untied
from peftkern.tools.merge.placement import Place, Places
from peftkern.tools.quantize.file_plan import Choice, Stack

_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPE_OUT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT = (*_DTYPE_OUT, *NUMBERS, "keep")


@dataclass(frozen=True)
class Options:
    """Options that decide the written bytes: a run resumes only with the same.

    out: "keep", every tensor as it is stored; "bf16", "fp16", "fp32"; a row of
    `peftkern.formats.table`. residual: rank of an adapter for what 4 bits lose, 0 for none.
    as_trained: that row in which the base was when the adapter was trained, "" if it was as it is.
    changed_base: as for `match_adapters`. blocksize: of such an output, None for the usual one.
    trained_experts: whether fused experts were in NF4, too, when the adapter was trained.
    """

    out: str = "keep"
    residual: int = 0
    as_trained: str = ""
    changed_base: bool = False
    blocksize: int | None = None
    trained_experts: bool = False

    def __post_init__(self) -> None:
        if self.out not in OUT:
            raise CheckpointError(f"out: expected one of {', '.join(OUT)}, got {self.out!r}")
        if self.as_trained and self.as_trained not in NUMBERS:
            expected = ", ".join(NUMBERS)
            raise CheckpointError(
                f"as_trained: expected one of {expected}, got {self.as_trained!r}"
            )
        if self.residual < 0:
            raise CheckpointError(f"residual: expected a rank of at least 1, got {self.residual}")
        if self.out in NUMBERS:
            try:
                FORMATS[NUMBERS[self.out]].chosen_blocksize(self.blocksize)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
        elif self.blocksize is not None:
            raise CheckpointError(f"blocksize: has no effect on an output that is {self.out}")
        if self.trained_experts and self.as_trained != "nf4":
            raise CheckpointError("trained_experts: has no effect on a base not trained as nf4")

    @property
    def stored(self) -> FourBit | None:
        """4 bits of the output, as `peftkern quantize` writes them."""
        own = self.out in NUMBERS
        return FourBit.of(self.out, self.blocksize, nested=True) if own else None

    @property
    def trained(self) -> FourBit | None:
        """4 bits of training, as bitsandbytes and `BlockLinearConfig` have them by default."""
        return FourBit.of(self.as_trained, nested=False) if self.as_trained else None


class Quantized(NamedTuple):
    """Tensors that are written in 4 bits, those that were in training, and the config of what is
    written; None if nothing is quantized, or as the base is."""

    out: Choice = Choice({})
    trained: Choice = Choice({})
    config: Mapping[str, Any] | None = None

    def rounded(self, four_bit: FourBit | None) -> dict[str, bool]:
        """Return the tensors that were in 4 bits, True for those that were transposed for it."""
        rounded = dict(self.trained.linear)
        for stack in self.trained.stacks.values():
            turned = stack.turned and four_bit.format != "nf4"  # whose blocks take rows as they are
            rounded |= dict.fromkeys(stack.sources, stack.transposed != turned)
        return rounded


@dataclass(frozen=True)
class Unit:
    """What becomes of a weight of the base: some tensors of the output.

    edits: those of the parameters whose rows it holds. four_bit: how the output is stored if that
    is in 4 bits. trained: 4 bits that it is rounded to before the edits. transposed: it is for
    either, as for Conv1D.
    """

    name: str
    weight: Weight
    slots: tuple[Slot, ...]
    edits: tuple[tuple[Place, Edit], ...] = ()
    four_bit: FourBit | None = None
    transposed: bool = False
    trained: FourBit | None = None

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return self.weight.infos

    @property
    def kept(self) -> bool:
        """Whether the values stay, in the same 4 bits or dense."""
        same = self.four_bit == self.weight.four_bit
        return same and not self.edits and self.trained is None

    @property
    def copied(self) -> bool:
        """Whether the output has the bytes of the base."""
        return self.kept and self.slots[0].dtype is DTYPES[self.weight.info.dtype]

    @property
    def streamed(self) -> bool:
        """Whether panels of rows go from file to file."""
        dense = self.four_bit is None and self.weight.four_bit is None and self.trained is None
        panels = all(in_panels(edit, place) for place, edit in self.edits)
        return dense and panels and len(self.weight.shape) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values: in which they are stored, or quantized."""
        return self.weight.dtype if self.four_bit is not None else self.slots[0].dtype


@dataclass(frozen=True)
class Experts:
    """What becomes of a stack of experts that is or will be in 4 bits, or was in training.

    experts: the weights of each, whose rows are put together. four_bit: None if each becomes its
    part of the one slot.
    """

    name: str
    experts: tuple[tuple[Unit, ...], ...]
    slots: tuple[Slot, ...]
    stack: Stack
    four_bit: FourBit | None = None
    copied = False

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(info for parts in self.experts for unit in parts for info in unit.infos)

    @property
    def edits(self) -> bool:
        return any(unit.edits for parts in self.experts for unit in parts)


@dataclass(frozen=True)
class File:
    """A file to be written: its header, and the units with the places of their tensors."""

    name: str
    header: bytes
    units: tuple[Unit | Experts, ...]

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
    quantized: Quantized,
) -> list[File]:
    """Plan all files, under their names in the base and with its order of tensors; a stack of
    experts in 4 bits has the place of the first tensor that it is made of."""
    main, rounded = main_dtype(weights.values()), quantized.rounded(options.trained)
    files: dict[Path, list[Unit | Experts]] = defaultdict(list)
    home: dict[str, str] = {}
    firsts = {stack.sources[0]: name for name, stack in quantized.out.stacks.items()}
    others = {source for stack in quantized.out.stacks.values() for source in stack.sources[1:]}
    trained = {stack.sources[0]: stack for stack in quantized.trained.stacks.values()}

    def planned(weight: Weight, found: Iterable[Place]) -> Unit:
        """Return what becomes of a weight, before it has a place in a file."""
        own = tuple(
            (place, _at(place, edits[place.parameter], weight))
            for place in found
            if place.parameter in edits
        )
        return Unit(weight.name, weight, (), own, *_format(weight, options, quantized, rounded))

    def by_expert(name: str, stack: Stack, stored: FourBit | None) -> Experts:
        parts = [planned(*part) for part in _parts(stack, weights, places)]
        if stored is not None:
            return _stacked(name, parts, stack, stored)
        slots = _with_slots(planned(weights[name], ()), main, options).slots
        experts = tuple((replace(part, slots=slots),) for part in parts)
        return Experts(name, experts, slots, stack)

    for name, weight in weights.items():
        found = places.by_tensor.get(name, ())
        home |= {place.parameter: name for place in found}
        if name in firsts:
            stack = quantized.out.stacks[firsts[name]]
            files[weight.info.file].append(by_expert(firsts[name], stack, options.stored))
        elif weight.stack and not (unit := planned(weight, found)).kept:
            stack = Stack(weight.shape, (name,), turned=weight.transposed)
            files[weight.info.file].append(by_expert(name, stack, unit.four_bit))
        elif name in trained and len(weight.shape) == 3:
            files[weight.info.file].append(by_expert(name, trained[name], None))
        elif name not in others:
            files[weight.info.file].append(_with_slots(planned(weight, found), main, options))
    for new in untied:
        weight = weights[home[new.source]]
        place, edit = Place(new.parameter, weight.shape[0]), edits.get(new.parameter)
        unit = Unit(new.parameter, weight, (), () if edit is None else ((place, edit),))
        files[weight.info.file].append(_with_slots(unit, main, options))
    return [_file(path, files[path]) for path in checkpoint.files if path in files]


def _parts(
    stack: Stack, weights: Mapping[str, Weight], places: Places
) -> Iterator[tuple[Weight, tuple[Place, ...]]]:
    """Yield the weights of the experts of a stack, one after the other, and their places."""
    for name in stack.sources:
        weight, found = weights[name], places.by_tensor.get(name, ())
        if len(weight.shape) == 2:
            yield weight, found
            continue
        for number, one in enumerate(weight.experts()):
            own = (place._replace(expert=number, rows=one.shape[0]) for place in found)
            yield one, tuple(own)


def _stacked(name: str, parts: Sequence[Unit], stack: Stack, stored: FourBit) -> Experts:
    """Plan a stack in 4 bits."""
    count, found = len(parts) // stack.shape[0], (replace(p, four_bit=stored) for p in parts)
    experts = tuple(zip(*(found,) * count, strict=True))
    slots = stored.stack_slots(name, stack.shape, turned=stack.turned)
    return Experts(name, experts, slots, stack, stored)


def _format(
    weight: Weight, options: Options, quantized: Quantized, rounded: Mapping[str, bool]
) -> tuple[FourBit | None, bool, FourBit | None]:
    """Return a unit's four_bit, transposed and trained."""
    if weight.four_bit is not None and quantized.config is None:
        kept = weight.four_bit if options.out not in _DTYPE_OUT else None
        return kept, weight.transposed, None
    linear, name = quantized.out.linear, weight.name
    stored = options.stored if name in linear else None
    trained = options.trained if name in rounded else None
    return stored, linear.get(name, False) or rounded.get(name, False), trained


def _with_slots(unit: Unit, main: torch.dtype, options: Options) -> Unit:
    weight = unit.weight
    if unit.four_bit is not None:
        if unit.kept:
            slots = tuple(Slot(i.name, DTYPES[i.dtype], i.shape) for i in weight.infos)
        else:
            shape = weight.shape[::-1] if unit.transposed else weight.shape
            slots = unit.four_bit.slots(unit.name, shape)
        return replace(unit, slots=slots)
    wanted = _DTYPE_OUT.get(options.out, weight.dtype)
    dtype = wanted if weight.dtype is main or weight.four_bit is not None else weight.dtype
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


def _file(path: Path, units: Sequence[Unit | Experts]) -> File:
    """Give all tensors their places: those of the base's file, if nothing else fits there."""
    names, metadata, header, _ = read_header(path)
    infos = {info.name: info for unit in units for info in unit.infos}
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
