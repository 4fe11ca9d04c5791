"""Frozen linear layer in MXFP4, NVFP4 or INT4 for plain torch.

Users find it as `peftkern.layers.BlockLinear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern.formats.block_weight import PARTS, BlockWeight, chosen_blocksize
from peftkern.functional import quantize_int4, quantize_mxfp4, quantize_nvfp4
from peftkern.layers.base import check_linear
from peftkern.layers.quantized_linear import QuantizedLinear, trainable

__all__ = ["BlockLinear"]
_QUANTIZERS: dict[str, Callable[..., BlockWeight]] = {
    "mxfp4": quantize_mxfp4,
    "nvfp4": quantize_nvfp4,
    "int4": quantize_int4,
}


class BlockLinear(QuantizedLinear):
    """Frozen linear layer with its weight in MXFP4, NVFP4 or INT4.

    y = x @ dequantize(weight).T + bias

    Args:
        in_features, out_features: K, a multiple of the format's block size, and N.
        bias: whether there is a bias.
        format: "mxfp4", "nvfp4" or "int4".
        blocksize: of INT4 alone: 32, 64, 128 or 256.
        dtype: of the weight that is quantized and of the bias.

    `weight` holds the packed bytes, uint8 [N, K / 2], and `quantized_weight` is the whole. The
    state dict has `weight`, `weight.scale` [N, K / blocksize], and `weight.tensor_scale` of NVFP4
    or `weight.zero` of INT4. A dense checkpoint loads too: it is quantized on the way. Casting the
    module changes the bias alone.
    """

    kind = BlockWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "mxfp4",
        blocksize: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_stored(block_quantized(self.weight, format, blocksize))
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, format: str = "mxfp4", blocksize: int | None = None
    ) -> BlockLinear:
        """Quantize a linear layer; the bias is taken over and frozen, the weight is left alone."""
        check_linear(linear)
        w = block_quantized(linear.weight, format, blocksize)
        return cls._from_stored(w, linear.bias, linear.training)

    @classmethod
    def from_weight(cls, weight: BlockWeight, bias: Tensor | None = None) -> BlockLinear:
        """Make a layer over a weight [N, K] as it is, and a bias [N] that is taken over."""
        if not isinstance(weight, BlockWeight) or len(weight.shape) != 2:
            raise ValueError(f"weight: expected a BlockWeight of shape (N, K), got {weight!r}")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return cls._from_stored(weight, parameter, True)

    def _bytes(self, w: BlockWeight) -> Tensor:
        return w.packed.view(w.shape[0], w.shape[1] // 2)

    def _state(self, prefix: str) -> dict[str, Tensor]:
        return self.quantized_weight.state_dict(prefix)

    def _read(self, state: dict[str, Tensor], prefix: str) -> BlockWeight:
        name = f"{prefix}weight"
        known = {name, *(f"{name}.{part}" for part in PARTS)}
        missing = sorted(set(self._state(prefix)) - set(state))
        if missing or not set(state) <= known:
            found = (missing or sorted(set(state) - known))[0]
            how = "missing from" if missing else "unexpected in"
            raise ValueError(f"{found}: {how} the state dict of a layer in {self._quant['format']}")
        parts = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
        own = {key: self._quant[key] for key in ("format", "shape", "dtype", "blocksize")}
        return BlockWeight(packed=state[name].detach(), **parts, **own)

    def _quantized(self, dense: Tensor) -> BlockWeight:
        return block_quantized(dense, self._quant["format"], self._quant["blocksize"])

    def extra_repr(self) -> str:
        blocks = f"format={self._quant['format']}, blocksize={self._quant['blocksize']}"
        return f"{super().extra_repr()}, {blocks}"


def block_quantized(weight: Tensor, format: str, blocksize: int | None) -> BlockWeight:
    """Quantize a weight so that even under torch.inference_mode it can be trained with."""
    chosen = chosen_blocksize(format, blocksize)
    options = {"blocksize": chosen} if format == "int4" else {}
    with trainable(), torch.no_grad():
        return _QUANTIZERS[format](weight.detach(), **options)
