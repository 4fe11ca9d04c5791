"""Checkpoint folders for the tests of `peftkern quantize`: real ones, and broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA = {
    **{"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "attn_implementation": "eager",
}


def save_llama(
    folder: Path, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False, **config: Any
) -> Path:
    """A tiny Llama as transformers saves it."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    return folder


def save_tensors(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    """Shards of any tensors with an index, or model.safetensors alone, and a config of nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if list(shards) != ["model.safetensors"]:
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
        write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def raw_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file from its header, which may lie; `length` instead of the header's true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return (length % 2**64).to_bytes(8, "little") + text + data


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's files of safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden and nested ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
