"""Everything our ops do not express runs PEFT's own forward, bit for bit, with a counted reason."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft_models import (
    K,
    N,
    assert_falls_back,
    fallbacks,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    patched_copy,
    served_by_us,
)
from torch import nn
from torch.nn.utils import parametrize

import peftkern
from peftkern.backends import dispatch
from peftkern.backends.cpu import crossovers

MAKERS = [make_linear, make_linear4bit]
ROLES = ["base_layer", "lora_A", "lora_B", "lora_dropout"]


def role(model: nn.Module, name: str) -> nn.Module:
    layer = layer_of(model)
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


def test_small_dense_product(monkeypatch):
    """Below the measured size a dense layer is PEFT's, unless a back end is asked for by name."""
    monkeypatch.setattr(crossovers, "crossover", crossovers.COUNTED.get)
    model = lora_net(make_linear())
    assert_falls_back(model, "small dense product: PEFT's own operations are as fast")
    peftkern.patch(model)
    rows = crossovers.COUNTED["dense"] // (K + N)
    assert [told(model, torch.randn(rows + more, K))[0] for more in (0, 1)] == [0, 1]
    with peftkern.use_backend("cpu"):
        assert told(model, torch.randn(3, K))[0] == 1
    for forced, ours in (("cpu", 1), ("", 0)):  # whenever it is set, between two calls
        monkeypatch.setenv("PEFTKERN_BACKEND", forced)
        assert told(model, torch.randn(3, K))[0] == ours
    monkeypatch.delenv("PEFTKERN_BACKEND")
    assert told(model, torch.randn(3, K))[0] == 0


@pytest.mark.parametrize("make", MAKERS)
def test_shape_that_peft_was_measured_faster_for(make, monkeypatch):
    """What `make tune` records for a GPU; the layer asks with its own sizes."""
    model = lora_net(make())
    asked = []
    monkeypatch.setattr(dispatch, "is_slower", lambda *call: bool(asked.append(call)) or True)
    assert_falls_back(model, "PEFT's own operations measured faster for this shape")
    op, x, shape, r, training = asked[0]
    assert training is layer_of(model).training
    assert op == ("nf4_lora_linear" if make is make_linear4bit else "lora_linear")
    assert shape == (N, K) and x.shape[-1] == K
    assert r == layer_of(model).r["default"]


def told(call, *args: object, **kwargs: object) -> tuple[int, dict[str, int]]:
    """How many calls of ours one call makes, and what falls back in it."""
    peftkern.reset_stats()
    call(*args, **kwargs)
    return served_by_us(), fallbacks()


class Mine(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def hook_the_magnitude(layer: nn.Module) -> None:
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *args: None)


DORA, IN_BF16 = {"use_dora": True}, {"adapter_dtype": torch.bfloat16}
STATES = [  # the reason; what the adapter is over and its config; what is done to the layer
    # Over a dense base, for which torch has an operation; of others see test_states.py.
    ("adapters are disabled", make_linear, {}, lambda layer: layer.enable_adapters(False)),
    ("adapters are merged", make_linear, {}, lambda layer: layer.merge()),
    ("no active adapter", make_linear, {}, lambda layer: vars(layer).update(NO_ACTIVE)),
    ("base_layer is Mine", lambda: Mine(K, N).requires_grad_(False), {}, None),
    ("DoRA over Conv1D", make_conv1d, {**DORA, "fan_in_fan_out": True}, None),
    ("hooks on lora_magnitude_vector", make_linear, DORA, hook_the_magnitude),
    ("hooks on lora_magnitude_vector", make_linear4bit, DORA, hook_the_magnitude),
    ("adapter is torch.bfloat16, its input torch.float32", make_linear, IN_BF16, None),
]
NO_ACTIVE = {"_active_adapter": ["elsewhere"]}


@pytest.mark.parametrize(("reason", "make", "config", "change"), STATES)
def test_states_that_are_left_to_peft(reason, make, config, change):
    model = lora_net(make(), **config)
    if change is not None:
        change(layer_of(model))
    assert_falls_back(model, reason)


@pytest.mark.parametrize("make", MAKERS)
def test_alora(make):
    model = lora_net(make(), alora_invocation_tokens=[1])
    reason = "lora_variant ALoraLinearVariant"
    twin = patched_copy(model)
    x = torch.randn(2, 5, K)
    for kwargs in ({}, {"alora_offsets": [2, None]}):
        peftkern.reset_stats()
        expected = layer_of(model)(x, **kwargs)
        torch.testing.assert_close(layer_of(twin)(x, **kwargs), expected)
        assert fallbacks() == {"extra arguments: alora_offsets" if kwargs else reason: 1}


@pytest.mark.parametrize("make", MAKERS)
def test_adapter_names(make):
    model = lora_net(make()).eval()
    twin = patched_copy(model)
    names = ["default", "__base__", "default"]
    x = torch.randn(3, K, requires_grad=True)  # keeps bitsandbytes from repacking its weight
    peftkern.reset_stats()
    got = layer_of(twin)(x, adapter_names=names)
    torch.testing.assert_close(got, layer_of(model)(x, adapter_names=names))
    assert fallbacks() == {"extra arguments: adapter_names": 1}
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer_of(twin)(x, adapter_names=names[:2])


def test_arguments_that_are_none_are_no_arguments():
    model = patched_copy(lora_net(make_linear()))
    nothing = {"adapter_names": None, "alora_offsets": None}
    assert told(layer_of(model), torch.randn(2, K), **nothing) == (1, {})


@pytest.mark.parametrize("make", MAKERS)
def test_unknown_arguments_fail_as_in_peft(make):
    model = lora_net(make())
    peftkern.patch(model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_mask'"):
        layer_of(model)(torch.randn(2, K), attention_mask=torch.ones(2))


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, output: output * 0.5),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,)),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(lambda m, go: (go[0] * 0.5,)),
}


@pytest.mark.parametrize("make", [*MAKERS, make_conv1d])
@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_submodules(make, name, kind):
    model = lora_net(make(), lora_dropout=0.2, fan_in_fan_out=make is make_conv1d)
    HOOKS[kind](role(model, name))
    assert_falls_back(model, f"hooks on {name}")


@pytest.mark.parametrize("name", ROLES)
def test_hooks_come_and_go(name):
    model = lora_net(make_linear(), lora_dropout=0.2)
    peftkern.patch(model)
    x = torch.randn(2, K)
    handle = HOOKS["forward"](role(model, name))
    assert told(model, x)[0] == 0
    handle.remove()
    assert told(model, x)[0] == 1


def test_global_hooks():
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m)):
        assert_falls_back(lora_net(make_linear()), "global module hooks")
    assert sum(type(m) is nn.Linear for m in seen) == 2 * 3  # base, A, B of both models


@pytest.mark.parametrize("name", ["base_layer", "lora_A", "lora_B"])
def test_parametrizations(name):
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    model = lora_net(make_linear())
    parametrize.register_parametrization(role(model, name), "weight", Half())
    twin = lora_net(make_linear())
    parametrize.register_parametrization(role(twin, name), "weight", Half())
    peftkern.patch(twin)  # a parametrized module cannot be deep-copied
    x = torch.randn(3, K)
    peftkern.reset_stats()
    assert torch.equal(twin(x), model(x))
    assert fallbacks() == {f"{name} is ParametrizedLinear": 1}


def test_other_dropout():
    model = lora_net(make_linear(), lora_dropout=0.2)
    for dropout in (nn.Dropout(0.2, inplace=True), nn.Dropout(1.0), nn.AlphaDropout(0.2)):
        layer_of(model).lora_dropout["default"] = dropout
        twin = patched_copy(model)
        x = torch.randn(3, K)
        peftkern.reset_stats()
        torch.manual_seed(0)
        expected = model(x.clone())
        torch.manual_seed(0)
        assert torch.equal(twin(x.clone()), expected)
        assert fallbacks() == {f"lora_dropout is {dropout}": 1}


def test_trained_base_weight():
    model = lora_net(make_linear())
    layer_of(model).base_layer.weight.requires_grad_(True)
    assert_falls_back(model, "base weight is trained")
    twin = patched_copy(model)
    twin(torch.randn(2, K)).sum().backward()
    assert layer_of(twin).base_layer.weight.grad is not None
    with torch.no_grad():
        assert told(twin, torch.randn(2, K))[0] == 1


def test_no_active_adapter_on_a_4bit_layer_is_served():
    model = lora_net(make_linear4bit())
    vars(layer_of(model)).update(NO_ACTIVE)
    twin = patched_copy(model)
    x = torch.randn(2, K)
    peftkern.reset_stats()
    torch.testing.assert_close(twin(x), model(x))
    assert served_by_us() == 1 and fallbacks() == {}


def test_dtypes_that_need_pefts_casts():
    mixed = lora_net(make_linear())
    layer_of(mixed).lora_B["default"].to(torch.float64)
    peftkern.patch(mixed)
    peftkern.reset_stats()
    with pytest.raises(RuntimeError, match="dtype"):
        mixed(torch.randn(2, K))
    assert fallbacks() == {"lora_A is torch.float32, lora_B is torch.float64": 1}
    with pytest.raises(RuntimeError, match="dtype"):  # PEFT's own error for a wrong input
        mixed(torch.randn(2, K).bfloat16())
    double = patched_copy(lora_net(make_linear(torch.float64), adapter_dtype=torch.float64))
    why = {"input is torch.float64, base weight is torch.float64": 1}
    assert told(double, torch.randn(2, K).double()) == (0, why)


def test_functorch_transforms():
    model = lora_net(make_linear())
    peftkern.patch(model)
    x = torch.randn(3, K)
    peftkern.reset_stats()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    assert jacobian.shape == (3, N, K)
    base, A, B = (role(model, name).weight for name in ("base_layer", "lora_A", "lora_B"))
    weight = base + 1.5 * B @ A
    torch.testing.assert_close(jacobian, weight.expand(3, N, K))
    assert set(fallbacks()) == {"torch.func transform"}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(tangent, weight.sum(1).expand(3, N), rtol=1e-5, atol=1e-5)


def test_reason_is_looked_at_again_at_every_call():
    model = lora_net(make_linear())
    config = LoraConfig(target_modules=["proj"], alora_invocation_tokens=[1])
    model.add_adapter("alora", config)
    peftkern.patch(model)
    x = torch.randn(2, K)
    for name, served in (("default", 1), ("alora", 0), ("default", 1)):
        model.set_adapter(name)
        assert told(model, x)[0] == served
    with model.disable_adapter():
        assert told(model, x) == (0, {"adapters are disabled": 1})
    assert told(model, x)[0] == 1
