"""DoRALinear: starts as its base, trains, merges, and refuses what it cannot wrap."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from linear_cases import BF16, F32
from tolerances import DORA_RMS_RATIO, FLOOR_RMS, errors
from torch import nn

from peftkern.layers import NF4Linear
from peftkern.methods import DoRALinear


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layer_starts_as_its_base_and_trains(kind, dtype):
    base = nn.Linear(64, 48).to(dtype)
    if kind == "nf4":
        base = NF4Linear.from_linear(base)
    before = copy.deepcopy(base)
    layer = DoRALinear(base, r=4)
    x = torch.randn(16, 64).to(dtype)
    assert errors(layer(x), before(x))[0] <= DORA_RMS_RATIO * FLOOR_RMS[dtype]
    target = torch.randn(16, 48).to(dtype)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "magnitude"}
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(layer.magnitude, DoRALinear(before, r=4).magnitude)
    merged = layer.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype is dtype
    assert errors(merged(x), layer(x))[0] <= 2 * DORA_RMS_RATIO * FLOOR_RMS[dtype]
    twin = DoRALinear(copy.deepcopy(before), r=4)
    assert list(twin.state_dict()) == list(layer.state_dict())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_layer_in_eval_drops_nothing():
    layer = DoRALinear(nn.Linear(16, 12), r=2, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
