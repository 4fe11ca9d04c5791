"""A tiny Llama with AdaLoRA adapters and a schedule that prunes them."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft_models import TARGETS, tiny_llama
from torch import nn

STEPS = 50
SCHEDULE = {"total_step": STEPS, "tinit": 5, "tfinal": 12, "deltaT": 3, "target_r": 2, "init_r": 6}


def quantize_4bit_(
    model: nn.Module,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """bitsandbytes' layers in place of all linear ones but lm_head, as transformers loads them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, leaf = name.rpartition(".")
            sizes = module.in_features, module.out_features
            options = {"quant_type": "nf4", "quant_storage": quant_storage}
            layer = bnb.nn.Linear4bit(*sizes, False, compute_dtype, **options)
            layer.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), leaf, layer.to("cpu").requires_grad_(False))
    model.is_loaded_in_4bit = True
    return model


def adalora_llama(dtype: torch.dtype = torch.float32, nf4: bool = False, **config) -> PeftModel:
    base = tiny_llama(dtype)
    if nf4:
        quantize_4bit_(base)
    torch.manual_seed(5)
    settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "lora_alpha": 16}
    return get_peft_model(base, AdaLoraConfig(**{**settings, **SCHEDULE, **config}))


def optimizer_of(model: nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)
