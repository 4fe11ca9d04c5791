"""Bases in 4 bits, and the same bases dense, with the values that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from checkpoint_folders import save_tensors
from merged_folders import STACKS, load, make_mixture, make_model, mixture, save_base
from quantized_folders import convert
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.integrations.transformers import (  # noqa: F401  register themselves
    BlockLinearConfig,
    MXFP4ExpertsConfig,
    NF4ExpertsConfig,
)
from peftkern.layers import BlockLinear
from peftkern.layers.expert_stack import stacks_of
from peftkern.tools.adapters import Adapter, Update, write_adapter
from peftkern.tools.checkpoints.four_bit import FourBit

# A format, and what makes the dense model: layers of each kind, and stacks of experts.
KINDS = {
    "llama, fp4": ("fp4", lambda: make_model(num_hidden_layers=1)),
    "gpt2, int4": ("int4", lambda: make_model("GPT2", "LMHeadModel", hidden_size=128)),
    "qwen3_moe, nf4": ("nf4", lambda: make_mixture("Qwen3Moe")),
    "gpt_oss, nf4": ("nf4", lambda: make_mixture("GptOss")),
    "gpt_oss, mxfp4": ("mxfp4", lambda: make_mixture("GptOss")),
}


def dense_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of a model without its 4 bits."""
    state = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(path, recurse=False):
            state[name] = p.detach()
        for name, stack in stacks_of(module).items():
            state[f"{path}.{name}"] = torch.stack([stack.dequantize(e) for e in range(len(stack))])
        if isinstance(module, Linear4bit):
            w = peftkern.NF4Weight.from_bitsandbytes(module.weight)
            state[f"{path}.weight"] = peftkern.dequantize(w)
        if isinstance(module, BlockLinear):
            state[f"{path}.weight"] = peftkern.dequantize(module.quantized_weight)
    return state


def decode(stored: Path, base: Path, folder: Path) -> Path:
    """A dense base with the values of one in 4 bits, which was made of another."""
    model = load(base)
    values = dense_values(load(stored))
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):  # which are quantized as linear layers
            values[f"{name}.weight"] = values[f"{name}.weight"].T
    assert dict(model.named_parameters()).keys() <= values.keys()
    model.load_state_dict(values, strict=False)
    return save_base(folder, model)


def mixture_in_4_bits(folder: Path, family: str, format: str, **sizes: Any) -> tuple[Path, ...]:
    """A mixture of experts in 4 bits, the same decoded, and an adapter."""
    base, adapter = mixture(folder, family, **sizes)
    convert(base, folder / "stored", format=format)
    return folder / "stored", decode(folder / "stored", base, folder / "decoded"), adapter


def large_experts(folder: Path, family: str, format: str, count: int) -> Path:
    """A base of so many experts, dense or in 4 bits, and an adapter of one of their stacks."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    sizes = dict.fromkeys(names, 384) | dict.fromkeys(("num_experts", "num_local_experts"), count)
    with torch.device("meta"):
        model = make_mixture(family, **sizes)
    tensors = {}
    for name, p in model.named_parameters():
        parts = {name: p}
        if name.endswith(tuple(STACKS)) and format:
            how = {"turned": format == "mxfp4", "device": "meta"}
            stack = FourBit.of(format, nested=False).stack(tuple(p.shape), p.dtype, **how)
            parts = stack.state(name)
        tensors |= {key: torch.zeros(part.shape, dtype=part.dtype) for key, part in parts.items()}
    save_tensors(folder / "base", {"model.safetensors": tensors})
    quantized = {"nf4": NF4ExpertsConfig, "mxfp4": MXFP4ExpertsConfig}
    if format:
        model.config.quantization_config = quantized[format]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / "base")
    factors = torch.randn(count, 1, 384), torch.randn(count, 768, 1)
    module, _, parameter = f"model.layers.0.{STACKS[0]}".rpartition(".")
    update = Update(module, parameter, "experts", *factors, 1.0)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_parameters": STACKS[:1]}
    write_adapter(Adapter({**config, "target_modules": []}, {module: update}), folder / "adapter")
    return folder
