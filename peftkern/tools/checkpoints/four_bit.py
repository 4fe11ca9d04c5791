"""4-bit weights as tensors of a checkpoint: linear layers in bitsandbytes' keys or `BlockLinear`'s,
stacks of experts in those of their parameter (kernels/FORMATS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftkern.formats.block_weight import BlockWeight, QuantizedWeight
from peftkern.formats.nf4 import NESTED_BLOCKSIZE, STATE_BYTES, STATE_KEYS, NF4Weight
from peftkern.formats.table import FORMATS, NUMBERS, fields
from peftkern.functional import dequantize
from peftkern.layers.block import block_quantized
from peftkern.layers.expert_stack import ExpertStack
from peftkern.layers.mxfp4_stack import MXFP4Stack
from peftkern.layers.nf4 import quantized
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.checkpoints.streaming import Slot


class FourBit(NamedTuple):
    """How a weight is stored in 4 bits.

    format: a row of `peftkern.formats.table`. nested: whether absmax is in 8 bits; of experts it
    never is.
    """

    format: str
    blocksize: int
    nested: bool = False

    @classmethod
    def of(cls, format: str, blocksize: int | None = None, *, nested: bool) -> FourBit:
        """Return a format with blocks of this size, the usual one for None, and with nested absmax
        if it has that. Raises: ValueError as `Format.chosen_blocksize` does."""
        row = FORMATS[NUMBERS[format]]
        return cls(format, row.chosen_blocksize(blocksize), nested and row.crosses_rows)

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Quantize the weight [N, K] of a linear layer."""
        if self.format not in STATE_KEYS:
            return block_quantized(weight, self.format, self.blocksize)
        how = {"blocksize": self.blocksize, "double_quant": self.nested}
        return quantized(weight, quant_type=self.format, **how)

    def round(self, weight: Tensor) -> Tensor:
        """Return the values that a weight has once it is quantized."""
        return dequantize(self.quantize(weight))

    def slots(self, name: str, shape: Sequence[int]) -> tuple[Slot, ...]:
        """Return the tensors of a weight [N, K], in the order of `state`."""
        if self.format in STATE_KEYS:
            return self._bitsandbytes_slots(name, torch.Size(shape).numel())
        layout = (NUMBERS[self.format], self.blocksize, 0, *shape)
        parts = {
            f.name: torch.empty(f.length, dtype=f.dtype, device="meta") for f in fields(layout)
        }
        how = {"shape": tuple(shape), "dtype": torch.float32, "blocksize": self.blocksize}
        return _slots(state(name, BlockWeight(self.format, **parts, **how)))

    def _bitsandbytes_slots(self, name: str, numel: int) -> tuple[Slot, ...]:
        blocks = -(-numel // self.blocksize)
        slots = [
            Slot(name, torch.uint8, ((numel + 1) // 2, 1)),
            Slot(f"{name}.absmax", torch.uint8 if self.nested else torch.float32, (blocks,)),
            Slot(f"{name}.quant_map", torch.float32, (16,)),
        ]
        if self.nested:
            count = -(-blocks // NESTED_BLOCKSIZE)
            slots.append(Slot(f"{name}.nested_absmax", torch.float32, (count,)))
            slots.append(Slot(f"{name}.nested_quant_map", torch.float32, (256,)))
        return (*slots, Slot(f"{name}.{STATE_KEYS[self.format]}", torch.uint8, (STATE_BYTES,)))

    def stack(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        turned: bool = False,
        device: torch.device | str = "cpu",
    ) -> ExpertStack:
        """Make a stack of experts without values; turned: as in `MXFP4Stack`, of NF4 nothing is."""
        if self.format == "nf4":
            return NF4Stack.empty(shape, blocksize=self.blocksize, dtype=dtype, device=device)
        return MXFP4Stack.empty(shape, dtype=dtype, turned=turned, device=device)

    def stack_slots(self, name: str, shape: tuple[int, ...], *, turned: bool) -> tuple[Slot, ...]:
        """Return the tensors of a stack, in the order of its own `state`; no dtype changes them."""
        return _slots(self.stack(shape, torch.float32, turned=turned, device="meta").state(name))


def state(name: str, w: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a linear layer's weight, in bitsandbytes' keys or `BlockLinear`'s."""
    tensors = w.state_dict(name.removesuffix("weight"))
    if isinstance(w, NF4Weight):  # JSON, in as many bytes for every weight: shapes tell the sizes
        key = f"{name}.{STATE_KEYS[w.quant_type]}"
        tensors[key] = pad(tensors[key], (0, STATE_BYTES - len(tensors[key])), value=ord(" "))
    return tensors


def _slots(tensors: dict[str, Tensor]) -> tuple[Slot, ...]:
    return tuple(Slot(name, one.dtype, tuple(one.shape)) for name, one in tensors.items())
