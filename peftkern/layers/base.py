"""Parts of linear layers over a frozen weight, dense or NF4, that add a low-rank update to it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional import dequantize, lora_linear, nf4_linear, nf4_lora_linear
from peftkern.functional.arguments import integer, number


def check_linear(linear: nn.Module) -> None:
    """Raise TypeError unless it is an nn.Linear, no subclass, whose weight is a parameter."""
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear: expected an nn.Linear, got {kind_of(linear)}")
    if linear._parameters.get("weight") is None:
        raise TypeError(
            "linear: expected a weight that is a parameter, got one that is computed "
            f"from {', '.join(linear._parameters)} (weight_norm, pruning)"
        )


def kind_of(module: Any) -> str:
    """Name the class of a module that was refused, and what to do instead where that is known."""
    if type(module) is NonDynamicallyQuantizableLinear:
        return (
            "NonDynamicallyQuantizableLinear: nn.MultiheadAttention reads the weight of its "
            "out_proj and never calls it, so that nothing in its place would be used"
        )
    kind = type(module).__name__
    if type(module).__module__.startswith("bitsandbytes."):
        kind += "; an NF4Linear of its size loads its state dict"
    return kind


def check_update(r: int, lora_alpha: float, lora_dropout: float = 0.0) -> int:
    """Return r; raise ValueError unless it is positive and lora_dropout in [0, 1)."""
    number("lora_alpha", lora_alpha)
    if not 0.0 <= number("lora_dropout", lora_dropout) < 1.0:
        raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {lora_dropout}")
    return integer("r", r, 1)


def dropout_p(layer: nn.Module) -> float:
    """Return a layer's dropout probability now: lora_dropout while it trains."""
    return layer.lora_dropout if layer.training else 0.0


class LowRankFactors:
    """Mixin of a module with `in_features` and `out_features`: lora_A [r, K] and lora_B [N, r]."""

    def _add_factors(self, r: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        factory = {"dtype": dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as nn.Linear draws its weight, and zero lora_B: the update starts at zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


class NamedErrors:
    """Mixin of a module: a TypeError or ValueError of its forward names the layer.

    `_forward` computes. `qualified_name` is the layer's place in its model, where it is known.
    """

    qualified_name = ""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self._forward(x)
        except (TypeError, ValueError) as error:
            place = f" {self.qualified_name}" if self.qualified_name else ""
            error.args = (f"{type(self).__name__}{place}: {error}",)
            raise


def base_weight(base: nn.Linear) -> Tensor | QuantizedWeight:
    """Return the weight of a frozen layer that `check_base` accepts."""
    return base.quantized_weight if hasattr(type(base), "quantized_weight") else base.weight


def low_rank_forward(
    base: nn.Linear,
    x: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Apply a frozen layer plus a low-rank update in one op.

    base(x) + scaling * (dropout(x) @ lora_A.T) @ lora_B.T; base(x) without factors.

    Sparse and nested inputs, which the kernels do not know, go through torch's functions.
    """
    weight, bias = base_weight(base), base.bias
    if not is_strided(x):
        weight = weight if isinstance(weight, Tensor) else dequantize(weight)
        return _torch_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
    if lora_A is None:
        return nf4_linear(x, weight, bias)
    function = lora_linear if isinstance(weight, Tensor) else nf4_lora_linear
    return function(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout_p=dropout_p)


def is_strided(x: Any) -> bool:
    """Return whether x is neither sparse nor nested; what is no tensor passes."""
    return not isinstance(x, Tensor) or (x.layout is torch.strided and not x.is_nested)


def check_strided(x: Any) -> None:
    """Raise ValueError on a sparse or nested tensor."""
    if not is_strided(x):
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise ValueError(f"x: expected a tensor with strides, got {kind}")


def _torch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
) -> Tensor:
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora_A is None:
        return y
    if dropout_p:
        x = F.dropout(x if x.is_nested else x.to_dense(), dropout_p)
    return y + scaling * F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))


def low_rank_update(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """Return scaling * lora_B @ lora_A, [N, K], in float32 or what is wider."""
    wide = torch.promote_types(lora_B.dtype, torch.float32)
    return scaling * (lora_B.to(wide) @ lora_A.to(wide))


@torch.no_grad()
def merged(base: nn.Linear, update: Tensor) -> nn.Linear:
    """Make a dense nn.Linear with the weight of `base` + update [N, K].

    Summed in float32 or what is wider, and rounded once to the dtype that the weight has, or had
    before it was quantized.
    """
    weight = base_weight(base)
    weight = weight if isinstance(weight, Tensor) else dequantize(weight)
    wide = torch.promote_types(torch.promote_types(weight.dtype, update.dtype), torch.float32)
    return linear_like(base, (weight.to(wide) + update.to(wide)).to(weight.dtype))


def linear_like(base: nn.Linear, weight: Tensor) -> nn.Linear:
    """Make an nn.Linear with this dense weight and a copy of the bias of `base`."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, "meta")
    linear.weight = nn.Parameter(weight.detach())
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().clone())
    return linear


def bare_linear(cls: type, in_features: int, out_features: int, training: bool) -> Any:
    """Make an nn.Linear of that class with no parameters yet: its __init__ would draw a weight."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.register_parameter("weight", None)  # the order that nn.Linear's state dict has
    layer.register_parameter("bias", None)
    layer.in_features, layer.out_features = in_features, out_features
    layer.training = training
    return layer
