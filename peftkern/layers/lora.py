"""LoRA layers for plain torch, over a dense or an NF4 weight.

    layer = NF4LoRALinear.from_linear(linear, r=16, lora_alpha=32)

Each is an `nn.Linear` in everything but its forward, so that code which looks for linear layers
(PEFT's target_modules among it) finds them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkern.layers.base import (
    LowRankFactors,
    NamedErrors,
    bare_linear,
    check_linear,
    check_update,
    dropout_p,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.nf4 import NF4Linear, quantized

__all__ = ["LoRALinear", "NF4LoRALinear"]


def _keep_fused_paths_away(layer: nn.Module, args: tuple) -> None:
    """Do nothing, as a forward pre-hook: nn.TransformerEncoderLayer calls layers that have hooks.

    In inference it reads the weights of others, without their update.
    """


class _Adapter(LowRankFactors, NamedErrors):
    """Mixin of the two LoRA layers: lora_A [r, K], lora_B [N, r], scaling and dropout."""

    def _add_adapter(
        self,
        device: torch.device | str | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        adapter_dtype: torch.dtype,
    ) -> None:
        r = check_update(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r
        self.lora_dropout = lora_dropout
        self._add_factors(r, adapter_dtype, device)
        self.reset_lora_parameters()
        self.register_forward_pre_hook(_keep_fused_paths_away)

    def _forward(self, x: Tensor) -> Tensor:
        options = {"scaling": self.scaling, "dropout_p": dropout_p(self)}
        return low_rank_forward(self, x, self.lora_A, self.lora_B, **options)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, without the update's cost.

        It has the dtype that the weight had.
        """
        with torch.no_grad():
            return merged(self, low_rank_update(self.lora_A, self.lora_B, self.scaling))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}"
        )


class LoRALinear(_Adapter, nn.Linear):
    """Frozen linear layer plus a trained low-rank update.

    y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args:
        in_features, out_features: K and N.
        r: rank. lora_alpha: scaling = lora_alpha / r; `scaling` may be changed at any time.
        lora_dropout: on the input of the update, in training only.
        bias: whether there is a bias; it is frozen, as is the weight.
        dtype: of weight and bias. adapter_dtype: of lora_A and lora_B.

    State dict: `weight`, `bias`, `lora_A`, `lora_B`. `weight` is the frozen one: what reads it in
    place of calling the layer, as nn.MultiheadAttention does with out_proj, leaves the update out.
    Source: Hu et al. 2021, eq. 3, arXiv:2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self._add_adapter(device, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> LoRALinear:
        """Add an update to a linear layer, whose weight and bias are taken over and frozen."""
        check_linear(linear)
        layer = bare_linear(cls, linear.in_features, linear.out_features, linear.training)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.requires_grad_(False)
        layer._add_adapter(linear.weight.device, r, lora_alpha, lora_dropout, adapter_dtype)
        return layer


class NF4LoRALinear(_Adapter, NF4Linear):
    """Frozen linear layer in NF4 plus a trained low-rank update (QLoRA).

    y = x @ dequantize(weight).T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: as `NF4Linear` and `LoRALinear`. State dict: bitsandbytes' keys, `lora_A` and `lora_B`.
    Source: Dettmers et al. 2023, eq. 5, arXiv:2305.14314
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            blocksize=blocksize,
            double_quant=double_quant,
            quant_type=quant_type,
            device=device,
            dtype=dtype,
        )
        self._add_adapter(device, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> NF4LoRALinear:
        """Quantize a linear layer, or take over an NF4Linear as it is, and add an update."""
        if type(linear) is NF4Linear:
            w = linear.nf4
        else:
            check_linear(linear)
            w = quantized(
                linear.weight,
                blocksize=blocksize,
                double_quant=double_quant,
                quant_type=quant_type,
            )
        layer = cls._from_stored(w, linear.bias, linear.training)
        layer._add_adapter(w.device, r, lora_alpha, lora_dropout, adapter_dtype)
        return layer
