"""LoRA on fused experts: what is left to PEFT and why, and what users do with a patched model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from expert_models import (
    LAYOUTS,
    REFUSED_ALONE,
    E,
    K,
    expert_net,
    fallbacks,
    fill_lora_B,
    inputs,
    outputs_and_gradients,
    patched_copy,
    served,
    tiny_moe,
    wrapper_of,
    wrappers_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import peftkern

pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16 = torch.float32, torch.bfloat16
every_layout = pytest.mark.parametrize("folder", LAYOUTS)


def assert_falls_back(model: nn.Module, reason: str, twin: nn.Module | None = None) -> None:
    """PEFT's own result and gradients, bit for bit, and the reason counted."""
    twin = copy.deepcopy(model) if twin is None else twin
    peftkern.patch(twin)
    given = inputs()
    expected = outputs_and_gradients(model, *given)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, *given)
    assert fallbacks() == {reason: 1} and served() == 0
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def experts_of(model: nn.Module) -> nn.Module:
    return wrapper_of(model).get_base_layer()


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 0.5)


def end_in_a_norm(model: nn.Module) -> None:
    experts_of(model).has_post_expert_norm = True
    experts_of(model).post_expert_norm = nn.RMSNorm(K).requires_grad_(False)


def on_all(change):
    return lambda model: [change(wrapper) for wrapper in wrappers_of(model)]


STATES = {  # the reason; what is done to the model
    "adapters are disabled": on_all(lambda wrapper: wrapper.enable_adapters(False)),
    "adapters are merged": on_all(lambda wrapper: wrapper.merge()),
    "no active adapter": on_all(lambda wrapper: vars(wrapper).update(_active_adapter=["none"])),
    "hooks on experts": lambda model: hook(experts_of(model)),
    "hooks on base_layer": lambda model: hook(wrapper_of(model).base_layer),
    "hooks on act_fn": lambda model: hook(experts_of(model).act_fn),
    "base weight is trained": lambda model: experts_of(model).down_proj.requires_grad_(True),
    "the experts end in a norm": end_in_a_norm,
}


@pytest.mark.parametrize("reason", STATES)
def test_states_that_are_left_to_peft(reason):
    model = expert_net()
    STATES[reason](model)
    assert_falls_back(model, reason)
    report = peftkern.patch(model)
    assert report.falling_back == {"base_model.model.experts": reason}
    assert reason in str(report)


def test_experts_of_earlier_transformers_5():
    """Which had no flag of a norm yet, and before 5.3 none of a gate."""
    model = expert_net()
    experts = experts_of(model)
    del experts.has_post_expert_norm
    assert peftkern.patch(model).falling_back == {}
    peftkern.unpatch(model)
    del experts.has_gate
    reason = f"base_layer is {type(experts).__name__}"
    assert peftkern.patch(model).falling_back == {"base_model.model.experts": reason}


@pytest.mark.parametrize("reason", ["adapters are disabled", "adapters are merged"])
def test_one_wrapper_alone_is_switched_off(reason):
    model = expert_net()
    inner = wrapper_of(model).base_layer
    inner.merge() if "merged" in reason else inner.enable_adapters(False)
    assert_falls_back(model, reason)


@pytest.mark.parametrize("folder", REFUSED_ALONE)
def test_experts_that_are_left_to_peft(folder):
    assert_falls_back(expert_net(folder), REFUSED_ALONE[folder][1])


def test_parametrized_experts():
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    models = expert_net(), expert_net()  # one with parametrizations cannot be copied
    for model in models:
        parametrize.register_parametrization(experts_of(model), "down_proj", Half())
    assert_falls_back(models[0], "base_layer is parametrized", models[1])


@pytest.mark.parametrize("kind", [dict, list])
def test_modules_that_take_no_tensor(kind):
    """`target_parameters` may be in any module, also in one that takes several tensors at once."""

    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, K, K))

        def forward(self, given):
            return torch.stack(list(given.values() if kind is dict else given)) @ self.weight

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.taking, self.out = Taking(), nn.Linear(K, 4)

        def forward(self, x):
            return self.out(self.taking(kind(enumerate(x)) if kind is dict else kind(x)))

    config = LoraConfig(r=4, target_modules=[], target_parameters=["taking.weight"])
    model = get_peft_model(Net(), config)
    fill_lora_B(model)
    twin, x = patched_copy(model), torch.randn(E, 5, K)
    peftkern.reset_stats()
    for net in (model, twin):
        net(x).square().sum().backward()
    expected, got = ({n: p.grad for n, p in net.named_parameters()} for net in (model, twin))
    trained = [name for name, grad in expected.items() if grad is not None]
    assert len(trained) == 2 and all(torch.equal(got[name], expected[name]) for name in trained)
    assert fallbacks() == {f"input is {kind.__name__}": 1}


def test_global_hooks():
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: None):
        assert_falls_back(expert_net(), "global module hooks")


def test_one_expert_and_two_dimensions():
    """PEFT keeps the factors of one expert as those of a linear layer."""
    assert_falls_back(expert_net(num_experts=1), "there is one expert")
    model = expert_net("gpt_oss", target_parameters=["experts.down_proj_bias"])
    assert_falls_back(model, "down_proj_bias has 2 dimensions")


def test_implementations_of_others(monkeypatch):
    def scale(self, hidden, index, weights):
        return hidden * self.down_proj.sum() * self.gate_up_proj.sum() * weights.sum()

    others = {"sonicmoe": scale}
    monkeypatch.setattr(ALL_EXPERTS_FUNCTIONS, "_local_mapping", others)
    model = expert_net(implementation="sonicmoe")
    assert_falls_back(model, "experts_implementation is sonicmoe")
    experts_of(model).config._experts_implementation = "grouped_mm"  # asked at every call
    twin = patched_copy(model)
    peftkern.reset_stats()
    twin(*inputs())
    assert served() == 1


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_products_in_another_dtype(implementation):
    model = expert_net(implementation=implementation)
    with torch.autocast("cpu", BF16):
        reason = f"{implementation} computes in torch.bfloat16, experts are torch.float32"
        assert_falls_back(model, reason)
    twin = patched_copy(expert_net(dtype=BF16, implementation=implementation))
    peftkern.reset_stats()
    with torch.autocast("cpu", BF16):
        twin(*inputs())
    assert served() == 1
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):  # as without a patch
        twin(*inputs())
    assert fallbacks() == {f"{implementation} computes in {F32}, experts are {BF16}": 1}


def test_dtypes_of_no_kernel():
    twin = patched_copy(expert_net(implementation="eager").double())
    x, index, weights = inputs(dtype=torch.float64)
    peftkern.reset_stats()
    twin(x, index, weights)
    assert list(fallbacks()) == ["experts are torch.float64 and torch.float64"]


def test_arguments_that_peft_refuses():
    twin = patched_copy(expert_net(implementation="eager")).eval()
    with pytest.raises(ValueError, match="does not support mixed"):
        wrapper_of(twin)(*inputs(), adapter_names=["default"])
    with pytest.raises(TypeError, match="positional argument"):
        wrapper_of(twin)(inputs()[0])
    x, index, weights = inputs()
    peftkern.reset_stats()
    with pytest.raises(RuntimeError, match="non-negative"):
        twin(x, index - 5, weights)
    assert fallbacks() == {"top_k_index: expected ids from 0 on": 1}
    with pytest.raises(ValueError, match="lora_dropout"):
        expert_net(lora_dropout=0.1)


@every_layout
def test_patch_changes_forward_alone(folder):
    model = expert_net(folder)
    said, keys = repr(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    before = [dict(wrapper.__dict__) for wrapper in wrappers_of(model)]
    report = peftkern.patch(model)
    assert report.patched == ["base_model.model.experts"] and report.skipped == {}
    assert str(report).startswith("1 patched (lora.ParamWrapper 1), 0 skipped; on cpu:")
    assert peftkern.patch(model) == report
    assert repr(model) == said and list(model.state_dict()) == keys
    assert [wrapper.__dict__ for wrapper in wrappers_of(model)] == before
    assert type(pickle.loads(pickle.dumps(wrapper_of(model)))) is type(wrapper_of(model))
    assert peftkern.unpatch(model) == ["base_model.model.experts"]
    assert [type(module) for module in model.modules()] == kinds


def test_patch_of_an_inner_wrapper_alone():
    """It leaves calls from the outer one, PEFT's, to PEFT."""
    model = expert_net()
    twin = copy.deepcopy(model)
    peftkern.patch(wrapper_of(twin).base_layer)
    peftkern.reset_stats()
    assert torch.equal(twin(*inputs()), model(*inputs()))
    assert fallbacks() == {"base_layer is parametrized": 1}
    peftkern.patch(twin)
    peftkern.reset_stats()
    torch.testing.assert_close(twin(*inputs()), model(*inputs()))
    assert served() == 1 and fallbacks() == {}


@every_layout
def test_disable_merge_save_and_load(folder, tmp_path: Path):
    model = expert_net(folder)
    twin, given = patched_copy(model), inputs()
    expected = model(*given)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(twin(*given), model(*given))
    for net in (model, twin):
        net.merge_adapter()
    assert torch.equal(twin(*given), model(*given))
    for net in (model, twin):
        net.unmerge_adapter()
    ours, theirs = twin.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    twin.save_pretrained(tmp_path)
    base = expert_net(folder).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    peftkern.patch(loaded)
    peftkern.reset_stats()
    torch.testing.assert_close(loaded(*given), expected)
    assert served() == 1
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(*given), expected)
    assert type(merged.experts).__name__.endswith("Experts")


def test_adapters_come_and_go():
    model = expert_net()
    peftkern.patch(model)
    names = model.peft_config["default"].target_parameters
    model.add_adapter("other", LoraConfig(r=2, target_modules=[], target_parameters=names))
    fill_lora_B(model)
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        peftkern.reset_stats()
        outputs[name] = model(*inputs())
        assert served() == 1
    assert not torch.allclose(outputs["default"], outputs["other"])
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(*inputs()), outputs["default"])


def test_all_linear_trains_the_router_and_doubles_a_rank():
    """As PEFT reads it; a router's weight, of two dimensions, stays PEFT's."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_moe("Qwen3Moe"), LoraConfig(r=3, target_modules="all-linear"))
    fill_lora_B(model)
    mlp = model.base_model.model.model.layers[0].mlp
    ranks = {w.parameter_name: w.r["default"] for w in (mlp.experts, mlp.experts.base_layer)}
    assert ranks == {"down_proj": 3, "gate_up_proj": 6}
    assert type(mlp.gate) is lora.ParamWrapper
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin)
    assert set(report.falling_back.values()) == {"weight has 2 dimensions"}
    ids = torch.randint(3, 60, (2, 9))
    expected = outputs_and_gradients(model, ids)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, ids)
    assert served() == 2 and fallbacks() == {"weight has 2 dimensions": 2}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        atol = 5e-6 * value.abs().max().item()  # gradients are as large as 80
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=atol)


def test_training_compiles_into_one_graph():
    """Where PEFT's parametrizations break it."""
    model = patched_copy(expert_net())
    given = inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(model, *given)
    got = outputs_and_gradients(compiled, *given)
    for value, found in zip(expected.values(), got.values(), strict=True):
        torch.testing.assert_close(found, value)
