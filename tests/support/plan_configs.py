"""A config.json that `peftkern plan` reads."""

from __future__ import annotations

LLAMA_CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA_CONFIG |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 32}
