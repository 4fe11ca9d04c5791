"""What the layers over a frozen base share: which bases they take, and when and what they drop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from peftkern.functional.rosa import SparseMask
from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear, SVDLinear
from peftkern.methods import (
    DeltaLoRALinear,
    DoRALinear,
    DyLoRALinear,
    QuantumPEFTLinear,
    RoSALinear,
)

K, N, RANK, P = 64, 24, 3, 0.4
DROPPING = [DyLoRALinear, QuantumPEFTLinear, RoSALinear, SVDLinear, LoRALinear, NF4LoRALinear]
LAYERS = [DeltaLoRALinear, DoRALinear, DyLoRALinear, QuantumPEFTLinear, RoSALinear, SVDLinear]


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def hooked(kind: str) -> nn.Linear:
    base = nn.Linear(K, N)
    if kind == "forward":
        base.forward = lambda x: x
    else:
        getattr(base, f"register_{kind}")(lambda *args: None)
    return base


@pytest.mark.parametrize("cls", LAYERS)
def test_a_base_that_computes_something_else_is_refused(cls):
    layers = (LoRALinear(K, N), NF4LoRALinear(K, N), cls(nn.Linear(K, N)))
    for base in (Tripled(K, N), *layers, nn.Conv1d(1, 1, 1)):
        with pytest.raises(TypeError, match=f"^base: expected .* got {type(base).__name__}$"):
            cls(base)
    with pytest.raises(TypeError, match=r"^base: expected .* got ParametrizedLinear"):
        cls(parametrizations.weight_norm(nn.Linear(K, N)))
    with pytest.raises(TypeError, match="got Linear4bit; an NF4Linear of its size loads its state"):
        cls(Linear4bit(K, N, quant_type="nf4"))
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "forward"):
        base = hooked(kind)
        with pytest.raises(
            ValueError, match=r"^base: its forward is never called, .* got \w*forward|backward"
        ):
            cls(base)
        assert base.weight.requires_grad  # refused: left alone


@pytest.mark.parametrize("cls", LAYERS)
def test_a_rank_of_zero_and_a_dropout_of_one_are_refused(cls):
    for wrong in ({"r": 0}, {"lora_dropout": 1.0}):
        if cls is not DeltaLoRALinear or "r" in wrong:  # it drops nothing
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
                cls(nn.Linear(K, N), **wrong)


def make(cls: type) -> nn.Module:
    options = {"r": RANK, "lora_dropout": P}
    if cls in (LoRALinear, NF4LoRALinear):
        layer = cls(K, N, **options)
    else:
        layer = cls(nn.Linear(K, N), **options)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and "angles" not in name:
            nn.init.normal_(parameter, std=0.3)
    if cls is RoSALinear:
        places = torch.randperm(N * K)[: layer.nnz]
        layer.set_mask(SparseMask.from_indices(places // K, places % K, (N, K)))
        nn.init.normal_(layer.values)
    return layer


def formula(layer: nn.Module, x: Tensor, dropped: Tensor) -> Tensor:
    """The update sees what is left of x; the base, and RoSA's sparse part, see it whole."""
    base = getattr(layer, "base", layer)
    frozen = base.to_linear() if isinstance(base, NF4Linear) else base
    y = F.linear(x, frozen.weight, base.bias)
    if isinstance(layer, RoSALinear):
        y = y + x @ layer.mask.to_dense(layer.values).T
    if hasattr(layer, "factors"):
        A, B = layer.factors()
    else:
        A, B = layer.lora_A * getattr(layer, "lora_E", 1.0), layer.lora_B
    return y + layer.scaling * dropped @ A.T @ B.T


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", DROPPING)
def test_dropout_is_on_the_input_of_the_update_in_training_alone(cls, training):
    layer = make(cls).train(training)
    x, dy = torch.randn(9, K, requires_grad=True), torch.randn(9, N)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    wanted = formula(layer, x, F.dropout(x, P, training))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    mine, theirs = (torch.autograd.grad(t, leaves, dy) for t in (y, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
