"""`MXFP4ExpertsConfig`: gpt-oss's checkpoints are read as they are, trained over and saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from expert_models import GPT_OSS, fill_lora_B, save_gpt_oss
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tolerances import RATIO, errors, floors
from torch import nn
from trainers import trainer
from transformers import (
    AutoModelForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import peftkern
from peftkern.integrations.transformers import MXFP4ExpertsConfig
from peftkern.layers.expert_stack import stacks_of
from peftkern.layers.mxfp4_stack import MXFP4Stack

pytestmark = pytest.mark.usefixtures("one_thread")
E, K, WIDTH = (GPT_OSS[k] for k in ("num_local_experts", "hidden_size", "intermediate_size"))
IDS = torch.arange(12).view(2, 6)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A gpt-oss in MXFP4 and the same in bfloat16."""
    return save_gpt_oss(tmp_path_factory.mktemp("models") / "gpt-oss")


@pytest.fixture
def checkpoint(folders: tuple[Path, Path]) -> Path:
    return folders[0]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = MXFP4ExpertsConfig.of_checkpoint(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)


def decoded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as transformers makes it dense."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def add_lora(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **targets))


def stacks(model: nn.Module) -> dict[str, MXFP4Stack]:
    modules = model.named_modules()
    return {f"{path}.{name}": s for path, m in modules for name, s in stacks_of(m).items()}


def test_experts_for_kernels_without_gradients_are_told(checkpoint):
    """transformers' own module, whose kernels need a package and Triton on a device."""
    model = decoded(checkpoint)
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    net = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="^1 modules of experts are laid out for kernels of tr"):
        report = peftkern.patch(net)
    assert len(report.patched) == 2 and len(report.warnings) == 1


def test_a_checkpoint_has_the_tensors_of_gpt_oss(checkpoint):
    file = load_file(checkpoint / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    shapes = {"gate_up_proj": (E, 2 * WIDTH, K // 32), "down_proj": (E, K, WIDTH // 32)}
    for name, shape in shapes.items():
        blocks, scales = (file[f"{prefix}{name}_{part}"] for part in ("blocks", "scales"))
        assert blocks.dtype is scales.dtype is torch.uint8
        assert (*shape, 16) == blocks.shape and shape == scales.shape
        assert file[f"{prefix}{name}_bias"].dtype is torch.bfloat16
        assert f"{prefix}{name}" not in file
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_as_it_is_and_bit_for_bit_what_transformers_decodes(checkpoint, dtype):
    file = load_file(checkpoint / "model.safetensors")
    model, theirs = load(checkpoint, dtype), decoded(checkpoint, dtype)
    found = stacks(model)
    assert len(found) == 4 and model.hf_quantizer.is_trainable
    for name, stack in found.items():
        assert isinstance(stack, MXFP4Stack) and stack.dtype is dtype and not stack.requires_grad
        assert torch.equal(stack._packed.view(-1), file[f"{name}_blocks"].view(-1))
        assert torch.equal(stack._scale.view(-1), file[f"{name}_scales"].view(-1))
        weight = theirs.get_parameter(name)
        assert stack.shape == weight.shape and torch.equal(stack.dequantize(), weight)
        assert torch.equal(stack[2], weight[2])
    exact = decoded(checkpoint, torch.float64)
    exact.set_experts_implementation("eager")  # grouped_mm has no float64
    with torch.no_grad():
        ours, eager, right = (m(IDS).logits for m in (model, theirs, exact))
    bound = RATIO * errors(eager, right)[0] + floors(dtype)[0]
    assert errors(ours, right)[0] <= bound


def test_trainer_trains_adapters_on_attention_and_experts(checkpoint, tmp_path, monkeypatch):
    """The guard of transformers lets it: losses are those of PEFT over a decoded model."""
    losses, packed = [], None
    for base in (load(checkpoint), decoded(checkpoint)):
        model = add_lora(base)
        if stacks(model):
            report = peftkern.patch(model)
            assert report.kinds["lora.ParamWrapper"] == 2 and report.falling_back == {}
            packed = {name: stack._packed.clone() for name, stack in stacks(model).items()}
            peftkern.reset_stats()
            with monkeypatch.context() as no_decoding:
                no_decoding.setattr("peftkern.layers.expert_stack.dequantize", None)
                run = trainer(model, tmp_path, max_steps=4)
                run.train()
            assert not [why for op, why in peftkern.stats().fallbacks if op == "lora_experts"]
            assert all(torch.equal(s._packed, packed[n]) for n, s in stacks(model).items())
            model.save_pretrained(tmp_path / "adapter")
            trained = model
        else:
            run = trainer(model, tmp_path, max_steps=4)
            run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    with torch.no_grad():
        expected = trained.eval()(IDS).logits
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_merged_experts_are_quantized_again_and_unmerging_gives_the_bytes_back(checkpoint):
    model = add_lora(load(checkpoint))
    fill_lora_B(model)
    peftkern.patch(model, include=["experts"])
    before = {name: s._packed.clone() for name, s in stacks(model).items()}
    with pytest.warns(UserWarning, match="quantized to MXFP4 again"):
        model.merge_adapter()
    assert all(not torch.equal(s._packed, before[n]) for n, s in stacks(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(s._packed, before[n]) for n, s in stacks(model).items())


def test_a_model_that_no_config_describes_is_not_saved(checkpoint, tmp_path):
    model = load(checkpoint)
    assert peftkern.quantize_(model, include=["q_proj"]) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"q_proj is in NF4, .* save the adapter"):
        model.save_pretrained(tmp_path)
    adapted = add_lora(model)
    assert peftkern.patch(adapted).falling_back == {}
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_model_is_dequantized_whole(checkpoint):
    model, theirs = load(checkpoint), decoded(checkpoint)
    assert model.config._experts_implementation == "peftkern"
    model = model.dequantize()
    assert not stacks(model) and model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs(IDS).logits)


def test_what_is_no_such_checkpoint_is_refused(folders, tmp_path):
    checkpoint, dense = folders
    with pytest.raises(ValueError, match="expected a checkpoint in MXFP4, got quant_method None"):
        MXFP4ExpertsConfig.of_checkpoint(dense)
    sizes = {**GPT_OSS, "num_experts": E, "moe_intermediate_size": WIDTH, "vocab_size": 64}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(tmp_path / "qwen")
    config = MXFP4ExpertsConfig()
    with pytest.raises(ValueError, match=r"expected gpt-oss, .* got qwen3_moe"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", quantization_config=config)
    file = load_file(checkpoint / "model.safetensors")
    file = {name: t for name, t in file.items() if "1.mlp.experts.down_proj_scales" not in name}
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(file, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)):
        load(tmp_path)
