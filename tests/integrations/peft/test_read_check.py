"""A registered layer is held against what its `read` gives, when it is patched."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from own_layers import LoRALinear, Over, layer, read
from peft_models import K, N, fallbacks, make_linear, make_linear4bit, served_by_us
from torch import Tensor, nn

import peftkern

pytestmark = pytest.mark.usefixtures("own_layers_registered")


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_a_check_leaves_nothing_behind(make):
    module = Over(make(), K, N, p=0.2).train()
    module.base.eval()
    state = {name: dict(vars(part)) for name, part in module.named_modules()}
    version = [p._version for p in module.parameters()]
    seed = torch.get_rng_state()
    assert peftkern.patch(module, dry_run=True).patched == [""]
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == state
    assert [p._version for p in module.parameters()] == version
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(p.grad is None for p in module.parameters())


def replaced(**parts: object) -> Callable[[LoRALinear], object]:
    return lambda layer: read(layer)._replace(**parts)


def dispatch_error(layer: LoRALinear) -> peftkern.LoRAParts:
    raise KeyError("lora_A")


other = torch.randn(4, K), torch.randn(N, 4)
NONSENSE = {
    "read gives a NoneType, expected LoRAParts": lambda layer: None,
    "read gives a tuple, expected LoRAParts": lambda layer: tuple(read(layer)),
    "read raised KeyError: 'lora_A'": dispatch_error,
    r"read gives a float as base": replaced(base=1.0),
    r"read gives \[96\] as base, expected a weight \[N, K\]": replaced(base=torch.ones(96)),
    "read gives a int as bias": replaced(bias=0),
    "read gives a str as dropout": replaced(dropout="0.1"),
    "read gives a str as scaling": replaced(scaling="2"),
    r"read gives \[64\] as lora_A, expected a tensor of two": replaced(lora_A=torch.ones(K)),
    "read gives a Linear as lora_B": lambda layer: read(layer)._replace(lora_B=layer.lora_b),
    "read gives a NoneType as lora_A": replaced(lora_A=None),
    "its forward cannot be compared with its parts: RuntimeError": replaced(lora_A=other[1]),
    "forward differs from the parts that read gives by 100%": replaced(bias=None),
    "forward differs from the parts": replaced(scaling=7.0),
    "forward differs from the parts that": replaced(lora_B=other[1]),
    "read gives a dropout of 0.5, forward draws no random": replaced(dropout=0.5),
}


@pytest.mark.parametrize("reason", NONSENSE)
def test_a_layer_whose_read_returns_nonsense_is_refused(reason):
    one = layer(use_bias=True)
    peftkern.register_layer(LoRALinear, NONSENSE[reason])
    expected = copy.deepcopy(one)
    report = peftkern.patch(one)
    assert report.patched == [] and type(one) is LoRALinear
    (said,) = report.skipped.values()
    assert re.match(reason, said)
    with pytest.raises(ValueError, match="strict: 1 layers"):
        peftkern.patch(one, strict=True)
    x = torch.randn(2, K)
    assert torch.equal(one(x), expected(x))


@pytest.mark.parametrize("wrong", ["scaling", "lora_A"])
def test_what_a_zero_lora_b_hides_shows_in_a_gradient(wrong):
    value = 3.0 if wrong == "scaling" else nn.Parameter(other[0])
    peftkern.register_layer(LoRALinear, replaced(**{wrong: value}))
    (said,) = peftkern.patch(layer(filled=False)).skipped.values()
    assert said.startswith("the gradient of lora_")


def test_a_forgotten_dropout_is_found():
    peftkern.register_layer(LoRALinear, replaced(dropout=0.0))
    (said,) = peftkern.patch(layer(dropout=0.1).eval()).skipped.values()
    assert said == "forward draws random numbers in training, read gives no dropout"


def test_another_dtype_of_the_output_is_found():
    class Wide(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    peftkern.register_layer(Wide, read)
    (said,) = peftkern.patch(Wide(K, N)).skipped.values()
    assert said.startswith("forward gives torch.float64 [1, 3, 96], expected torch.float32")


def test_a_read_that_fails_later_costs_nothing():
    fails = []

    def failing(layer: LoRALinear) -> peftkern.LoRAParts | str:
        if fails:
            raise RuntimeError("no such layer\nhere")
        return read(layer)

    peftkern.register_layer(LoRALinear, failing)
    module, twin = layer(), layer()
    assert peftkern.patch(twin).patched == [""]
    fails.append(True)
    x = torch.randn(2, K)
    peftkern.reset_stats()
    assert torch.equal(twin(x), module(x))
    assert fallbacks() == {"read raised RuntimeError: no such layer": 1}


@pytest.mark.parametrize("right", [True, False])
def test_a_layer_without_an_adapter_is_checked_when_it_has_one(right):
    peftkern.register_layer(LoRALinear, read if right else wrong_when_enabled)
    one = layer()
    expected = copy.deepcopy(one)
    one.disabled = True
    assert peftkern.patch(one).falling_back == {"": "adapters are disabled"}
    one.disabled = False
    x = torch.randn(2, K)
    for _ in range(2):
        peftkern.reset_stats()
        torch.testing.assert_close(one(x), expected(x))
        assert served_by_us() == right
        assert right or "differs from the parts" in next(iter(fallbacks()))
    peftkern.unpatch(one)
    assert vars(one).keys() == vars(expected).keys()


def wrong_when_enabled(layer: LoRALinear) -> peftkern.LoRAParts | str:
    found = read(layer)
    return found if isinstance(found, str) else found._replace(scaling=9.0)
