"""Stack of expert weights in MXFP4, as gpt-oss ships them: see `peftkern.layers.expert_stack`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.formats.table import MXFP4
from peftkern.functional import quantize_mxfp4
from peftkern.layers.expert_stack import ExpertStack, float_dtype

__all__ = ["MXFP4Stack"]
METHOD = "mxfp4"  # quant_method of a checkpoint of such experts, transformers' own
BLOCKSIZE = MXFP4.blocksizes[0]
SUFFIXES = ("_blocks", "_scales")  # of the entries of a checkpoint


class MXFP4Stack(ExpertStack):
    """Frozen weights [E, N, K] in MXFP4: blocks of 32 values of a row, with a power of 2 each.

    Args:
        packed: uint8 [E, N * K / 2].
        scale: uint8 [E, N * K / 32].
        shape: (E, N, K); (E, K, N) if turned.
        dtype: that others take the values for. A cast changes it alone: the bytes stay.
        turned: whether others see each expert's matrix transposed, as in gpt-oss, whose checkpoint
            has [N, K] and whose model [K, N].

    What is added, subtracted or copied is quantized again, as in an `NF4Stack`.
    Raises: ValueError naming the argument that does not fit.
    Source: OCP Microscaling Formats (MX) Specification 1.0; keys and layout as openai/gpt-oss
    """

    PARTS = ("_packed", "_scale")
    FORMAT = "MXFP4"
    _packed: Tensor
    _scale: Tensor

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, scales: Tensor, *, dtype: torch.dtype, turned: bool = False
    ) -> MXFP4Stack:
        """View the tensors of a checkpoint: uint8 [E, N, K / 32, 16] and [E, N, K / 32]."""
        if (
            blocks.dim() != 4
            or blocks.shape[3] != BLOCKSIZE // 2
            or blocks.dtype is not torch.uint8
        ):
            raise ArgumentError(
                f"blocks: expected uint8 [experts, N, K / {BLOCKSIZE}, {BLOCKSIZE // 2}], got "
                f"{blocks.dtype} {list(blocks.shape)}"
            )
        if scales.shape != blocks.shape[:3] or scales.dtype is not torch.uint8:
            raise ArgumentError(
                f"scales: expected uint8 {list(blocks.shape[:3])}, got {scales.dtype} "
                f"{list(scales.shape)}"
            )
        E, N, groups, _ = blocks.shape
        matrix = (N, groups * BLOCKSIZE)
        parts = (part.contiguous().view(E, -1) for part in (blocks, scales))
        return cls(*parts, (E, *(reversed(matrix) if turned else matrix)), dtype, turned)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        turned: bool = False,
        device: torch.device | str | None = None,
    ) -> MXFP4Stack:
        """Make a stack without values, for `set_expert`."""
        reason = refusal(shape, turned)
        if reason is not None:
            raise ArgumentError(reason)
        E, numel = shape[0], math.prod(shape[1:])
        with torch.inference_mode(False):  # so that even there it can be trained with
            sizes = (numel // 2, numel // BLOCKSIZE)
            parts = [torch.empty(E, size, dtype=torch.uint8, device=device) for size in sizes]
        return cls(*parts, tuple(shape), dtype, turned)

    @classmethod
    def from_dense(cls, weight: Tensor, *, turned: bool = False) -> MXFP4Stack:
        """Quantize float32, float16 or bfloat16 weights [E, N, K], an expert at a time."""
        return cls._of_dense(weight, turned=turned)

    @classmethod
    def _check(cls, packed: Tensor, scale: Tensor, shape: tuple[int, ...], turned: bool) -> None:
        values = math.prod(shape[1:])
        fits = len(shape) == 3 and packed.dtype is torch.uint8 and scale.dtype is torch.uint8
        fits = fits and packed.shape == (shape[0], values // 2)
        if not fits or scale.shape != (shape[0], values // BLOCKSIZE):
            raise ArgumentError(
                f"shape: {list(shape)} does not fit packed {packed.dtype} {list(packed.shape)} and "
                f"scale {scale.dtype} {list(scale.shape)}"
            )
        reason = refusal(shape, turned)
        if reason is not None:
            raise ArgumentError(reason)

    @staticmethod
    def weight_of(
        stack: ExpertStack, packed: Tensor, scale: Tensor, shape: tuple[int, ...]
    ) -> BlockWeight:
        parts = packed.reshape(-1), scale.reshape(-1)
        return BlockWeight(MXFP4.name, *parts, shape, float_dtype(stack), BLOCKSIZE)

    def _quantized(self, weight: Tensor) -> BlockWeight:
        with torch.inference_mode(False), torch.no_grad():
            return quantize_mxfp4(weight.detach())

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the entries of gpt-oss's checkpoints."""
        E, *matrix = self.shape
        N, K = reversed(matrix) if self.turned else matrix
        blocks, scales = (name + suffix for suffix in SUFFIXES)
        shape = (E, N, K // BLOCKSIZE)
        packed = self._packed.view(*shape, BLOCKSIZE // 2)
        return {blocks: packed, scales: self._scale.view(shape)}

    def read(self, state: dict[str, Tensor], name: str) -> MXFP4Stack | None:
        """Read a stack as `state` writes it, or a dense one."""
        keys = [name + suffix for suffix in SUFFIXES if name + suffix in state]
        if len(keys) == 1:
            raise ArgumentError(f"expected both of {SUFFIXES}, got {keys[0]}")
        if keys:
            blocks, scales = map(state.pop, keys)
            return MXFP4Stack.from_blocks(blocks, scales, dtype=self.dtype, turned=self.turned)
        value = state.get(name)
        if value is None or isinstance(value, MXFP4Stack):
            return value
        return MXFP4Stack.from_dense(value.to(self.dtype), turned=self.turned)


def refusal(shape: tuple[int, ...], turned: bool = False) -> str | None:
    """Return the reason for which a weight of this shape cannot be an MXFP4Stack."""
    if len(shape) != 3:
        return f"weight: expected [experts, N, K], got shape {list(shape)}"
    K = shape[1] if turned else shape[2]
    if K % BLOCKSIZE:
        return f"weight: expected rows of a multiple of {BLOCKSIZE} values, got {K}"
    return None
