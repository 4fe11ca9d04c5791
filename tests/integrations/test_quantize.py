"""`peftkern.quantize_` of transformers' models: `save_pretrained` and `from_pretrained` know it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import peftkern
from peftkern.integrations.transformers import NF4ExpertsConfig
from peftkern.layers import NF4Linear
from peftkern.layers.expert_stack import stacks_of

SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": LOCAL,  # its experts are one tensor of the checkpoint, and transposed
    "JetMoe": LOCAL | {"kv_channels": 32},
    "Llama": {},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(12).view(2, 6)


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()


def round_trip(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model that is loaded again, which holds the same bytes under the same names."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    wanted, found = model.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype is wanted[name].dtype, name
        assert torch.equal(value.flatten(), wanted[name].flatten()), name
    return again


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    "options",
    [{}, {"include": ["layers.1"]}, {"exclude": ()}, {"exclude": ["down_proj", "lm_head"]}],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bytes_come_back(family, options, tmp_path):
    model = make(family)
    peftkern.quantize_(model, **options)
    again = round_trip(model, tmp_path / "once").train()
    torch.testing.assert_close(logits(again), logits(model), rtol=0.05, atol=0.02)
    has_experts = any(stacks_of(module) for module in model.modules())
    config = again.config.quantization_config
    assert type(config) is (NF4ExpertsConfig if has_experts else BitsAndBytesConfig)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    if has_experts:  # transformers does not save what it has loaded from bitsandbytes' checkpoints
        round_trip(again, tmp_path / "twice")


def test_a_dense_model_of_the_same_config_stays_one(tmp_path):
    model = make("Llama")
    dense = type(model)(model.config)
    peftkern.quantize_(model)
    assert dense.config is not model.config and model.model.config is model.config
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, NF4Linear) for module in again.modules())
    assert torch.equal(logits(again), logits(dense))


def test_a_loaded_models_experts_are_fused_already_and_stay_so(tmp_path):
    make("Qwen3Moe").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    peftkern.quantize_(model)
    round_trip(model, tmp_path / "nf4")
    keys = load_file(tmp_path / "nf4" / "model.safetensors").keys()
    assert f"model.layers.0.{EXPERTS[0]}" in keys and not any("experts.0" in key for key in keys)


def test_what_became_dense_since_is_saved_so(tmp_path):
    model = make("Qwen3Moe")
    peftkern.quantize_(model)
    attention = model.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.to_linear()
    again = round_trip(model, tmp_path)
    assert type(again.model.layers[1].self_attn.q_proj) is nn.Linear
    skipped = again.config.quantization_config.llm_int8_skip_modules
    assert skipped == ["lm_head", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("first", ["quantized", "adapted"])
def test_an_adapted_model_is_saved_once_it_is_unloaded(first, tmp_path):
    model = make("Qwen3Moe")
    if first == "quantized":
        peftkern.quantize_(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = get_peft_model(model, config)
    if first == "adapted":
        peftkern.quantize_(model)
    round_trip(model.unload(), tmp_path)


def test_bitsandbytes_layers_keep_their_config(tmp_path):
    make("Qwen3Moe").save_pretrained(tmp_path / "dense")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_4bit=True, **options)
    )
    assert len(peftkern.quantize_(model)) == 4
    again = round_trip(model, tmp_path / "nf4")
    assert again.config.quantization_config.bnb_4bit_compute_dtype is torch.bfloat16


def test_what_no_checkpoint_can_say_is_refused(tmp_path):
    model = make("Qwen3Moe")
    peftkern.quantize_(model, include=["layers.0"])
    peftkern.quantize_(model, include=["layers.1"], blocksize=128)
    with pytest.raises(ValueError, match=r"experts_blocksize: expected .* got \[64, 128\]"):
        model.save_pretrained(tmp_path)
    model = make("Llama")
    model.q_proj = nn.Linear(4, 4)  # its name ends that of every other one
    peftkern.quantize_(model, include=["layers"])
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.q_proj: expected a name"):
        model.save_pretrained(tmp_path)


def test_a_model_is_dequantized_whole():
    model = make("Qwen3Moe")
    peftkern.quantize_(model)
    wanted = logits(model)
    model = model.dequantize()
    assert not any(isinstance(m, NF4Linear) or stacks_of(m) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), wanted, rtol=0.05, atol=0.02)
