"""Weights of a base checkpoint, dense or in 4 bits, as one kind of value."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.formats.block_weight import (
    METHOD,
    PARTS,
    BlockWeight,
    QuantizedWeight,
    chosen_blocksize,
)
from peftkern.formats.json_files import brief
from peftkern.formats.nf4 import STATE_KEYS, NF4Weight
from peftkern.functional import dequantize
from peftkern.tools.checkpoints.checkpoint import (
    DTYPES,
    READ_ERRORS,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    open_safetensors,
)
from peftkern.tools.checkpoints.four_bit import FourBit
from peftkern.tools.checkpoints.streaming import read_into

_BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATE_KEYS.values())
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A tensor of the base; shape and dtype are those of its values.

    infos: the stored tensor, or those of a quantized weight, its packed codes first. four_bit: how
    that is stored; None for a dense tensor. transposed: as [N, K] of a Conv1D's [K, N].
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    four_bit: FourBit | None = None
    transposed: bool = False

    @property
    def info(self) -> TensorInfo:
        return self.infos[0]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)

    def read(self) -> Tensor:
        """Return its values, decoded to its dtype."""
        found = self.stored()
        if isinstance(found, Tensor):
            return found
        dense = dequantize(found)
        return dense.T.contiguous() if self.transposed else dense

    def stored(self) -> Tensor | QuantizedWeight:
        """Return its values as they are stored."""
        if self.four_bit is not None:
            blocks = None if self.four_bit.format in STATE_KEYS else self.four_bit
            return _from_state(self.name, _tensors(self.infos), self.dtype, blocks)
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with open(self.info.file, "rb") as file:
            read_into(file.fileno(), tensor, self.info.offset)
        return tensor

    def experts(self) -> Iterator[Weight]:
        """Yield those of a dense stack [E, ...], each a part of its file."""
        info, (count, *shape) = self.info, self.shape
        for number in range(count):
            nbytes = info.nbytes // count
            place = {"nbytes": nbytes, "offset": info.offset + number * nbytes}
            part = replace(info, shape=tuple(shape), **place)
            yield replace(self, shape=part.shape, infos=(part,))


def find_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Find the weights of a checkpoint, in its order; of those in NF4 and FP4 the small parts are
    read. Layers of `BlockLinearConfig` have no dtype of their own, but that of most dense values.

    Raises: CheckpointError for a quantized checkpoint that is neither bitsandbytes' nor one of
        those, or whose experts are quantized.
    """
    tensors = checkpoint.tensors
    blocks = _blocks(checkpoint)
    parts, keys = (_BNB_PARTS, STATE_KEYS.values()) if blocks is None else (PARTS, ["scale"])
    quantized = {name for name in tensors for key in keys if f"{name}.{key}" in tensors}
    apart = {f"{name}.{part}" for name in quantized for part in parts} | quantized
    dense = {
        name: Weight(name, DTYPES[info.dtype], info.shape, (info,))
        for name, info in tensors.items()
        if name not in apart
    }
    dtype, weights = main_dtype(dense.values()), {}
    for name, info in tensors.items():
        if name in quantized:
            others = (tensors.get(f"{name}.{part}") for part in parts)
            infos = (info, *(other for other in others if other is not None))
            weights[name] = _quantized_weight(name, infos, dtype, blocks)
        elif name in dense:
            weights[name] = dense[name]
    return weights


def main_dtype(weights: Iterable[Weight]) -> torch.dtype:
    """Return the dtype of most of the values; others are kept on purpose, and stay."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights:
        if weight.dtype in FLOATS:
            sizes[weight.dtype] += torch.Size(weight.shape).numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _blocks(checkpoint: Checkpoint) -> FourBit | None:
    """Return the format of a checkpoint of `BlockLinearConfig`, None of a dense one or one of
    bitsandbytes. Raises: CheckpointError for any other."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None
    config = config if isinstance(config, dict) else {"quant_method": config}
    if config.get("quant_method") == METHOD:
        try:
            format = config.get("format")
            return FourBit(format, chosen_blocksize(format, config.get("blocksize")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.folder}: quantization_config: {error}") from None
    expected = {
        "quant_method": ("bitsandbytes",),
        "load_in_4bit": (True,),
        "bnb_4bit_quant_type": tuple(STATE_KEYS),
        "bnb_4bit_quant_storage": ("uint8", None),
    }
    for key, values in expected.items():
        if (came := config.get(key)) not in values:
            raise CheckpointError(
                f"{checkpoint.folder}: expected dense weights, NF4 or FP4 of bitsandbytes, or "
                f"layers of peftkern's BlockLinearConfig, got {key} {brief(came)}"
            )
    return None


def _quantized_weight(
    name: str, infos: tuple[TensorInfo, ...], dtype: torch.dtype, blocks: FourBit | None
) -> Weight:
    """Check the parts against each other; memory for the large ones is never touched."""
    with _damage_named(name, infos[0]):
        small = {f"{name}.{part}" for part in ("quant_map", *STATE_KEYS.values())}
        state = _tensors([info for info in infos if info.name in small])
        for info in infos:
            state.setdefault(info.name, torch.empty(info.shape, dtype=DTYPES[info.dtype]))
        w = _from_state(name, state, dtype, blocks)
        four_bit = FourBit(w.quant_type, w.blocksize, w.nested) if blocks is None else blocks
        return Weight(name, w.dtype, w.shape, infos, four_bit)


def _from_state(
    name: str, state: dict[str, Tensor], dtype: torch.dtype, blocks: FourBit | None
) -> QuantizedWeight:
    """Return the weight of some tensors. Raises: ValueError for what does not fit."""
    if blocks is None:
        return NF4Weight.from_state_dict(state, name.removesuffix("weight"))
    packed = state[name]
    if packed.dim() != 2:
        raise ValueError(f"packed: expected [N, K / 2], got {list(packed.shape)}")
    shape = (packed.shape[0], 2 * packed.shape[1])
    parts = {part: state.get(f"{name}.{part}") for part in PARTS}
    return BlockWeight(
        blocks.format, packed, shape=shape, dtype=dtype, blocksize=blocks.blocksize, **parts
    )


def _tensors(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    state = {}
    for info in infos:
        with open_safetensors(info.file) as file:
            state[info.name] = file.get_tensor(info.name)
    return state


@contextlib.contextmanager
def _damage_named(name: str, info: TensorInfo) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise CheckpointError(f"{info.file}: {name}: no weight in 4 bits: {error}") from None
