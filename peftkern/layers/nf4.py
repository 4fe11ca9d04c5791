"""Frozen linear layer in NF4 for plain torch, and as PEFT's base layer.

Users find it as `peftkern.layers.NF4Linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import quantize_fp4, quantize_nf4
from peftkern.layers.base import check_linear
from peftkern.layers.quantized_linear import QuantizedLinear, trainable

__all__ = ["NF4Linear"]
_QUANTIZERS = {"nf4": quantize_nf4, "fp4": quantize_fp4}


class NF4Linear(QuantizedLinear):
    """Frozen linear layer with its weight in NF4, or FP4: y = x @ dequantize(weight).T + bias.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        blocksize, double_quant: of the format, see `peftkern.quantize_nf4`.
        quant_type: "nf4" or "fp4".
        dtype: of the weight that is quantized and of the bias.

    `weight` holds the packed bytes, uint8 [numel / 2, 1], and `nf4` is the whole weight. The state
    dict has bitsandbytes' keys: either side loads the other's. A dense checkpoint loads too: it is
    quantized on the way. Casting the module (`.half()`, `.to(torch.bfloat16)`) changes the bias
    alone. Merging a PEFT adapter into it raises: dequantize first (`to_linear`).

    PEFT's methods that add to what the layer puts out, or change what goes in, train over it (LoRA,
    DoRA, AdaLoRA, VeRA, C3A, IA3, OFT, ...). Those that read or write the dense weight do not, and
    PEFT's errors then speak of uint8 or of shapes, not of this layer: LoRA that starts from the
    weight (PiSSA, OLoRA, CorDA, LoftQ, orthogonal), LoHa, LoKr, HRA, SHiRA, DeLoRA, OSF and others.
    UniLoRA and VeLoRA take the weight's dtype for their own and are wrong without an error. Use
    `to_linear` for them, or bitsandbytes' Linear4bit where PEFT knows that.
    """

    kind = NF4Weight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        options = {"blocksize": blocksize, "double_quant": double_quant, "quant_type": quant_type}
        self._set_stored(quantized(self.weight, **options))
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
    ) -> NF4Linear:
        """Quantize a linear layer; the bias is taken over and frozen, the weight is left alone."""
        check_linear(linear)
        options = {"blocksize": blocksize, "double_quant": double_quant, "quant_type": quant_type}
        w = quantized(linear.weight, **options)
        return cls._from_stored(w, linear.bias, linear.training)

    @property
    def nf4(self) -> NF4Weight:
        """NF4 weight as it is now; shares memory with the layer."""
        return self.quantized_weight

    @property
    def quant_type(self) -> str:
        """Format: "nf4", as of a layer that was pickled before there were others, or "fp4"."""
        return self._quant.get("quant_type", "nf4")

    def _bytes(self, w: NF4Weight) -> Tensor:
        return w.packed.view(-1, 1)

    def _state(self, prefix: str) -> dict[str, Tensor]:
        return self.nf4.state_dict(prefix)

    def _read(self, state: dict[str, Tensor], prefix: str) -> NF4Weight:
        return NF4Weight.from_state_dict(state, prefix)

    def _quantized(self, dense: Tensor) -> NF4Weight:
        return quantized(
            dense,
            blocksize=self._quant["blocksize"],
            double_quant=self._quant["nested_absmax"] is not None,
            quant_type=self.quant_type,
        )

    def extra_repr(self) -> str:
        absmax = "nested" if self._quant["nested_absmax"] is not None else "plain"
        fp4 = ", quant_type=fp4" if self.quant_type == "fp4" else ""
        blocks = f"blocksize={self._quant['blocksize']}, absmax={absmax}{fp4}"
        return f"{super().extra_repr()}, {blocks}"


def quantized(
    weight: Tensor, *, blocksize: int, double_quant: bool, quant_type: str = "nf4"
) -> NF4Weight:
    """Quantize a weight so that even under torch.inference_mode it can be trained with."""
    if quant_type not in _QUANTIZERS:
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    with trainable(), torch.no_grad():
        options = {"blocksize": blocksize, "double_quant": double_quant}
        return _QUANTIZERS[quant_type](weight.detach(), **options)
