"""Tiny models of many architectures, with adapters and without weights to load."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

import peftkern
from peftkern.tools import models
from peftkern.tools.plan.build import DTYPES
from peftkern.tools.plan.plan import Training

SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 704}
SIZES |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
HEADS, FEW = {"head_dim": 64}, {"intermediate_size": 192, "num_local_experts": 8}
MANY = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
MLA = {"num_key_value_heads": 4, "moe_intermediate_size": 96, "n_routed_experts": 8, "n_group": 2}
MLA |= {"num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 64}
MLA |= {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 704, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
VISION |= {"model_type": "siglip_vision_model", "intermediate_size": 48, "image_size": 28}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("llama", "mistral", "qwen2", "phi3", "olmo2", "starcoder2")},
    **dict.fromkeys(("qwen3", "gemma2", "gemma3_text", "glm4"), HEADS),
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 4},
    **{"mixtral": {**FEW, **HEADS}, "gpt_oss": {**FEW, **HEADS, "num_experts_per_tok": 2}},
    **{"qwen3_moe": {**HEADS, **MANY}, "olmoe": {**MANY, "intermediate_size": 96}},
    **{"deepseek_v3": MLA, "t5": {**T5, "decoder_start_token_id": 0}},
    "gemma3": {"text_config": {**SIZES, **HEADS}, "vision_config": VISION},  # on text alone
}


def tiny_config(kind: str) -> Any:
    """Make the config of transformers of one of ARCHITECTURES."""
    return models.from_config({"model_type": kind, **SIZES, **ARCHITECTURES[kind]})


def make_model(kind: str, training: Training) -> nn.Module:
    """Make the model of a training as users of transformers and PEFT do, NF4 by peftkern."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    eager = {"attn_implementation": "eager"} if training.attention == "eager" else {}
    model = models.auto_class(config).from_config(config, dtype=DTYPES[training.dtype], **eager)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    modules, experts = models.adapter_targets(model, ",".join(training.targets))
    if training.base == "nf4":
        peftkern.quantize_(model, exclude=["lm_head"], double_quant=training.double_quant)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    config = peft.LoraConfig(
        r=training.r, target_modules=modules, target_parameters=experts or None
    )
    model = peft.get_peft_model(model, config)
    if training.patched:
        peftkern.patch(model)
    return model.train()
