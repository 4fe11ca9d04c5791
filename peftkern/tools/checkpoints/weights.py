"""Weights of a base checkpoint, dense or in 4 bits, as one kind of value."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
from peftkern.layers import mxfp4_stack, nf4_stack
from peftkern.layers.expert_stack import ExpertStack
from peftkern.layers.quantize import expert_parameters
from peftkern.tools.checkpoints.checkpoint import (
    DTYPES,
    READ_ERRORS,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    unchanged,
)
from peftkern.tools.checkpoints.four_bit import FourBit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BNB_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATE_KEYS.values())
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A tensor of the base; shape and dtype are those of its values.

    infos: the stored tensor, or those of a quantized weight, its packed codes first. four_bit: how
    that is stored; None for a dense tensor. transposed: as [N, K] of a parameter's [K, N], which
    Conv1D and experts of gpt-oss have. stack: in the tensors of an `ExpertStack`, or as one expert
    of it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    four_bit: FourBit | None = None
    transposed: bool = False
    stack: bool = False

    @property
    def info(self) -> TensorInfo:
        return self.infos[0]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)

    def read(self) -> Tensor:
        """Return its values, decoded to its dtype; raises as `stored`."""
        if self.stack and len(self.shape) == 3:
            dense = torch.empty(self.shape, dtype=self.dtype)
            for place, one in zip(dense, self.experts(), strict=True):
                place.copy_(one.read())
            return dense
        found = self.stored()
        if isinstance(found, ExpertStack):
            return found.dequantize(0).contiguous()
        if isinstance(found, Tensor):
            return found
        dense = dequantize(found)
        return dense.T.contiguous() if self.transposed else dense

    def stored(self) -> Tensor | QuantizedWeight:
        """Return its values as they are stored; one expert of a stack is a stack of one.

        Raises: CheckpointError if its file has changed since it was checked.
        """
        if self.four_bit is None:
            return self.info.read()
        with unchanged(self.info.file):
            if self.stack:
                shape = self.shape if len(self.shape) == 3 else (1, *self.shape)
                stack = self.four_bit.stack(shape, self.dtype, turned=self.transposed)
                for info, part in zip(self.infos, stack.parts, strict=True):
                    info.fill(part)
                return stack
            blocks = None if self.four_bit.format in STATE_KEYS else self.four_bit
            state = {info.name: info.read() for info in self.infos}
            return _from_state(self.name, state, self.dtype, blocks)

    def experts(self) -> Iterator[Weight]:
        """Yield those of a stack [E, ...], dense or in 4 bits, each a part of its files."""
        for number in range(self.shape[0]):
            infos = tuple(info.item(number) for info in self.infos)
            yield replace(self, shape=self.shape[1:], infos=infos)


def find_weights(checkpoint: Checkpoint, *, stacks: bool = False) -> dict[str, Weight]:
    """Find the weights of a checkpoint, in its order; of those in NF4 and FP4 the small parts are
    read. Layers of `BlockLinearConfig` have no dtype of their own, but that of most dense values.

    Args: stacks, take a checkpoint whose experts are `ExpertStack`s, too; their parts are then as
        they are stored, until `join_stacks` has the model that tells their shapes.
    Raises: CheckpointError for a quantized checkpoint that is neither bitsandbytes' nor one of
        those.
    """
    tensors = checkpoint.tensors
    blocks = _blocks(checkpoint, stacks)
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


def join_stacks(
    model: PreTrainedModel, checkpoint: Checkpoint, weights: Mapping[str, Weight]
) -> dict[str, Weight]:
    """Return the weights of `find_weights`, with one in place of the parts of each `ExpertStack`.

    Raises: CheckpointError for parts that are none of a parameter's of the model.
    """
    if not may_have_stacks(checkpoint):
        return dict(weights)
    stacks = list(_stacks(model, weights))
    parts = {part.name: one for one in stacks for part in one.infos}
    dtype = main_dtype(weight for name, weight in weights.items() if name not in parts)
    joined = {}
    for name, weight in weights.items():
        if name in parts:
            stack = parts[name]
            joined[stack.name] = replace(stack, dtype=dtype)
        elif weight.four_bit is None and weight.dtype is torch.uint8:
            raise CheckpointError(
                f"{weight.info.file}: {name}: expected a part of experts in 4 bits, got U8 "
                f"{list(weight.shape)}, which fits no parameter of the model"
            )
        else:
            joined[name] = weight
    return joined


def _stacks(model: PreTrainedModel, weights: Mapping[str, Weight]) -> Iterator[Weight]:
    """Yield the stacks in 4 bits of a model's parameters, in float32."""
    for module_name, module in model.named_modules():
        turned = bool(getattr(module, "is_transposed", False))
        for own in expert_parameters(module):
            shape = tuple(module.get_parameter(own).shape)
            for name in spellings(f"{module_name}.{own}", model.base_model_prefix):
                in_nf4 = (name, nf4_stack.absmax_name(name))
                in_mxfp4 = tuple(name + suffix for suffix in mxfp4_stack.SUFFIXES)
                for parts in (in_nf4, in_mxfp4):
                    if all(part in weights for part in parts):
                        infos = tuple(weights[part].info for part in parts)
                        yield _stack(name, infos, shape, turned and parts is in_mxfp4)


def spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Return the names that a parameter may have in a model with a head, or without it."""
    return tuple(dict.fromkeys((name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))))


def _stack(
    name: str, infos: tuple[TensorInfo, ...], shape: tuple[int, ...], turned: bool
) -> Weight:
    """Check the parts of a stack against each other, and against the shape of its parameter."""
    with _damage_named(name, infos[0]):
        parts = [torch.empty(i.shape, dtype=DTYPES[i.dtype], device="meta") for i in infos]
        if infos[0].name == name:
            stack = nf4_stack.NF4Stack(*parts, shape, torch.float32)
            four_bit = FourBit("nf4", stack.blocksize)
        else:
            how = {"dtype": torch.float32, "turned": turned}
            stack = mxfp4_stack.MXFP4Stack.from_blocks(*parts, **how)
            four_bit = FourBit("mxfp4", stack.blocksize)
        if tuple(stack.shape) != shape:
            raise ValueError(f"expected experts {list(shape)}, got {list(stack.shape)}")
        sizes = [slot.nbytes for slot in four_bit.stack_slots(name, shape, turned=turned)]
        if sizes != [info.nbytes for info in infos]:  # of no blocks
            raise ValueError(f"expected parts of {sizes} bytes, got {[i.nbytes for i in infos]}")
        return Weight(name, torch.float32, shape, infos, four_bit, turned, stack=True)


def may_have_stacks(checkpoint: Checkpoint) -> bool:
    """Return whether experts may be stacks in 4 bits, whose shapes a model alone tells."""
    return _method(checkpoint) in (nf4_stack.METHOD, mxfp4_stack.METHOD)


def _method(checkpoint: Checkpoint) -> Any:
    """Return the quant_method of a checkpoint, None of a dense one."""
    config = checkpoint.config.get("quantization_config")
    return config.get("quant_method") if isinstance(config, dict) else config


def _blocks(checkpoint: Checkpoint, stacks: bool) -> FourBit | None:
    """Return the format of a checkpoint of `BlockLinearConfig`, None of a dense one or one of
    bitsandbytes. Raises: CheckpointError for any other."""
    config, method = checkpoint.config.get("quantization_config"), _method(checkpoint)
    if config is None or (stacks and method == mxfp4_stack.METHOD):
        return None
    config = config if isinstance(config, dict) else {"quant_method": config}
    if method == METHOD:
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
    if stacks and method == nf4_stack.METHOD:
        del expected["quant_method"], expected["load_in_4bit"]  # that it has, and lacks
    others = ", experts of its NF4ExpertsConfig or of gpt-oss in MXFP4" * stacks
    for key, values in expected.items():
        if (came := config.get(key)) not in values:
            raise CheckpointError(
                f"{checkpoint.folder}: expected dense weights, NF4 or FP4 of bitsandbytes, or "
                f"layers of peftkern's BlockLinearConfig{others}, got {key} {brief(came)}"
            )
    return None


def _quantized_weight(
    name: str, infos: tuple[TensorInfo, ...], dtype: torch.dtype, blocks: FourBit | None
) -> Weight:
    """Check the parts against each other; memory for the large ones is never touched."""
    with _damage_named(name, infos[0]):
        small = {f"{name}.{part}" for part in ("quant_map", *STATE_KEYS.values())}
        state = {info.name: info.read() for info in infos if info.name in small}
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


@contextlib.contextmanager
def _damage_named(name: str, info: TensorInfo) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise CheckpointError(f"{info.file}: {name}: no weight in 4 bits: {error}") from None
