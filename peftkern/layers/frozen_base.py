"""Mixin of layers that hold their frozen linear layer, dense or NF4, as `base`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.layers.base import NamedErrors, base_weight, kind_of
from peftkern.layers.block import BlockLinear
from peftkern.layers.nf4 import NF4Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_base(base: nn.Module) -> nn.Linear:
    """Freeze and return a linear layer without an adapter: nn.Linear, NF4Linear or BlockLinear.

    Its weight and bias are used and its forward never called, so that a subclass, which may compute
    something else, and hooks, which would not be called, are refused.
    Raises: TypeError if it is another kind of module; ValueError if it has hooks.
    """
    if type(base) not in (nn.Linear, NF4Linear, BlockLinear):
        raise TypeError(
            "base: expected an nn.Linear without an adapter or a peftkern.layers.NF4Linear or "
            f"BlockLinear, got {kind_of(base)}"
        )
    hooks = [name for name in _HOOKS if getattr(base, name)]
    if "forward" in vars(base):  # as accelerate hooks into a layer
        hooks.append("forward")
    if hooks:
        came = ", ".join(name.lstrip("_") for name in hooks)
        raise ValueError(f"base: its forward is never called, expected no hooks, got {came}")
    return base.requires_grad_(False)


class OverFrozenBase(NamedErrors, nn.Module):
    """Layer that holds its frozen linear layer as `base`, and computes more than it does."""

    base: nn.Linear

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = check_base(base)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> WeightOfUpdatedLayer:
        return WeightOfUpdatedLayer(self)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class WeightOfUpdatedLayer:
    """Stand-in for `weight` of a layer whose update a module that reads it would leave out.

    It has the shape [N, K], dtype and device of the frozen weight and no values: torch's functions
    raise. torch's fused paths, as in nn.TransformerEncoderLayer, are not for arguments with a
    `__torch_function__`: they call the layer instead.
    """

    requires_grad = False

    def __init__(self, layer: OverFrozenBase) -> None:
        weight = base_weight(layer.base)
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self._layer = type(layer).__name__

    def __matmul__(self, other: Tensor) -> None:
        return torch.matmul(self, other)  # raises as every function does

    def __rmatmul__(self, other: Tensor) -> None:
        return torch.matmul(other, self)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> None:
        read = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls)]
        layer = read[0]._layer if read else "a layer"
        raise TypeError(
            f"weight: expected a call of {layer}, got {function.__name__}() of its weight, which "
            "would leave the update out; merge() makes an nn.Linear"
        )
