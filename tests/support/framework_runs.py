"""A tiny Llama on disk with its tokenizer and a few texts, as training frameworks want them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft_models import fallbacks, served_by_us
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import LOGITS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peftkern

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
QUESTIONS = 16
TOLD = "told: "


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per ASCII letter."""
    letters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "\0", "pad_token": "\1", "bos_token": "\2", "eos_token": "\3"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT
    return fast


def letters_llama() -> LlamaForCausalLM:
    """A Llama of two layers for the letters, the same at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, max_position_embeddings=256))


def sums() -> list[tuple[str, str]]:
    """Questions with their answers."""
    return [(f"{i} and {i + 1}?", f"{2 * i + 1}.") for i in range(QUESTIONS)]


def save_model(folder: Path) -> Path:
    """Write model and tokenizer."""
    letters_llama().save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


def write_lines(file: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tell(history: list[dict]) -> None:
    """Print what a run's log says of its steps, and how many layers our ops served, as JSON."""
    steps = [entry for entry in history if "loss" in entry]
    logged = {name: [float(step[name]) for step in steps] for name in ("loss", "grad_norm")}
    print(TOLD + json.dumps({**logged, "served": served_by_us(), "fallbacks": fallbacks()}))
    peftkern.reset_stats()


def told(output: str) -> list[dict]:
    """Read what the runs of a process told."""
    lines = [line for line in output.splitlines() if line.startswith(TOLD)]
    return [json.loads(line.removeprefix(TOLD)) for line in lines]


def assert_same(plain: dict, patched: dict, steps: int, layers: int) -> None:
    """Two runs log the same losses, the second one served by our ops in every layer."""
    assert plain["served"] == 0 and patched["served"] >= steps * layers
    assert plain["fallbacks"] == patched["fallbacks"] == {}
    assert len(plain["loss"]) == steps and len({*plain["loss"]}) == steps
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(patched[name]), torch.tensor(plain[name]), **LOGITS)
