"""Adapters that PEFT saved, of a small model that has a layer of each kind, and their deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.tools.adapters import Adapter, AdapterError, Update, write_adapter
from peftkern.tools.adapters.convert.run import convert_adapter

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXPERTS, INNER, HIDDEN, VOCABULARY = 3, 5, 8, 11


class Experts(nn.Module):
    """A stack as transformers' models register it; `is_transposed` as gpt-oss has it."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        for name, shape in shapes.items():
            shape = shape[::-1] if is_transposed else shape
            self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))


class Block(nn.Module):
    """A layer of each kind; the names of the attention's are those of Llama."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, 12)
        self.o_proj = nn.Linear(12, HIDDEN, bias=False)
        self.c_attn = Conv1D(9, HIDDEN)
        self.conv = nn.Conv2d(3, 7, (2, 3))
        self.wave = nn.Conv1d(3, 5, 4)
        self.norm = nn.LayerNorm(HIDDEN)
        self.experts = Experts(is_transposed)


class Tiny(nn.Module):
    """Two blocks below an embedding."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block(is_transposed) for _ in range(2))
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed_tokens(ids))


LINEAR = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
PARAMETERS = {"r": 2, "lora_alpha": 3, "target_modules": []}
CASES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "power of two": {**LINEAR, "lora_alpha": 8},
    "rslora": {**LINEAR, "use_rslora": True},
    "patterns": {
        **LINEAR,
        "rank_pattern": {r"layers\.0\.q_proj": 3, "o_proj": 5},
        "alpha_pattern": {"^layers.1.q_proj": 7, "q_proj": 2},
    },
    "dora": {**LINEAR, "use_dora": True},
    "dora, all kinds": {
        **LINEAR,
        "target_modules": ["q_proj", "c_attn", "conv", "embed_tokens"],
        "use_dora": True,
    },
    "lora_bias": {**LINEAR, "target_modules": ["q_proj"], "lora_bias": True},
    "Conv1D": {**LINEAR, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "convolutions": {**LINEAR, "target_modules": ["conv", "wave"]},
    "embedding": {**LINEAR, "target_modules": ["embed_tokens", "q_proj"]},
    "biases": {**LINEAR, "bias": "all"},
    "modules_to_save": {**LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "token rows": {**LINEAR, "trainable_token_indices": {"embed_tokens": [1, 4]}},
    "regular expression": {**LINEAR, "target_modules": r".*layers\.1\.[qo]_proj"},
    "experts": {**PARAMETERS, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    "one parameter": {**PARAMETERS, "target_parameters": ["experts.down_proj"]},
    "experts and attention": {
        **PARAMETERS,
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"experts.down_proj": 3},
        "use_rslora": True,
    },
    "parameter called weight": {**PARAMETERS, "target_parameters": ["q_proj.weight"]},
    "adalora": {"init_r": 6, "target_r": 3, "total_step": 10, "target_modules": ["q_proj"]},
}


def make(case: str, *, is_transposed: bool = False, seed: int = 0) -> PeftModel:
    """Return the model with an adapter whose tensors are all random."""
    torch.manual_seed(seed)
    kind = AdaLoraConfig if case == "adalora" else LoraConfig
    model = get_peft_model(Tiny(is_transposed), kind(**CASES[case]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name or parameter.requires_grad:
                parameter.normal_(std=0.5)
        if case == "adalora":  # as if some triplets had been masked
            masks = {0: [True, False, True, True, False, False], 1: [False] * 6}
            model.peft_config["default"].rank_pattern = {
                f"layers.{layer}.q_proj.lora_E": mask for layer, mask in masks.items()
            }
            for layer, mask in masks.items():
                factor = model.base_model.model.layers[layer].q_proj.lora_E["default"]
                factor[~torch.tensor(mask)] = 0
    return model


def save(case: str, folder: Path, **how: Any) -> PeftModel:
    """Let PEFT save an adapter, and return the model that has it."""
    model = make(case, **how)
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> PeftModel:
    """PEFT's reading of an adapter, over the base that `make` has."""
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Tiny(), folder)


def reload(adapter: Adapter, folder: Path) -> PeftModel:
    """PEFT's reading of an adapter that is written."""
    write_adapter(adapter, folder)
    return load(folder)


def base_of(folder: Path, kind: str = "qwen3_moe") -> Path:
    """Make a base's folder, of which conversions read the kind of model alone."""
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    return folder


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """Return PEFT's delta of each weight, by module, or by module and parameter."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(layer, "parameter_name", "weight")
            name = name if parameter == "weight" else f"{name}.{parameter}"
            with torch.no_grad():
                found[name] = layer.get_delta_weight("default")
    return found


def delta(update: Update, like: Tensor) -> Tensor:
    """Return the delta of an update in float64, shaped and turned like a base weight."""
    dense = update.scaling * (update.lora_B.double() @ update.lora_A.double())
    turned = update.kind == "embedding" or dense.shape[-2:] != like.shape[-2:]
    if update.kind == "conv":
        return dense.reshape(like.shape)
    return dense.mT if turned else dense


def assert_updates(adapter: Adapter, wanted: dict[str, Tensor]) -> None:
    """The products of an adapter are these deltas, and there are no others."""
    assert adapter.updates.keys() == wanted.keys()
    for key, theirs in wanted.items():
        ours = delta(adapter.updates[key], theirs)
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, **CLOSE)


def refused(path: Path, to: str, *words: str, **how: Any) -> None:
    """What cannot be converted is one line with the words, and nothing is written."""
    with pytest.raises(AdapterError) as caught:
        convert_adapter(path, path.parent / "dst", to, **how)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and said.isprintable(), said
    assert not [word for word in words if word not in said], said
    assert not (path.parent / "dst").exists()


def weights(model: PeftModel) -> dict[str, Tensor]:
    """Return the base's weights by the names that `deltas` has."""
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    return plain | {
        name.removesuffix(".weight"): t for name, t in plain.items() if name.endswith(".weight")
    }
