"""Hooks that gather statistics: shared inputs, gradients without parameters that require them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peftkern.methods.initialization.statistics import (
    equal_inputs,
    groups,
    input_statistics,
    weight_gradients,
)


class Block(nn.Module):
    """Two layers on the input, one on their product, which is changed in place, one unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)
        self.o, self.idle = nn.Linear(4, 5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        q += 1
        return self.o(input=q * self.k(x))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


class Total:
    def __init__(self) -> None:
        self.sum = 0.0

    def add(self, x: Tensor) -> None:
        self.sum += float(x.double().sum())


def test_layers_with_the_same_input_are_found():
    model = Block().bfloat16()
    found = equal_inputs(layers_of(model), model, torch.randn(2, 3, 6).bfloat16())
    assert found == {"q": "q", "k": "q", "o": "o", "idle": "idle"}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_statistics_see_the_rows_of_every_batch():
    model, batches = Block(), [torch.randn(2, 3, 6), torch.randn(1, 5, 6)]
    found = input_statistics(
        {"q": model.q}, model, batches, lambda name: Total(), lambda batch: lambda x: x[:, 1:]
    )
    expected = sum(float(batch[:, 1:].double().sum()) for batch in batches)
    assert abs(found["q"].sum - expected) < 1e-4
    assert not model.q._forward_pre_hooks


def test_layers_whose_inputs_do_not_fit_are_named():
    class Picky:
        def add(self, x: Tensor) -> None:
            raise ValueError("batches: expected others")

    model = Block()
    with pytest.raises(ValueError, match="k: batches: expected others"):
        input_statistics(
            {"k": model.k}, model, [torch.randn(2, 6)], lambda _: Picky(), lambda _: lambda x: x
        )


def test_gradients_are_those_of_the_weights(monkeypatch):
    summed, add = set(), Tensor.addmm_

    def noted(self: Tensor, *matrices: Tensor) -> Tensor:
        summed.add(self.data_ptr())
        return add(self, *matrices)

    monkeypatch.setattr(Tensor, "addmm_", noted)
    model, batches = Block(), [torch.randn(2, 3, 6), torch.randn(4, 6)]
    for batch in batches:
        (model(batch).square().mean() / len(batches)).backward()
    expected = {name: m.weight.grad for name, m in layers_of(model).items() if name != "idle"}
    model.zero_grad()
    model.requires_grad_(False)
    with torch.no_grad():
        found = weight_gradients(layers_of(model), lambda b: model(b).square().mean(), batches)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
        assert gradient.data_ptr() in summed  # no copy
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_groups_fit_into_the_memory():
    sizes = {"a": 3, "b": 4, "c": 20, "d": 1, "e": 1}
    assert list(groups(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(groups(sizes, 100)) == [list(sizes)]
    assert list(groups({}, 7)) == []
