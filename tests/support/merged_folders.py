"""Bases, adapters and PEFT's own merge of them, as folders: the oracle of `peftkern merge`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_folders import LLAMA, config_of, contents, load_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_folders import convert
from torch import Tensor
from transformers import PreTrainedModel

from peftkern.tools.adapters import read_adapter
from peftkern.tools.checkpoints.checkpoint import read_checkpoint
from peftkern.tools.merge.merge import Summary, merge_checkpoint
from peftkern.tools.merge.plan import Options

_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 1}
_DEEPSEEK = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    **{"moe_intermediate_size": 32},
}
_LATENT = {
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 16},
    **{"q_lora_rank": 16, "num_key_value_heads": 4},
}
MIXTURES = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {**_DEEPSEEK, **_LATENT},
    "Glm4Moe": _DEEPSEEK,
    "GptOss": {"num_local_experts": 4},
}
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
# Sizes of models that blocks of 128 fit, and layers that an adapter has.
WIDE_MODELS = {
    "llama": (_WIDE, ["q_proj", "down_proj"]),
    "gpt2": ({"family": "GPT2", "head": "LMHeadModel", **_WIDE}, ["c_attn", "c_proj", "c_fc"]),
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_model(
    family: str = "Llama", head: str = "ForCausalLM", dtype: torch.dtype = torch.bfloat16, **config
) -> PreTrainedModel:
    """A tiny model of transformers, every parameter filled."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**LLAMA, **config})
    model = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.to(dtype)


def save_base(folder: Path, model: PreTrainedModel, *, shards: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def save_adapter(
    folder: Path, model: PreTrainedModel, seed: int = 5, dtype: Any = None, **config: Any
) -> Path:
    """An adapter of this model as PEFT saves it, trained away from where it began."""
    config = {"r": 4, "lora_alpha": 6, **config}
    tables = config.pop("save_embedding_layers", "auto")
    adapted = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
            elif "lora_" in name or p.requires_grad:
                p.normal_(std=0.1)
            if dtype is not None and "lora_" in name:
                p.data = p.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, save_embedding_layers=tables)
    adapted.unload()
    return folder


def save_both(
    folder: Path, model: PreTrainedModel, *, shards: str = "1GB", **config: Any
) -> tuple[Path, Path]:
    """A base, and an adapter of it."""
    base = save_base(folder / "base", model, shards=shards)
    return base, save_adapter(folder / "adapter", model, **config)


def save_wide(folder: Path, kind: str) -> tuple[PreTrainedModel, Path, Path]:
    """One of WIDE_MODELS, and the folders of both."""
    sizes, targets = WIDE_MODELS[kind]
    model = make_model(**sizes)
    return model, *save_both(folder, model, target_modules=targets)


def make_mixture(family: str, **sizes: Any) -> PreTrainedModel:
    """A tiny mixture of experts, of one layer."""
    return make_model(family=family, **{**_EXPERTS, **MIXTURES[family], **sizes})


def mixture(folder: Path, family: str, **sizes: Any) -> tuple[Path, Path]:
    """A base, and an adapter of its experts and attention."""
    config = {"target_modules": ["o_proj"], "target_parameters": STACKS}
    return save_both(folder, make_mixture(family, **sizes), **config)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype="auto", attn_implementation="eager", **options)


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
        model.save_pretrained(folder)
    return load_tensors(folder)


def merge(base: Path, *adapters: Path | tuple[Path, float], to: Path, **options: Any) -> Summary:
    """As the command does it."""
    how = {k: options.pop(k) for k in ("force", "progress") if k in options}
    parsed = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    read = [(read_adapter(path), weight) for path, weight in parsed]
    checkpoint = read_checkpoint(base, quantized=True)
    return merge_checkpoint(checkpoint, read, to, Options(**options), **how)


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, and under the same names."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype is tensor.dtype, name
        assert torch.equal(got[name], tensor), (name, (got[name] != tensor).float().mean())


def assert_quantized_sums(tmp_path: Path, base: Path, adapter: Path, **options: Any) -> Summary:
    """The same files as of a dense merge that is quantized; return the summary."""
    summary = merge(base, adapter, to=tmp_path / "out", **options)
    merge(base, adapter, to=tmp_path / "dense", out="bf16")
    how = {"format" if k == "out" else k: v for k, v in options.items()}
    convert(tmp_path / "dense", tmp_path / "expected", **how)
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected"))
    assert config_of(tmp_path / "out") == config_of(tmp_path / "expected")
    return summary


def refused(words: str, base: Path, *adapters: Any, **options: Any) -> None:
    """What cannot be merged is one line, and nothing is written."""
    out = base.parent / "out"
    before = contents(base.parent)
    with pytest.raises(ValueError, match=words) as caught:
        merge(base, *adapters, to=out, **options)
    assert "\n" not in str(caught.value)
    assert contents(base.parent) == before and not out.exists()
