"""PEFT's methods over layers that `quantize_` made: equal to the dense model, or an error."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tolerances import METHODS_RTOL
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear

WHERE = {"target_modules": ["up", "down"]}
RTOL = METHODS_RTOL[torch.float32]

TRAINED = {
    "lora": peft.LoraConfig(r=4, **WHERE),
    "lora with dropout": peft.LoraConfig(r=4, lora_dropout=0.3, **WHERE),
    "lora with a bias": peft.LoraConfig(r=4, lora_bias=True, **WHERE),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, **WHERE),
    "dora": peft.LoraConfig(r=4, use_dora=True, **WHERE),
    "dora with dropout": peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.3, **WHERE),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, **WHERE),
    "c3a": peft.C3AConfig(block_size=32, **WHERE),
    "ia3": peft.IA3Config(feedforward_modules=["down"], **WHERE),
    "oft": peft.OFTConfig(oft_block_size=32, **WHERE),
    "boft": peft.BOFTConfig(boft_block_size=32, **WHERE),
    "vera": peft.VeraConfig(r=4, **WHERE),
    "vblora": peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=32, topk=2, **WHERE),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **WHERE),
    "miss": peft.MissConfig(r=4, **WHERE),
    "randlora": peft.RandLoraConfig(r=4, **WHERE),
    "road": peft.RoadConfig(group_size=32, **WHERE),
    "waveft": peft.WaveFTConfig(n_frequency=20, **WHERE),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, **WHERE),
}
# They read or write the dense weight; the errors are PEFT's.
REFUSED = {
    "orthogonal": peft.LoraConfig(r=4, init_lora_weights="orthogonal", **WHERE),
    "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa", **WHERE),
    "pissa, fast": peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", **WHERE),
    "olora": peft.LoraConfig(r=4, init_lora_weights="olora", **WHERE),
    "corda": peft.LoraConfig(r=4, init_lora_weights="corda", **WHERE),
    "loha": peft.LoHaConfig(r=4, **WHERE),
    "lokr": peft.LoKrConfig(r=4, **WHERE),
    "hra": peft.HRAConfig(r=4, **WHERE),
    "shira": peft.ShiraConfig(r=4, **WHERE),
    "delora": peft.DeloraConfig(r=4, **WHERE),
    "osf": peft.OSFConfig(**WHERE),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


def quantized() -> Net:
    torch.manual_seed(0)
    net = Net()
    assert peftkern.quantize_(net, include=["up", "down"]) == ["up", "down"]
    return net


def dequantized() -> Net:
    net = quantized()
    for name, layer in list(net.named_children()):
        if isinstance(layer, NF4Linear):
            setattr(net, name, layer.to_linear())
    return net


def add_adapter(net: Net, config: peft.PeftConfig) -> nn.Module:
    """PEFT's model, its adapters contributing; one seed, one model."""
    torch.manual_seed(1)
    model = peft.get_peft_model(net, copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(2)
    y = model(torch.randn(2, 30, 64))
    y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """PEFT's BOFT leaves its choice of a compiler there when its kernel fails."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("method", TRAINED)
def test_a_training_step_is_that_of_the_dequantized_model(method, patched):
    model, dense = (add_adapter(net, TRAINED[method]) for net in (quantized(), dequantized()))
    if patched:
        peftkern.patch(model)
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    got, want = step(model), step(dense)
    assert got.keys() == want.keys() and len(got) > 1
    for name in got:
        largest = want[name].abs().max()
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=RTOL * largest.item())


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_the_dense_weight_raise(method):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        step(add_adapter(quantized(), REFUSED[method]))
    if method != "corda":  # which wants statistics of the data first
        step(add_adapter(dequantized(), REFUSED[method]))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_into_nf4_raises(use_dora, safe_merge):
    config = peft.LoraConfig(r=4, use_dora=use_dora, **WHERE)
    model = add_adapter(quantized(), config)
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_and_unload(safe_merge=safe_merge)(torch.randn(2, 64))
