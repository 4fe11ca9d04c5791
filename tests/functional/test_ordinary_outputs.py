"""Outputs are ordinary tensors: users write to them, and to the inputs, as with nn.Linear."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from op_cases import op_cases
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft_models import K, N, Net, fill_adapters, make_linear, make_linear4bit
from torch import Tensor, nn

import peftkern
from peftkern.backends import ops
from peftkern.functional.adalora import orthogonality_loss
from peftkern.functional.dora import dora_linear
from peftkern.functional.rosa import SparseMask, rosa_linear
from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear, SVDLinear
from peftkern.methods import (
    DeltaLoRALinear,
    DoRALinear,
    DyLoRALinear,
    QuantumPEFTLinear,
    RoSALinear,
)
from peftkern.methods.rosa import RoSAScheduler

SHAPES = [(K,), (5, K), (2, 3, K), (1, 2, 3, K), (0, K)]


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_no_op_returns_a_view_or_an_input(op: str, backend: str) -> None:
    for args in op_cases()[op]:
        given = {t.untyped_storage().data_ptr() for t in tensors_in(args) if t.numel()}
        for result in tensors_in(getattr(ops, op)(*args)):
            assert not result._is_view()
            assert result.untyped_storage().data_ptr() not in given


def relu(y: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def add(y: Tensor) -> Tensor:
    y += 1.5
    return y


def assign(y: Tensor) -> Tensor:
    y[..., : N // 2] = 0.5
    return y


def clamp(y: Tensor) -> Tensor:
    return y.clamp_(-1, 1)


def drop(y: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(y, 0.3, training=True, inplace=True)


def unbind(y: Tensor) -> Tensor:
    return sum(part * i for i, part in enumerate(y.unbind(-1)))


def add_to_part(y: Tensor) -> Tensor:
    part = y.narrow(-1, 1, 3)
    part.mul_(2)
    return y


CONSUMERS = [relu, add, assign, clamp, drop, unbind, add_to_part]


def assert_as_torch(layer: Callable[[Tensor], Tensor], consume: Callable, shape: tuple) -> None:
    """What an in-place operation gives on a copy of the output it gives on the output itself."""
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    results = []
    for prepare in (torch.clone, lambda y: y):
        x = x0.clone().requires_grad_()
        torch.manual_seed(7)
        out = consume(prepare(layer(x)))
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():  # a view made here may not be written to with gradients
        y = layer(x0)
    y += torch.ones(y.shape, requires_grad=True)
    assert y.requires_grad


def functions() -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    W, A, B = torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4)
    bias, m = torch.randn(N), torch.rand(N)
    for factor in (A, B, bias, m):
        factor.requires_grad_()
    w = peftkern.quantize_nf4(W)
    mask = SparseMask.from_indices(torch.tensor([0, 5]), torch.tensor([3, 9]), (N, K))
    values = torch.randn(2, requires_grad=True)
    options = {"scaling": 2.0, "bias": bias}
    table = {
        "lora_linear": lambda x: peftkern.lora_linear(x, W, A, B, **options),
        "nf4_linear": lambda x: peftkern.nf4_linear(x, w, bias),
        "nf4_lora_linear": lambda x: peftkern.nf4_lora_linear(x, w, A, B, **options),
        "dora_linear": lambda x: dora_linear(x, W, A, B, m, **options),
        "dora_linear, NF4": lambda x: dora_linear(x, w, A, B, m, **options),
        "rosa_linear": lambda x: rosa_linear(x, W, A, B, values, mask, **options),
        "rosa_linear, NF4": lambda x: rosa_linear(x, w, A, B, values, mask, **options),
    }
    dropped = {"dropout_p": 0.25, **options}
    table["lora_linear, dropout"] = lambda x: peftkern.lora_linear(x, W, A, B, **dropped)
    table["nf4_lora_linear, dropout"] = lambda x: peftkern.nf4_lora_linear(x, w, A, B, **dropped)
    table["dora_linear, dropout"] = lambda x: dora_linear(x, W, A, B, m, **dropped)
    return table


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    table: dict[str, nn.Module] = {
        "LoRALinear": LoRALinear.from_linear(make_linear(), r=4),
        "NF4Linear": NF4Linear.from_linear(make_linear()),
        "NF4LoRALinear": NF4LoRALinear.from_linear(make_linear(), r=4),
        "SVDLinear": SVDLinear(make_linear(), r=4),
        "DoRALinear": DoRALinear(make_linear(), r=4),
        "DeltaLoRALinear": DeltaLoRALinear(make_linear(), r=4),
        "DyLoRALinear": DyLoRALinear(make_linear(), r=4),
        "QuantumPEFTLinear": QuantumPEFTLinear(make_linear(), r=4),
        "RoSALinear": RoSALinear(make_linear(), r=4, density=0.05),
    }
    table["DeltaLoRALinear"].start()
    collecting = nn.Sequential(RoSALinear(make_linear(), r=4, density=0.05))
    RoSAScheduler(collecting, warmup_steps=1)
    table["RoSALinear, collecting"] = collecting
    return table


@pytest.mark.parametrize("consume", CONSUMERS)
@pytest.mark.parametrize("name", sorted(functions()))
def test_functions(name: str, consume: Callable) -> None:
    for shape in SHAPES:
        assert_as_torch(functions()[name], consume, shape)


@pytest.mark.parametrize("consume", CONSUMERS)
@pytest.mark.parametrize("name", sorted(layers()))
def test_layers(name: str, consume: Callable) -> None:
    assert_as_torch(layers()[name], consume, (2, 3, K))


def test_scalar_losses() -> None:
    A, B = torch.randn(4, K, requires_grad=True), torch.randn(N, 4, requires_grad=True)
    loss = orthogonality_loss([A], [B])
    loss *= 3
    loss.backward()
    expected = torch.autograd.grad(3 * orthogonality_loss([A], [B]), A)[0]
    assert torch.equal(A.grad, expected)


PEFT_LAYERS = {
    "LoRA": lambda: LoraConfig(target_modules=["proj"]),
    "DoRA": lambda: LoraConfig(target_modules=["proj"], use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(target_modules=["proj"], total_step=10),
}


def peft_model(kind: str, base: nn.Module) -> PeftModel:
    net = Net(base)
    net.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    torch.manual_seed(2)
    model = get_peft_model(net, PEFT_LAYERS[kind]())
    fill_adapters(model)
    return model


def make_nf4_linear() -> nn.Module:
    return NF4Linear.from_linear(make_linear())


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        *itertools.product(sorted(PEFT_LAYERS), [make_linear, make_linear4bit]),
        *itertools.product(["AdaLoRA", "LoRA"], [make_nf4_linear]),
    ],
)
@pytest.mark.usefixtures("small_layers")
def test_patched_layers(kind: str, make: Callable[[], nn.Module]) -> None:
    model = peft_model(kind, make())
    peftkern.patch(model)
    for shape in SHAPES:
        for consume in CONSUMERS:
            assert_as_torch(model, consume, shape)
    assert sum(peftkern.stats().calls.values()) > 0


@pytest.mark.parametrize("frozen_A", [False, True])
@pytest.mark.parametrize("name", ["lora_linear", "nf4_lora_linear"])
def test_an_input_that_changes_after_the_call(name: str, frozen_A: bool) -> None:
    """It is needed for the gradient of lora_A alone, as in nn.Linear for that of the weight."""
    torch.manual_seed(0)
    W, A, B = torch.randn(N, K), torch.randn(4, K), torch.randn(N, 4, requires_grad=True)
    A.requires_grad_(not frozen_A)
    weight = W if name == "lora_linear" else peftkern.quantize_nf4(W)
    x0 = torch.randn(3, K, requires_grad=True)

    def ours(x: Tensor) -> Tensor:
        return getattr(peftkern, name)(x, weight, A, B, scaling=2.0)

    def torchs(x: Tensor) -> Tensor:
        return F.linear(x, A)

    for layer in (ours, torchs):
        x = x0 * 2
        y = layer(x)
        x.mul_(3)
        if frozen_A:
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.usefixtures("small_layers")
def test_a_model_that_writes_in_place() -> None:
    """As VGG heads, clip_qkv of OLMo and residual sums do, through the whole patched model."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(K, N), nn.ReLU(inplace=True), nn.Linear(N, K)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.act(self.up(x).clamp_(min=-2, max=2)))
            y += x
            return y

    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(target_modules=["up", "down"]))
    fill_adapters(model)
    twin = copy.deepcopy(model)
    peftkern.patch(twin)
    x = torch.randn(2, 5, K)
    for net in (model, twin):
        net(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)
