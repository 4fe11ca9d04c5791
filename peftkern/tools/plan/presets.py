"""Configs of well-known models, from the config.json that the authors publish with each."""

from __future__ import annotations

from typing import Any

_LLAMA_70B = (8192, 80, 64, 8, 28672)


def _preset(kind, hidden, layers, heads, kv_heads, intermediate, vocabulary, **other) -> dict:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **other,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_QWEN3_MOE = {"head_dim": 128, "moe_intermediate_size": 768, "norm_topk_prob": True}
_QWEN3_MOE |= {"num_experts": 128, "num_experts_per_tok": 8}
_DEEPSEEK = {"moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8}
_DEEPSEEK |= {"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "q_lora_rank": 1536}
_DEEPSEEK |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
_DEEPSEEK |= {"v_head_dim": 128, "n_shared_experts": 1, "head_dim": 64}

PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _preset("llama", 4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": _preset("llama", 5120, 40, 40, 40, 13824, 32000),
    "llama2-70b": _preset("llama", *_LLAMA_70B, 32000),
    "llama-65b": _preset("llama", 8192, 80, 64, 64, 22016, 32000),
    "llama3-8b": _preset("llama", 4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": _preset("llama", *_LLAMA_70B, 128256),
    "llama3-405b": _preset("llama", 16384, 126, 128, 8, 53248, 128256),
    "llama3.2-1b": _preset("llama", 2048, 16, 32, 8, 8192, 128256, **_TIED),
    "llama3.2-3b": _preset("llama", 3072, 28, 24, 8, 8192, 128256, **_TIED),
    "mistral-7b": _preset("mistral", 4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-0.5b": _preset("qwen2", 896, 24, 14, 2, 4864, 151936, **_TIED),
    "qwen2.5-7b": _preset("qwen2", 3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-14b": _preset("qwen2", 5120, 48, 40, 8, 13824, 152064),
    "qwen2.5-32b": _preset("qwen2", 5120, 64, 40, 8, 27648, 152064),
    "qwen3-0.6b": _preset("qwen3", 1024, 28, 16, 8, 3072, 151936, **{**_TIED, "head_dim": 128}),
    "qwen3-8b": _preset("qwen3", 4096, 36, 32, 8, 12288, 151936),
    "qwen3-32b": _preset("qwen3", 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    "gemma2-2b": _preset("gemma2", 2304, 26, 8, 4, 9216, 256000, **{**_TIED, "head_dim": 256}),
    "gemma2-9b": _preset("gemma2", 3584, 42, 16, 8, 14336, 256000, **{**_TIED, "head_dim": 256}),
    "gemma3-1b": _preset(
        *("gemma3_text", 1152, 26, 4, 1, 6912, 262144), **{**_TIED, "head_dim": 256}
    ),
    "phi3-mini": _preset("phi3", 3072, 32, 32, 32, 8192, 32064),
    "gpt-oss-20b": _preset(
        *("gpt_oss", 2880, 24, 64, 8, 2880, 201088),
        **{"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "gpt-oss-120b": _preset(
        *("gpt_oss", 2880, 36, 64, 8, 2880, 201088),
        **{"head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4},
    ),
    "mixtral-8x7b": _preset("mixtral", 4096, 32, 32, 8, 14336, 32000),
    "qwen3-30b-a3b": _preset("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, **_QWEN3_MOE),
    "olmoe-1b-7b": _preset("olmoe", 2048, 16, 16, 16, 1024, 50304),
    "deepseek-v3": _preset("deepseek_v3", 7168, 61, 128, 128, 18432, 129280, **_DEEPSEEK),
}


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return {name: (K, N)} of the linear layers of a block, beside experts; none if its attention
    is not shaped like Llama's."""
    if config["model_type"] in ("deepseek_v3", "phi3"):
        return {}
    h, i, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
    if config["model_type"] not in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
        return attention  # experts
    return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}
