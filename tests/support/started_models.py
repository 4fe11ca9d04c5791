"""Models whose adapters `initialize_` starts, and PEFT's own starts of them."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft_models import TARGETS, text_batch, tiny_llama
from torch import Tensor, nn

BATCHES = [text_batch(seed=seed) for seed in range(2)]
DATA = ("corda", "eva", "lora_ga")


def settings(method: str, **config: Any) -> LoraConfig:
    """PEFT's config for its own initialization."""
    own = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    extra = {"corda": {"corda_config": CordaConfig(corda_method="ipm")},
             "lora_ga": {"lora_ga_config": LoraGAConfig()},
             "eva": {"eva_config": EvaConfig()}}  # fmt: skip
    return LoraConfig(**own, init_lora_weights=method, **extra.get(method, {}), **config)


def initialized_by_peft(method: str, batch: dict[str, Tensor]) -> PeftModel:
    base = tiny_llama().eval()
    config = settings(method)
    if method == "corda":
        # PEFT's module imports attrs, which it does not require, for this one decorator.
        sys.modules.setdefault("attr", SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: base(**batch))
    if method == "lora_ga":
        preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    if method == "eva":
        initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def update_of(layer: LoraLayer) -> Tensor:
    lora_A, lora_B = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    return (layer.scaling["default"] * lora_B @ lora_A).detach()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(BATCHES[0]["input_ids"]).logits


def data(method: str) -> dict[str, Any]:
    return {"batches": BATCHES} if method in DATA else {}
