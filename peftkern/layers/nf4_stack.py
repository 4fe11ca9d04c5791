"""Stack of expert weights in NF4: see `peftkern.layers.expert_stack`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkern.formats.nf4 import BLOCKSIZES, ArgumentError, NF4Weight
from peftkern.layers.expert_stack import ExpertStack, expert_weight, float_dtype
from peftkern.layers.nf4 import quantized

__all__ = ["NF4Stack"]
METHOD = "peftkern_nf4_experts"  # quant_method of a checkpoint of such experts


class NF4Stack(ExpertStack):
    """Frozen weights [E, N, K] in NF4, whose blocks do not cross experts.

    Args:
        packed: uint8 [E, N * K / 2]: an expert's bytes are those of `quantize_nf4` of it alone.
        absmax: float32 [E, N * K / blocksize], never nested.
        shape: (E, N, K), or (E, K, N) where a model keeps its weights so.
        dtype: that others take the values for. A cast changes it alone: the bytes stay.

    `add_`, `sub_` and `copy_`, by which adapters are merged and checkpoints loaded, quantize the
    experts that change again, one at a time, and warn of the error. Anything else that would write
    raises.
    Raises: ValueError naming the argument that does not fit.
    """

    PARTS = ("_packed", "_absmax")
    FORMAT = "NF4"
    _packed: Tensor
    _absmax: Tensor

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        *,
        blocksize: int = 64,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> NF4Stack:
        """Make a stack without values, for `set_expert`."""
        reason = refusal(shape, blocksize)
        if reason is not None:
            raise ArgumentError(reason)
        experts, numel = shape[0], math.prod(shape[1:])
        with torch.inference_mode(False):  # so that even there it can be trained with
            packed = torch.empty(experts, numel // 2, dtype=torch.uint8, device=device)
            absmax = torch.empty(experts, numel // blocksize, dtype=torch.float32, device=device)
        return cls(packed, absmax, tuple(shape), dtype)

    @classmethod
    def from_dense(cls, weight: Tensor, *, blocksize: int = 64) -> NF4Stack:
        """Quantize float32, float16 or bfloat16 weights [E, N, K], an expert at a time.

        Bit for bit what `quantize_nf4` of each expert gives, and bitsandbytes of the whole.
        """
        return cls._of_dense(weight, blocksize=blocksize)

    @property
    def nf4(self) -> NF4Weight:
        """NF4 weight of shape (E, N, K) as it is now; shares memory with this."""
        return expert_weight(self)

    @classmethod
    def _check(cls, packed: Tensor, absmax: Tensor, shape: tuple[int, ...], turned: bool) -> None:
        values = math.prod(shape[1:])
        fits = len(shape) == 3 and packed.dtype is torch.uint8 and absmax.dtype is torch.float32
        fits = fits and packed.shape == (shape[0], values // 2)
        fits = fits and absmax.dim() == 2 and len(absmax) == shape[0]
        blocks = absmax.shape[1] if fits else 0
        if not fits or (blocks and values % blocks) or blocks * 2 > values:
            raise ArgumentError(
                f"shape: {list(shape)} does not fit packed {packed.dtype} {list(packed.shape)} and "
                f"absmax {absmax.dtype} {list(absmax.shape)}"
            )
        reason = refusal(shape, values // blocks) if blocks else None
        if reason is not None:
            raise ArgumentError(reason)

    @staticmethod
    def weight_of(
        stack: ExpertStack, packed: Tensor, scale: Tensor, shape: tuple[int, ...]
    ) -> NF4Weight:
        blocksize = 2 * stack._packed.shape[1] // max(stack._absmax.shape[1], 1)
        parts = packed.reshape(-1), scale.reshape(-1)
        return NF4Weight(*parts, shape, int(blocksize), float_dtype(stack))

    def _quantized(self, weight: Tensor) -> NF4Weight:
        return quantized(weight, blocksize=self.blocksize, double_quant=False)

    def state(self, name: str) -> dict[str, Tensor]:
        return {name: self._packed, absmax_name(name): self._absmax}

    def read(self, state: dict[str, Tensor], name: str) -> NF4Stack | None:
        """Read a stack as `state` writes it, as bitsandbytes does, or dense."""
        if name not in state:
            return None
        value = state[name]
        if isinstance(value, NF4Stack):
            return value
        absmax = state.pop(absmax_name(name), None)
        if absmax is not None:
            return NF4Stack(value, absmax, tuple(self.shape), self.dtype)
        companions = {k: state.pop(k) for k in list(state) if k.startswith(f"{name}.")}
        if companions:
            w = NF4Weight.from_state_dict(
                {"weight": value, **{f"weight{k[len(name) :]}": v for k, v in companions.items()}}
            )
            if w.nested:
                raise ArgumentError("absmax: expected float32, got one that is nested")
            if w.quant_type != "nf4":
                raise ArgumentError(f"quant_type: expected 'nf4', got {w.quant_type!r}")
            parts = (part.view(self.shape[0], -1) for part in w.tensors)
            return NF4Stack(*parts, w.shape, self.dtype)
        return NF4Stack.from_dense(value.to(self.dtype), blocksize=self.blocksize)


def refusal(shape: tuple[int, ...], blocksize: int) -> str | None:
    """Return the reason for which a weight of this shape cannot be an NF4Stack."""
    if len(shape) != 3:
        return f"weight: expected [experts, N, K], got shape {list(shape)}"
    if blocksize not in BLOCKSIZES:
        return f"blocksize: expected one of {BLOCKSIZES}, got {blocksize!r}"
    if math.prod(shape[1:]) % blocksize:
        return (
            f"weight: expected experts of a multiple of {blocksize} values, so that no block is "
            f"shared by two of them, got {shape[1]} x {shape[2]}"
        )
    return None


def absmax_name(name: str) -> str:
    """Return the key of the absmax of a parameter: "gate_up_absmax" of "gate_up_proj".

    That of "weight" is "absmax": transformers takes "weight_absmax" for bitsandbytes' key.
    """
    path, _, own = name.rpartition(".")
    own = "absmax" if own == "weight" else f"{own.removesuffix('_proj')}_absmax"
    return f"{path}.{own}" if path else own
