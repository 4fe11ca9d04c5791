"""Frozen NF4 experts of transformers models: on kernels, with nothing decoded, when asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import VOCABULARY, tiny_moe
from peft import LoraConfig, get_peft_model
from processes import run_code
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftkern
from peftkern.integrations.transformers import serve_nf4_experts, stop_serving
from peftkern.layers.expert_stack import stacks_of
from peftkern.layers.nf4_stack import NF4Stack

FAMILIES = ["Qwen3Moe", "GptOss", "Mixtral"]
IDS = torch.arange(12).view(2, 6)


def quantized(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_moe(family).to(dtype)
    peftkern.quantize_(model, include=["experts"])
    return model


def step(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of what is embedded."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    (grad,) = torch.autograd.grad(logits.float().square().sum(), embedded)
    return logits, grad


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("weights were decoded")

    monkeypatch.setattr("peftkern.layers.expert_stack.dequantize", refuse)


@pytest.mark.parametrize("family", FAMILIES)
def test_served_experts_compute_the_same(family, request):
    model = quantized(family)
    wanted = step(model)
    before = model.get_experts_implementation()
    assert "peftkern" not in before.values()
    names = serve_nf4_experts(model)
    assert names == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    request.getfixturevalue("nothing_is_decoded")
    for found, reference in zip(step(model), wanted, strict=True):
        assert (found - reference).norm() <= 1e-5 * reference.norm()
    assert torch.equal(step(copy.deepcopy(model))[0], step(model)[0])
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 8)
    assert serve_nf4_experts(model) == names
    stop_serving(model)
    assert model.get_experts_implementation() == before


def test_16_bit_experts_take_inputs_of_32_as_grouped_mm_does():
    model = quantized("Mixtral", torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    experts.config._experts_implementation = "grouped_mm"
    wanted = experts(x, ids, weights)
    serve_nf4_experts(model)
    found = experts(x, ids, weights)
    assert found.dtype is wanted.dtype is torch.float32
    exact = copy.deepcopy(experts).float()(x, ids, weights)
    assert (found - exact).norm() <= 1.5 * (wanted - exact).norm() + 1e-3 * exact.norm()


def test_what_was_chosen_stays():
    model = quantized("Mixtral")
    model.set_experts_implementation("eager")
    assert serve_nf4_experts(model) == []
    assert model.config._experts_implementation == "eager"
    dense = tiny_moe("Mixtral")
    assert serve_nf4_experts(dense) == []
    assert dense.config._experts_implementation == "grouped_mm"


def test_experts_that_are_not_in_nf4_go_the_usual_way():
    model = quantized("Mixtral")
    experts = model.model.layers[1].mlp.experts
    for name, stack in stacks_of(experts).items():
        experts._parameters[name] = nn.Parameter(stack.dequantize(), requires_grad=False)
    wanted = model(IDS).logits
    assert serve_nf4_experts(model) == ["model.layers.0.mlp.experts"]
    peftkern.reset_stats()
    assert (model(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()
    reasons = peftkern.stats().fallbacks
    assert reasons[("lora_experts", "the experts are not in 4 bits")] == 1


def test_patch_serves_experts_without_an_adapter(request):
    model = get_peft_model(quantized("Qwen3Moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    request.getfixturevalue("nothing_is_decoded")
    report = peftkern.patch(model)
    names = [f"base_model.model.model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert [name for name in report.without_adapter if name.endswith("experts")] == names
    model(IDS, labels=IDS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    peftkern.unpatch(model)
    assert model.config._experts_implementation == "grouped_mm"


def own_names(self: PreTrainedModel, name: str) -> str:
    if name not in ("eager", "grouped_mm", "batched_mm"):
        raise ValueError(name)
    return name


@pytest.mark.parametrize("named", [True, False], ids=["5.8", "5.3"])
def test_earlier_transformers_5(named, monkeypatch):
    """Without a method for what was chosen; with no flag of a norm, or with no names of others."""
    model = get_peft_model(quantized("Qwen3Moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    wanted = model(IDS).logits
    monkeypatch.delattr(PreTrainedModel, "get_experts_implementation")
    if named:
        for layer in model.base_model.model.model.layers:
            del layer.mlp.experts.has_post_expert_norm
    else:
        monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", own_names)
    report = peftkern.patch(model)
    assert len(report.patched) == 2
    assert any(name.endswith("experts") for name in report.without_adapter) is named
    assert (model(IDS).logits - wanted).norm() <= 1e-5 * wanted.norm()
    peftkern.unpatch(model)
    assert model.config._experts_implementation == "grouped_mm"


def test_pefts_fold_over_served_experts_is_pefts():
    torch.manual_seed(1)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(quantized("Qwen3Moe"), config)
    wanted = model(IDS).logits
    serve_nf4_experts(model)
    assert torch.equal(model(IDS).logits, wanted)
    assert isinstance(model.base_model.model.model.layers[0].mlp.experts.get_param(), NF4Stack)


@pytest.mark.slow
def test_a_pickled_model_runs_in_another_process(tmp_path):
    """Where nothing has named our implementation yet."""
    model = quantized("Qwen3Moe")
    serve_nf4_experts(model)
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
    code += "print(tuple(model(torch.arange(12).view(2, 6)).logits.shape))"
    assert run_code(code, tmp_path / "model.pt").strip().endswith(f"(2, 6, {VOCABULARY})")
