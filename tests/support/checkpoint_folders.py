"""Checkpoint folders for the tests of `peftkern quantize`: real ones, and broken ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LLAMA = {
    **{"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "attn_implementation": "eager",
}

_MOE = {**LLAMA, "head_dim": 16, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 16},
    **{"q_lora_rank": 16, "moe_intermediate_size": 32, "num_key_value_heads": 4},
}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 32}
_LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 64}
# Of mixtures of experts: the model, its config, and how a file holds the experts: one by one, or
# a stack of all.
MOE_FAMILIES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, _QWEN, False),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}, False),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, _DEEPSEEK, False),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}, False),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4}, True),
    "llama4_text": (Llama4ForCausalLM, Llama4TextConfig, _LLAMA4, True),
}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def configure(folder: Path, file: str = "config.json", **fields: Any) -> None:
    """Change fields of a config."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@contextmanager
def changing(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, which is written again with what became of them."""
    tensors = load_file(path)
    yield tensors
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def save_moe(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> PreTrainedModel:
    """A tiny mixture of experts as transformers saves it."""
    torch.manual_seed(5)
    cls, config_cls, sizes, _ = MOE_FAMILIES[family]
    model = cls(config_cls(**{**_MOE, **sizes, **config})).to(dtype)
    for name, parameter in model.named_parameters():
        if "experts" in name:  # of some families these begin as whatever was in memory
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model


def save_characters(folder: Path) -> None:
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": 26}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def save_llama(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    sharded: bool = False,
    seed: int = 3,
    **config: Any,
) -> Path:
    """A tiny Llama as transformers saves it."""
    torch.manual_seed(seed)
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
