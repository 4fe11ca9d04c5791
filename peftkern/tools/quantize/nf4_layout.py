"""Layout of an NF4 checkpoint, known from shapes alone: tensors, files and sizes.

Every output file begins with its final header, so that it can be filled from front to back.

Source of the layout: https://github.com/huggingface/safetensors#format, and `peftkern.formats.nf4`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkern.formats.nf4 import BLOCKSIZES, STATE_BYTES, STATE_KEY, state_dict_layout
from peftkern.tools.quantize.checkpoint import (
    DTYPES,
    SINGLE,
    Checkpoint,
    CheckpointError,
    TensorInfo,
)

WEIGHT_DTYPES = ("F32", "F16", "BF16")  # that quantize_nf4 takes

_SHARD_NAME = "model-{:05d}-of-{:05d}.safetensors"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of a header, and of every quantized weight


@dataclass(frozen=True)
class Options:
    """Options that decide the written bytes: a run resumes only with the same.

    Args: blocksize, double_quant as for `peftkern.quantize_nf4`; shard_bytes, where a new file
        begins (a larger tensor has one of its own); device that quantizes.
    """

    blocksize: int = 64
    double_quant: bool = True
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise CheckpointError(f"blocksize: expected one of {BLOCKSIZES}, got {self.blocksize}")
        if self.shard_bytes < 1:
            raise CheckpointError(f"shard_bytes: expected at least 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a quantized checkpoint; bytes are those of its tensors.

    `quantized` and `kept` count tensors. Experts here are the kept ones: transformers holds them in
    tensors of three dimensions, which bitsandbytes does not quantize, even if the source has one
    tensor for each.
    """

    quantized: int
    kept: int
    files: int
    parameters: int
    bytes_before: int
    bytes_after: int
    quantized_parameters: int
    quantized_bytes: int
    expert_parameters: int
    expert_bytes: int

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes_after / max(self.parameters, 1)

    @property
    def bits_per_quantized_parameter(self) -> float:
        return 8 * self.quantized_bytes / max(self.quantized_parameters, 1)

    @property
    def bits_per_expert_parameter(self) -> float:
        return 8 * self.expert_bytes / max(self.expert_parameters, 1)

    @property
    def quantized_share(self) -> float:
        return self.quantized_parameters / max(self.parameters, 1)

    @property
    def expert_share(self) -> float:
        return self.expert_parameters / max(self.parameters, 1)


@dataclass(frozen=True)
class Unit:
    """Tensor of the source and its output: parts (name, dtype, shape, bytes)."""

    info: TensorInfo
    quantized: bool
    transposed: bool
    parts: tuple[tuple[str, str, tuple[int, ...], int], ...]

    @property
    def nbytes(self) -> int:
        return sum(part[-1] for part in self.parts)

    @property
    def parameters(self) -> int:
        return math.prod(self.info.shape)

    @property
    def experts(self) -> bool:
        shape, names = self.info.shape, self.info.name.split(".")
        return not self.quantized and (len(shape) == 3 or (len(shape) == 2 and "experts" in names))


@dataclass
class Shard:
    units: list[Unit] = field(default_factory=list)
    name: str = ""
    header: bytes = b""

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    def starts(self) -> Iterator[tuple[Unit, int]]:
        """Yield every unit and its position in the file."""
        at = len(self.header)
        for unit in self.units:
            yield unit, at
            at += unit.nbytes


def plan_shards(
    checkpoint: Checkpoint, linear: Mapping[str, bool], options: Options
) -> tuple[Shard, ...]:
    """Plan all files and their headers, from shapes alone."""
    for name in linear:
        info = checkpoint.tensors.get(name)
        if info is None or len(info.shape) != 2 or info.dtype not in WEIGHT_DTYPES:
            came = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{name}: expected a weight of two dimensions in one of {WEIGHT_DTYPES}, got {came}"
            )
    shards = [Shard()]
    for info in checkpoint.tensors.values():
        unit = _unit(info, linear.get(info.name), options)
        if shards[-1].units and shards[-1].nbytes + unit.nbytes > options.shard_bytes:
            shards.append(Shard())
        shards[-1].units.append(unit)
    for number, shard in enumerate(shards, 1):
        # The format allows no gaps: whole words first, so that each tensor lies at a multiple of
        # the size of its elements.
        shard.units.sort(key=lambda unit: -math.gcd(unit.nbytes, _ALIGNMENT))
        shard.name = SINGLE if len(shards) == 1 else _SHARD_NAME.format(number, len(shards))
        shard.header = _header(shard.units)
    return tuple(shards)


def _unit(info: TensorInfo, transposed: bool | None, options: Options) -> Unit:
    if transposed is None:
        part = (info.name, info.dtype, info.shape, info.nbytes)
        return Unit(info, False, False, (part,))
    shape = info.shape[::-1] if transposed else info.shape
    layout = state_dict_layout(
        shape, blocksize=options.blocksize, double_quant=options.double_quant
    )
    prefix = info.name.removesuffix("weight")
    parts = [
        (prefix + name, _CODES[dtype], size, math.prod(size) * dtype.itemsize)
        for name, (dtype, size) in layout.items()
    ]
    parts.sort(key=lambda part: -DTYPES[part[1]].itemsize)
    # The JSON is padded to whole words.
    length = STATE_BYTES + -(STATE_BYTES + sum(part[-1] for part in parts)) % _ALIGNMENT
    parts.append((f"{info.name}.{STATE_KEY}", "U8", (length,), length))
    return Unit(info, True, transposed, tuple(parts))


def _header(units: Iterable[Unit]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in (part for unit in units for part in unit.parts):
        if name in entries:
            raise CheckpointError(f"{name}: in the source, but also what its weight becomes")
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + nbytes)}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def sizes_of(shards: Sequence[Shard]) -> Sizes:
    units = [unit for shard in shards for unit in shard.units]
    quantized = [unit for unit in units if unit.quantized]
    experts = [unit for unit in units if unit.experts]
    return Sizes(
        quantized=len(quantized),
        kept=len(units) - len(quantized),
        files=len(shards),
        parameters=sum(unit.parameters for unit in units),
        bytes_before=sum(unit.info.nbytes for unit in units),
        bytes_after=sum(unit.nbytes for unit in units),
        quantized_parameters=sum(unit.parameters for unit in quantized),
        quantized_bytes=sum(unit.nbytes for unit in quantized),
        expert_parameters=sum(unit.parameters for unit in experts),
        expert_bytes=sum(unit.nbytes for unit in experts),
    )
