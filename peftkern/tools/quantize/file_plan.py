"""Plan of the files of a quantized checkpoint: what becomes of each tensor, and its size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory

from peftkern.formats.table import FORMATS, NUMBERS
from peftkern.layers import mxfp4_stack, nf4_stack
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo
from peftkern.tools.checkpoints.four_bit import FourBit

_WEIGHT_DTYPES = ("F32", "F16", "BF16")  # that can be quantized


@dataclass(frozen=True)
class Options:
    """Options that decide the written bytes: a run resumes only with the same.

    Args: blocksize, double_quant as for `peftkern.quantize_nf4`, the second of NF4 and FP4 alone;
        shard_bytes, where a new file begins (a larger tensor has one of its own); device that
        quantizes; format, "nf4" or another row of `peftkern.formats.table`.
    """

    blocksize: int = 64
    double_quant: bool = True
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"
    format: str = "nf4"

    @classmethod
    def of(cls, format: str, blocksize: int | None, **others: Any) -> Options:
        """Return the options of a format, whose usual block size stands for None."""
        if format not in NUMBERS:
            raise CheckpointError(f"format: expected one of {', '.join(NUMBERS)}, got {format!r}")
        usual = FORMATS[NUMBERS[format]].chosen_blocksize(None)
        return cls(usual if blocksize is None else blocksize, format=format, **others)

    @property
    def four_bit(self) -> FourBit:
        return FourBit(self.format, self.blocksize, self.double_quant)

    def __post_init__(self) -> None:
        try:
            FORMATS[NUMBERS[self.format]].chosen_blocksize(self.blocksize)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if self.shard_bytes < 1:
            raise CheckpointError(f"shard_bytes: expected at least 1, got {self.shard_bytes}")


class Stack(NamedTuple):
    """Experts [E, N, K] and the tensors of the source that they are: one, or as many for each as
    its rows are put together from, expert after expert. transposed: the one is [E, K, N]; turned:
    the parameter is, and the format's rows lie along K."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool = False
    turned: bool = False


class Choice(NamedTuple):
    """Tensors to quantize.

    linear: names of weights [N, K], True for those that are kept as [K, N] and are transposed
    first, as transformers does for Conv1D. stacks: of each parameter of the model that is one.
    unfit: linear layers that stay because the format's blocks do not fit their rows. together:
    tensors that stay, but whose rows a `Rewriter` changes as those of one matrix.
    """

    linear: Mapping[str, bool]
    stacks: Mapping[str, Stack] = MappingProxyType({})
    unfit: tuple[str, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Unit:
    """What becomes of some tensors of the source; `nbytes` of them are written.

    name: of the first tensor, or the parameter that is a stack. transposed: None if it is kept as
    it is; shape: that of a stack, else None; turned: as in `Stack`.
    """

    name: str
    infos: tuple[TensorInfo, ...]
    nbytes: int
    transposed: bool | None = None
    shape: tuple[int, ...] | None = None
    turned: bool = False

    @property
    def quantized(self) -> bool:
        return self.transposed is not None

    @property
    def experts(self) -> bool:
        """Weights of experts: one, or a stack of them."""
        parts = self.name.split(".")
        return "experts" in parts and len(self.infos[0].shape) > 1 and "bias" not in parts[-1]

    @property
    def nbytes_before(self) -> int:
        return sum(info.nbytes for info in self.infos)


class Size(NamedTuple):
    """Size of some tensors; bytes are those of the tensors themselves."""

    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Size:
        sizes = [
            (len(u.infos), sum(math.prod(i.shape) for i in u.infos), u.nbytes_before, u.nbytes)
            for u in units
        ]
        return cls(*map(sum, zip((0, 0, 0, 0), *sizes, strict=True)))

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.bytes_after / max(self.parameters, 1)

    def as_dict(self) -> dict[str, float]:
        return {**self._asdict(), "bits_per_parameter": self.bits}


@dataclass(frozen=True)
class Plan:
    """Files to write, by name, and their tensors; sizes of all and of some of these: experts are
    those in 4 bits, kept_experts the others."""

    files: dict[str, list[Unit]]
    total: Size
    quantized: Size
    experts: Size
    kept_experts: Size

    def kept(self) -> dict[str, Size]:
        """Return the sizes of what is not quantized, the largest first, under names with * for
        numbers."""
        groups: dict[str, list[Unit]] = {}
        for unit in (unit for units in self.files.values() for unit in units):
            if not unit.quantized:
                groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", unit.name), []).append(unit)
        sizes = {name: Size.of(units) for name, units in groups.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1].parameters))


def plan_files(checkpoint: Checkpoint, choice: Choice, options: Options) -> Plan:
    """Plan all files from shapes alone.

    Raises: CheckpointError for a weight that is none.
    """
    units = _units(checkpoint, choice, options)
    split = split_state_dict_into_shards_factory(
        units,
        get_storage_size=attrgetter("nbytes"),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.shard_bytes,
    )
    return Plan(
        {file: [units[n] for n in names] for file, names in split.filename_to_tensors.items()},
        Size.of(units.values()),
        Size.of(unit for unit in units.values() if unit.quantized),
        Size.of(unit for unit in units.values() if unit.experts and unit.quantized),
        Size.of(unit for unit in units.values() if unit.experts and not unit.quantized),
    )


def _units(checkpoint: Checkpoint, choice: Choice, options: Options) -> dict[str, Unit]:
    """Find what becomes of every tensor, in the order of the source; a stack has the place of the
    first tensor that it is made of."""
    stacks = {source: name for name, stack in choice.stacks.items() for source in stack.sources}
    for name in (*choice.linear, *stacks):
        info = checkpoint.tensors.get(name)
        dimensions = (2,) if name in choice.linear else (2, 3)
        if info is None or len(info.shape) not in dimensions or info.dtype not in _WEIGHT_DTYPES:
            came = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{name}: expected a weight of two dimensions in one of {_WEIGHT_DTYPES}, "
                f"got {came}"
            )
    together = {name: group for group in choice.together for name in group}
    units = {}
    for name, info in checkpoint.tensors.items():
        if name in choice.linear:
            transposed = choice.linear[name]
            nbytes = _linear_bytes(name, info.shape[::-1] if transposed else info.shape, options)
            units[name] = Unit(name, (info,), nbytes, transposed)
        elif name in together:
            infos = tuple(checkpoint.tensors[other] for other in together[name])
            units[infos[0].name] = Unit(infos[0].name, infos, sum(one.nbytes for one in infos))
        elif name not in stacks:
            units[name] = Unit(name, (info,), info.nbytes)
        elif stacks[name] not in units:
            stack = choice.stacks[stacks[name]]
            units[stacks[name]] = _stack_unit(checkpoint, stacks[name], stack, options)
    return units


def _linear_bytes(name: str, shape: tuple[int, ...], options: Options) -> int:
    """Return the size of what a linear layer's weight [N, K] becomes."""
    try:
        return sum(slot.nbytes for slot in options.four_bit.slots(name, shape))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}; quantize --skip leaves it as it is") from None


def _stack_unit(checkpoint: Checkpoint, name: str, stack: Stack, options: Options) -> Unit:
    reason = (
        nf4_stack.refusal(stack.shape, options.blocksize)
        if options.format == "nf4"
        else mxfp4_stack.refusal(stack.shape, stack.turned)
    )
    if reason is not None:
        raise CheckpointError(f"{name}: {reason}; quantize --skip leaves them as they are")
    infos = tuple(checkpoint.tensors[source] for source in stack.sources)
    numel = math.prod(stack.shape)
    if sum(math.prod(info.shape) for info in infos) != numel or len({i.dtype for i in infos}) != 1:
        raise CheckpointError(
            f"{name}: expected tensors of one dtype that make up {list(stack.shape)}, got "
            f"{len(infos)} of {list(infos[0].shape)}"
        )
    slots = options.four_bit.stack_slots(name, stack.shape, turned=stack.turned)
    nbytes = sum(slot.nbytes for slot in slots)
    return Unit(name, infos, nbytes, stack.transposed, stack.shape, stack.turned)
