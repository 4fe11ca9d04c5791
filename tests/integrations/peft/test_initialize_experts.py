"""`peftkern.initialize_` over fused experts: what it did to each, and what PEFT makes of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from expert_models import (
    VOCABULARY,
    E,
    K,
    expert_net,
    expert_parameters,
    fill_lora_B,
    inputs,
    save_gpt_oss,
    tiny_moe,
)
from expert_rows import routed_rows
from peft import LoraConfig, PeftModel
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.layer import ParamWrapper
from peft_models import layer_of, lora_net
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peftkern
from peftkern.layers import NF4Linear
from peftkern.layers.expert_stack import ExpertStack
from peftkern.layers.mxfp4_stack import MXFP4Stack

IDS = torch.arange(24).view(2, 12)
FAMILIES = ("Qwen3Moe", "Mixtral", "GptOss")  # the last keeps its weights as [E, in, out]
FROM_WEIGHTS = ("pissa", "olora", "qpissa", "loftq")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def settings(model: nn.Module, **config: Any) -> LoraConfig:
    own = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    own |= {"target_parameters": expert_parameters(model)}
    return LoraConfig(**{**own, **config})


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """By the name of their parameter in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{path}.{module.parameter_name}"] = module
    return found


def whole(wrapper: ParamWrapper) -> Tensor:
    """The weights that the experts multiply by, as the model has them."""
    weight = wrapper.get_param().detach()
    weight = weight.dequantize() if isinstance(weight, ExpertStack) else weight
    return weight.float() + wrapper.get_delta_weight("default").detach().float()


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family, method):
    base = tiny_moe(family)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    before = logits(base)
    report = peftkern.initialize_(base, method, settings(base))
    assert relative(logits(report.model), before) <= 1e-4
    found = wrappers(report.model)
    assert {layer.name for layer in report.layers} - found.keys() == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    }
    for name, wrapper in found.items():
        assert relative(whole(wrapper), weights[name]) <= 1e-6
        assert relative(wrapper.get_param().detach(), weights[name]) > 0.1
    assert not any(p.requires_grad for p in base.parameters() if p.dim() == 3)
    peftkern.patch(report.model)
    assert relative(logits(report.model), before) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_has_a_line_for_the_experts_of_a_parameter(family):
    base = tiny_moe(family).bfloat16()
    shapes = {name: tuple(base.get_parameter(name).shape) for name in expert_parameters(base)}
    report = peftkern.initialize_(base, "pissa", settings(base, target_modules=[]))
    transposed = family == "GptOss"
    for layer in report.layers:
        _, m, n = shapes[layer.name]
        assert layer.shape == ((n, m) if transposed else (m, n)) and layer.matrices == E
        assert 0 < layer.energy < 1 and 0 < layer.error < 2**-8 and layer.certificate < 1e-3
    record = json.loads(json.dumps(report.as_dict()))
    assert record["layers"][0]["matrices"] == E


def linear_route(linear: nn.Module, method: str, given: Tensor | None = None) -> tuple[Tensor, ...]:
    """Update and base of a linear layer that the method has started."""
    model = lora_net(linear)
    peftkern.initialize_(model, method, weights=None if given is None else {"proj.weight": given})
    layer = layer_of(model)
    base = layer.get_base_layer()
    base = base.dequantize() if isinstance(base, NF4Linear) else base.weight
    return layer.get_delta_weight("default"), base


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


@pytest.mark.parametrize("method", FROM_WEIGHTS)
@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss"])
def test_an_expert_starts_as_a_linear_layer_of_its_own(folder, method):
    model = expert_net(folder, lora_alpha=6)
    before = {name: w.get_param().detach().clone() for name, w in wrappers(model).items()}
    peftkern.initialize_(model, method)
    for name, wrapper in wrappers(model).items():
        update, now = wrapper.get_delta_weight("default"), wrapper.get_param()
        for e in (0, E - 1):
            sides = [t[e].T if folder == "gpt_oss" else t[e] for t in (before[name], update, now)]
            expected = linear_route(linear_of(sides[0]), method)
            for got, other in zip(sides[1:], expected, strict=True):
                assert relative(got, other) <= 1e-4


@pytest.mark.parametrize("method", ["pissa", "qpissa", "loftq"])
@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss"])
def test_experts_in_nf4_are_quantized_anew_as_they_are_stored(folder, method):
    """Transposes of each other have transposed triplets, so the layout makes no difference."""
    given = {name: w.get_param().detach() for name, w in wrappers(expert_net(folder)).items()}
    model = expert_net(folder, quantized=True, lora_alpha=6)
    report = peftkern.initialize_(model, method, weights=given if method == "loftq" else None)
    assert report.error < 0.13
    for name, wrapper in wrappers(model).items():
        stack = wrapper.get_param()
        assert not stack.requires_grad
        for e in (0, E - 1):
            linear = NF4Linear.from_linear(linear_of(given[name][e]), double_quant=False)
            weight = given[name][e] if method == "loftq" else None
            update, base = linear_route(linear, method, weight)
            assert relative(wrapper.get_delta_weight("default")[e], update) <= 1e-4
            assert (stack[e] == base).float().mean() > 0.99  # one between two codes may be either


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss"])
def test_olora_of_experts_in_nf4_decomposes_what_they_multiply_by(folder):
    model = expert_net(folder, quantized=True)
    before = {name: w.get_param().detach().dequantize() for name, w in wrappers(model).items()}
    assert peftkern.initialize_(model, "olora").error < 0.13
    for name, wrapper in wrappers(model).items():
        weight = before[name].mT if folder == "gpt_oss" else before[name]
        Q, _ = torch.linalg.qr(weight[..., :4])
        lora_B = wrapper.lora_B["default"].weight.view(-1, 4, E).permute(2, 0, 1)
        torch.testing.assert_close(lora_B, Q, rtol=0, atol=1e-5)
        lora_A = wrapper.lora_A["default"].weight.view(E, 4, -1)
        torch.testing.assert_close(lora_A, Q.mT @ weight, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Folders: in MXFP4, and in bfloat16."""
    return save_gpt_oss(tmp_path_factory.mktemp("models") / "gpt-oss")


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_gpt_oss_as_it_is_shipped(gpt_oss, method):
    from peftkern.integrations.transformers import MXFP4ExpertsConfig

    config = MXFP4ExpertsConfig.of_checkpoint(gpt_oss[0])
    base = AutoModelForCausalLM.from_pretrained(gpt_oss[0], config=config, dtype=torch.float32)
    names = expert_parameters(base)
    plain = {name: base.get_parameter(name).dequantize() for name in names}
    weights, given = plain, None
    if method == "loftq":
        dense = AutoModelForCausalLM.from_pretrained(gpt_oss[1], dtype=torch.float32)
        weights = given = {name: dense.get_parameter(name).detach() for name in names}
    report = peftkern.initialize_(base, method, settings(base, target_modules=[]), weights=given)
    for (name, wrapper), layer in zip(wrappers(report.model).items(), report.layers, strict=True):
        assert isinstance(wrapper.get_param(), MXFP4Stack) and layer.name == name
        errors = [relative(*pair) for pair in zip(whole(wrapper), weights[name], strict=True)]
        assert layer.error == pytest.approx(max(errors), rel=0.02) and layer.error < 0.15
        if method == "loftq":
            assert layer.error < relative(plain[name], weights[name])
    assert logits(report.model).isfinite().all()


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_loads_on_the_base_saved_beside_it(tmp_path, quantized):
    base = tiny_moe()
    if quantized:
        peftkern.quantize_(base)
    model = peftkern.initialize_(base, "pissa", settings(base)).model
    with torch.no_grad():  # as if it had been trained
        for wrapper in wrappers(model).values():
            wrapper.lora_B["default"].weight.add_(0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert relative(logits(loaded), expected) <= 1e-5


def test_few_experts_at_a_time_start_as_all_at_once(monkeypatch):
    model = expert_net(quantized=True)
    twin = copy.deepcopy(model)
    report = peftkern.initialize_(model, "qpissa")
    monkeypatch.setattr("peftkern.methods.initialization.from_weights.TOGETHER", 2 * K * K)
    again = peftkern.initialize_(twin, "qpissa")
    assert [layer.rank for layer in again.layers] == [layer.rank for layer in report.layers]
    for wrapper, other in zip(wrappers(model).values(), wrappers(twin).values(), strict=True):
        assert relative(whole(other), whole(wrapper)) <= 1e-5


def test_a_rank_for_all_experts():
    base = tiny_moe("GptOss").bfloat16()
    weights = {name: base.get_parameter(name).detach().clone() for name in expert_parameters(base)}
    config = settings(base, target_modules=[], use_rslora=True)
    report = peftkern.initialize_(base, "pissa", config, rank=9)
    assert {layer.rank for layer in report.layers} == {9}
    assert {layer.scaling for layer in report.layers} == {2.0}
    for name, wrapper in wrappers(report.model).items():
        assert relative(whole(wrapper), weights[name].float()) < 2**-7


def test_one_expert():
    """PEFT has another update for one, which is right where the weight is [1, out, in]."""
    model = expert_net(num_experts=1)
    before = {name: w.get_param().detach().clone() for name, w in wrappers(model).items()}
    peftkern.initialize_(model, "olora")
    for name, wrapper in wrappers(model).items():
        assert relative(whole(wrapper), before[name]) <= 1e-6
    with pytest.raises(ValueError, match="there is one expert, whose update PEFT does not"):
        peftkern.initialize_(expert_net("gpt_oss", num_experts=1), "olora")


def test_a_parameter_of_two_dimensions_is_one_matrix():
    """The weight of a router, and of a linear layer."""
    base = tiny_moe()
    config = settings(base, target_parameters=["mlp.gate.weight", "v_proj.weight"])
    before = logits(base)
    report = peftkern.initialize_(base, "pissa", config)
    names = {layer.name for layer in report.layers}
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.v_proj.weight"} <= names
    assert {layer.matrices for layer in report.layers} == {1}
    assert relative(logits(report.model), before) <= 1e-4


TOKENS = torch.randint(3, VOCABULARY, (2, 3, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS[0])
MASK[1, 15:] = MASK[2, 3:] = 0
TEXTS = [{"input_ids": tokens, "attention_mask": MASK} for tokens in TOKENS]
# PEFT takes Llama 4's weights [E, in, out] for [E, out, in]: lora_B is what reads there.
of_eva = pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Llama4Text", "JetMoe"])


def eva_settings(family: str, base: nn.Module, **config: Any) -> LoraConfig:
    return settings(base, target_modules=["kv_proj" if family == "JetMoe" else "q_proj"], **config)


def reading(wrapper: ParamWrapper, family: str) -> tuple[Tensor, Tensor]:
    """Of each expert what of the factors reads its inputs [E, r, n], and the other one."""
    A, B = (side["default"].weight.detach() for side in (wrapper.lora_A, wrapper.lora_B))
    factors = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 1, 0)
    return factors[::-1] if family == "Llama4Text" else factors


@of_eva
def test_eva_reads_the_directions_of_the_rows_of_each_expert(family):
    base = tiny_moe(family)
    before, rows, twin = logits(base), routed_rows(base, TEXTS), copy.deepcopy(base)
    report = peftkern.initialize_(base, "eva", eva_settings(family, base), batches=TEXTS)
    assert torch.equal(logits(report.model), before)
    found = {layer.name: layer for layer in report.layers}
    for name, wrapper in wrappers(report.model).items():
        layer, (reads, writes) = found[name], reading(wrapper, family)
        assert (layer.matrices, layer.rank) == (E, reads.shape[1]) and layer.scaling == 1.5
        assert layer.scaling == wrapper.scaling["default"]
        squares = torch.zeros(2, dtype=torch.float64)
        for x, mine, other in zip(rows[name], reads, writes, strict=True):
            k = min(len(x), layer.rank)
            assert not other[:k].any()
            torch.testing.assert_close(mine[:k] @ mine[:k].T, torch.eye(k), rtol=0, atol=1e-4)
            if not k:
                continue
            centered = x - x.mean(0)
            kept = (centered @ mine[:k].double().T).square().sum()
            assert kept >= 0.97 * torch.linalg.svdvals(centered)[:k].square().sum()
            squares += torch.stack([kept, centered.square().sum()])
        assert layer.energy == pytest.approx((squares[0] / squares[1]).item(), rel=0.02)
    options = {"min_rank": 0, "max_rank": 8, "batches": TEXTS}
    chosen = peftkern.suggest_ranks(twin, eva_settings(family, twin), "activations", **options)
    assert {name: found[name].rank if name in found else 0 for name in chosen.ranks} == chosen.ranks
    assert len(set(chosen.ranks.values())) > 1


@of_eva
@pytest.mark.parametrize("given", [None, (0, 3, 2, 0), (0, 0, 5, 4)], ids=str)
def test_an_adapter_of_eva_loads_on_the_base_that_it_left_alone(
    tmp_path, monkeypatch, family, given
):
    """With the ranks that it chose, or others, of which those of 0 leave no adapter."""
    base = tiny_moe(family)
    names = expert_parameters(base)
    if given is not None:
        ranks = dict(zip(names, given, strict=False))
        monkeypatch.setattr(
            "peftkern.integrations.peft.init_data.share_ranks",
            lambda explained, budget: {name: ranks.get(name, 2) for name in explained},
        )
    report = peftkern.initialize_(base, "eva", eva_settings(family, base), batches=TEXTS)
    ranks = {layer.name: layer.rank for layer in report.layers if layer.name in names}
    model = report.model
    assert {name: wrapper.r["default"] for name, wrapper in wrappers(model).items()} == ranks
    assert len(ranks) == len(names) - (given or ()).count(0) and len({*ranks.values()}) > 1
    with torch.no_grad():  # as if it had been trained
        for wrapper in wrappers(model).values():
            wrapper.lora_A["default"].weight.add_(0.01)
            wrapper.lora_B["default"].weight.add_(0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(family), tmp_path)
    assert {name: wrapper.r["default"] for name, wrapper in wrappers(loaded).items()} == ranks
    assert relative(logits(loaded), expected) <= 1e-5


def test_eva_of_experts_in_nf4_is_that_of_what_they_decode_to():
    packed, decoded = tiny_moe(), tiny_moe()
    peftkern.quantize_(packed, include=["experts"])
    with torch.no_grad():
        for name in expert_parameters(decoded):
            decoded.get_parameter(name).copy_(packed.get_parameter(name).dequantize())
    before = logits(packed)
    models = [
        peftkern.initialize_(base, "eva", settings(base), batches=TEXTS, statistics_bytes=1).model
        for base in (packed, decoded)
    ]
    assert torch.equal(logits(models[0]), before)
    for one, other in zip(*(wrappers(model).values() for model in models), strict=True):
        mine, there = (reading(wrapper, "Qwen3Moe")[0] for wrapper in (one, other))
        signs = (mine * there).sum(2, keepdim=True).sign()  # of a direction: the last bits' choice
        torch.testing.assert_close(mine * signs, there, rtol=0, atol=1e-3)


def test_eva_of_experts_that_few_rows_reach():
    """Their update starts at zero and is trained, in all of its ranks."""
    base = tiny_moe()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.gate.weight.zero_()  # which sends all tokens to the same two
    text = {"input_ids": TOKENS[0][:1, :3]}
    config = settings(base, target_modules=[], eva_config=EvaConfig(rho=1))
    with pytest.warns(
        UserWarning, match=r"eva: no batch runs through experts of model.*; and 1 more"
    ):
        report = peftkern.initialize_(base, "eva", config, batches=[text])
    for wrapper in wrappers(report.model).values():
        reads, writes = reading(wrapper, "Qwen3Moe")
        assert not writes.any() and (reads.norm(dim=2) > 0.1).all()


def test_eva_leaves_routers_alone(tmp_path):
    base = tiny_moe()
    config = LoraConfig(r=4, target_modules="all-linear")
    report = peftkern.initialize_(base, "eva", config, batches=TEXTS)
    why = "the inputs of a parameter are not seen, as those of a layer are"
    routers = {f"model.layers.{i}.mlp.gate.weight": why for i in range(2)}
    assert report.skipped.items() >= routers.items()
    fill_lora_B(report.model)
    expected = logits(report.model)
    report.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(), tmp_path)
    assert relative(logits(loaded), expected) <= 1e-5


def broken() -> PeftModel:
    model = expert_net()
    with torch.no_grad():
        wrappers(model)["experts.down_proj"].get_param()[3, 0, 0] = float("nan")
    return model


BATCHES = [torch.ones(2, K)]
REFUSED = [
    (expert_net, "corda", {"batches": BATCHES}, r"method: expected one of \('pissa', 'olora', "
     r"'qpissa', 'loftq', 'eva'\) for target_parameters \(experts\.\w+_proj\), got 'corda'"),
    (lambda: expert_net("step3p7"), "eva", {"batches": [inputs()]},
     "experts.down_proj: the inputs of a parameter are not seen, as those of a layer are"),
    (expert_net, "lora_ga", {"batches": BATCHES}, "method: expected one of"),
    (expert_net, "pissa", {"rank": 17}, r"experts.down_proj: rank: expected 1 to 16, the smaller"),
    (broken, "pissa", {}, r"experts.down_proj\[3\]: weight: expected finite values, got NaN or "),
    (lambda: expert_net(quantized=True), "loftq", {},
     "experts.down_proj: weights: expected what the base in 4 bits was quantized from"),
    (lambda: expert_net(quantized=True), "pissa",
     {"weights": {"experts.down_proj": torch.ones(E, 16, 32)}},
     r"experts.down_proj: weights: expected a tensor of shape \[6, 32, 16\], got"),
    (expert_net, "pissa", {"weights": {"experts.down_proj": torch.ones(E, 32, 16)}},
     "weights: expected those of layers in 4 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "method", "options", "complaint"), REFUSED)
def test_what_does_not_fit_is_named_and_changes_nothing(make, method, options, complaint):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=complaint) as caught:
        peftkern.initialize_(model, method, **options)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)
