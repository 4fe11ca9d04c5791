"""What layers share that add a low-rank update to a frozen base layer, dense or NF4."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkern.functional import dequantize_nf4, lora_linear, nf4_lora_linear

DENSE_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear)  # one forward, two names
_BASE_TYPES: set[type] = set(DENSE_TYPES)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def serves_as_base(cls: type) -> type:
    """Class decorator of a layer that `check_base` accepts: its `nf4` and `bias` say it all."""
    _BASE_TYPES.add(cls)
    return cls


def check_base(base: nn.Module) -> nn.Linear:
    """A linear layer without an adapter, frozen: nn.Linear or NF4Linear.

    Its weight and bias are used and its forward never called, so that a subclass, which may compute
    something else, and hooks, which would not be called, are refused.
    Raises: TypeError if it is another kind of module; ValueError if it has hooks.
    """
    if type(base) not in _BASE_TYPES:
        came = type(base).__name__
        if type(base).__module__.startswith("bitsandbytes."):
            came += "; an NF4Linear of its size loads its state dict"
        raise TypeError(
            "base: expected an nn.Linear without an adapter or a peftkern.layers.NF4Linear, got "
            f"{came}"
        )
    hooks = [name for name in _HOOKS if getattr(base, name)]
    if "forward" in vars(base):  # as accelerate hooks into a layer
        hooks.append("forward")
    if hooks:
        came = ", ".join(name.lstrip("_") for name in hooks)
        raise ValueError(f"base: its forward is never called, expected no hooks, got {came}")
    return base.requires_grad_(False)


def check_update(r: int, lora_dropout: float = 0.0) -> None:
    """Raises: ValueError unless r is positive and lora_dropout in [0, 1)."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r: expected a positive rank, got {r!r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: expected a probability in [0, 1), got {lora_dropout}")


def dropout_p(layer: nn.Module) -> float:
    """The probability with which a layer drops its input now: lora_dropout while it trains."""
    return layer.lora_dropout if layer.training else 0.0


def low_rank_forward(
    base: nn.Linear,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """base(x) + scaling * (dropout(x) @ lora_A.T) @ lora_B.T in one op, see `lora_linear`."""
    options = {"scaling": scaling, "bias": base.bias, "dropout_p": dropout_p}
    if hasattr(base, "nf4"):
        return nf4_lora_linear(x, base.nf4, lora_A, lora_B, **options)
    return lora_linear(x, base.weight, lora_A, lora_B, **options)


def low_rank_update(lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """scaling * lora_B @ lora_A, [N, K], in float32 or what is wider."""
    wide = torch.promote_types(lora_B.dtype, torch.float32)
    return scaling * (lora_B.to(wide) @ lora_A.to(wide))


@torch.no_grad()
def merged(base: nn.Linear, update: Tensor) -> nn.Linear:
    """A new dense nn.Linear with the weight of `base` + update [N, K].

    Summed in float32 or what is wider, and rounded once to the dtype that the weight has, or had
    before it became NF4.
    """
    weight = dequantize_nf4(base.nf4) if hasattr(base, "nf4") else base.weight
    wide = torch.promote_types(torch.promote_types(weight.dtype, update.dtype), torch.float32)
    return linear_like(base, (weight.to(wide) + update.to(wide)).to(weight.dtype))


def linear_like(base: nn.Linear, weight: Tensor) -> nn.Linear:
    """A new nn.Linear with this dense weight and a copy of the bias of `base`."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, "meta")
    linear.weight = nn.Parameter(weight.detach())
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().clone())
    return linear
