"""Merged files have the bits of PEFT's `from_pretrained` and `merge_and_unload`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import load_tensors
from merged_folders import (
    STACKS,
    assert_same_tensors,
    load,
    make_model,
    merge,
    merged_by_peft,
    save_adapter,
    save_base,
    save_both,
)
from peft import AdaLoraConfig, get_peft_model

from peftkern.tools.adapters import read_adapter
from peftkern.tools.merge.merge import Summary

LINEAR = ["q_proj", "v_proj", "down_proj"]
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
MOE = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
VIT = {"image_size": 32, "patch_size": 8}
WHISPER = {
    **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    **{"num_mel_bins": 20, "max_source_positions": 16, "max_target_positions": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}

# Of each case: the model, and the adapter.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"target_modules": LINEAR}),
    "power of two": ({}, {"target_modules": LINEAR, "lora_alpha": 8}),
    "float32": ({"dtype": torch.float32}, {"target_modules": LINEAR}),
    "float16": ({"dtype": torch.float16}, {"target_modules": LINEAR}),
    "bf16 files": ({}, {"target_modules": LINEAR, "dtype": torch.bfloat16}),
    "rslora": ({}, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        {},
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp.*": 3},
            "alpha_pattern": {"v_proj": 11},
        },
    ),
    "dora": ({}, {"target_modules": LINEAR, "use_dora": True}),
    "lora_bias": ({"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "bias all": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": (
        {"attention_bias": True},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ),
    "embeddings": ({}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings dora": ({}, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "lm_head": ({}, {"target_modules": ["lm_head"]}),
    "modules_to_save": ({}, {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "token rows": ({}, {"target_modules": LINEAR, "trainable_token_indices": [5, 2, 40]}),
    "token rows by name": (
        {},
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [1, 47]}},
    ),
    "all": ({}, {"target_modules": "all-linear", "r": 33}),
    "Conv1D": (
        {"family": "GPT2", "head": "LMHeadModel", **GPT2},
        {"target_modules": ["c_attn", "c_fc"]},
    ),
    "Conv1D dora": (
        {"family": "GPT2", "head": "LMHeadModel", **GPT2},
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    ),
    "conv2d": (
        {"family": "ViT", "head": "Model", **VIT},
        {"target_modules": ["projection", "q_proj", "query"]},
    ),
    "conv2d dora": (
        {"family": "ViT", "head": "Model", **VIT},
        {"target_modules": ["projection"], "use_dora": True},
    ),
    "conv1d": (
        {"family": "Whisper", "head": "ForConditionalGeneration", **WHISPER},
        {"target_modules": ["conv1", "conv2", "q_proj"]},
    ),
    "qwen3_moe": (
        {"family": "Qwen3Moe", **MOE},
        {"target_modules": ["q_proj"], "target_parameters": STACKS},
    ),
    "router": (
        {"family": "Qwen3Moe", **MOE},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "matrix of a linear layer": (
        {},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ),
    "one of two": (
        {"family": "Qwen3Moe", **MOE},
        {"target_modules": [], "target_parameters": STACKS[1:]},
    ),
    "mixtral": (
        {"family": "Mixtral", "num_local_experts": 4, "head_dim": 16},
        {"target_modules": ["q_proj"], "target_parameters": STACKS},
    ),
    "gpt_oss": (
        {"family": "GptOss", "num_local_experts": 4, "head_dim": 16},
        {"target_modules": ["q_proj"], "target_parameters": STACKS},
    ),
}


def updated_tensors(summary: Summary, updated: set[str]) -> set[str]:
    """The files' names of these parameters, by the places that the merge has found."""
    return {
        name
        for name, found in summary.plan.places.by_tensor.items()
        if any(place.parameter in updated for place in found)
    }


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_peft(tmp_path: Path, case: str) -> None:
    """Of every tensor of the checkpoint; transformers loads it."""
    sizes, config = CASES[case]
    base, adapter = save_both(tmp_path, make_model(**sizes), **config)
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    summary = merge(base, adapter, to=tmp_path / "out")
    got = load_tensors(tmp_path / "out")
    assert_same_tensors(got, expected)
    before = load_tensors(base)
    changed = {name for name, tensor in got.items() if not torch.equal(tensor, before[name])}
    updates = read_adapter(adapter).updates.values()
    updated = {f"{update.module}.{update.parameter}" for update in updates}
    assert summary.changes.keys() == updated_tensors(summary, updated)
    assert summary.changes.keys() <= changed
    assert_same_tensors(
        dict(load(tmp_path / "out").state_dict()), dict(load(tmp_path / "peft").state_dict())
    )


def test_triplets_of_adalora_are_those_of_peft(tmp_path: Path) -> None:
    """Within one rounding: PEFT multiplies lora_A by lora_E and divides by the rank each time."""
    model = make_model(num_hidden_layers=1, dtype=torch.float32)
    base = save_base(tmp_path / "base", model)
    config = AdaLoraConfig(init_r=6, lora_alpha=9, total_step=10, target_modules=LINEAR)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = merged_by_peft(base, tmp_path / "adapter", tmp_path / "peft")
    merge(base, tmp_path / "adapter", to=tmp_path / "out")
    got, before = load_tensors(tmp_path / "out"), load_tensors(base)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor, before[name]) == (name.split(".")[-2] not in LINEAR)


def test_adapter_in_the_base_itself_is_not_merged_twice(tmp_path: Path) -> None:
    """transformers loads the one that lies beside the weights; others' sub-folders are copied."""
    model = make_model()
    base = save_base(tmp_path / "base", model)
    adapter = save_adapter(base, model, target_modules=LINEAR)
    save_adapter(base / "adapter", model, target_modules=LINEAR)
    save_adapter(base / "vision-lora", model, target_modules=LINEAR)
    summary = merge(base, adapter, to=tmp_path / "out")
    merge_alone = load_tensors(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"adapter", "adapter_config.json", "adapter_model.safetensors"})
    assert "vision-lora/adapter_model.safetensors" in summary.plan.companions.copied
    assert {"adapter_config.json", "adapter/adapter_config.json"} <= {*summary.plan.companions.left}
    state = load(tmp_path / "out").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[name], merge_alone[name])
