"""Tied and resized embeddings, where PEFT merges two layers of the model into one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import changing, load_tensors
from merged_folders import (
    assert_same_tensors,
    load,
    make_model,
    merge,
    merged_by_peft,
    refused,
    save_adapter,
    save_base,
)
from peft import PeftModel
from torch import nn


def untied_copy(folder: Path, base: Path) -> Path:
    """The same base, whose output embeddings have a table of their own."""
    model = load(base)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["input", "output", "both", "input saved", "output saved"],
)
def test_the_other_of_two_tied_tables_stays(tmp_path: Path, config: dict[str, Any]) -> None:
    """As if the base had never been tied: PEFT, given two tables, has the same bits."""
    base = save_base(tmp_path / "base", make_model(tie_word_embeddings=True), shards="20KB")
    apart = untied_copy(tmp_path / "apart", base)
    assert "lm_head.weight" not in load_tensors(base)
    adapter = save_adapter(tmp_path / "adapter", load(apart), **config)
    expected = merged_by_peft(apart, adapter, tmp_path / "peft")
    summary = merge(base, adapter, to=tmp_path / "out")
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    assert [new.parameter for new in summary.plan.untied] == ["lm_head.weight"]
    merged = load(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, expected["lm_head.weight"])
    assert torch.equal(merged.model.embed_tokens.weight, expected["model.embed_tokens.weight"])


BOTH = {
    "neither": {"target_modules": ["q_proj"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 40]},
    "module": {
        **{"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("case", BOTH)
def test_what_is_meant_for_both_keeps_them_tied(tmp_path: Path, case: str) -> None:
    model = make_model(tie_word_embeddings=True)
    base = save_base(tmp_path / "base", model)
    adapter = save_adapter(tmp_path / "adapter", load(base), **BOTH[case])
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    expected.pop("lm_head.weight", None)
    summary = merge(base, adapter, to=tmp_path / "out")
    assert summary.plan.untied == []
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    merged = load(tmp_path / "out")
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_one_update_of_two_tied_layers_is_merged_once(tmp_path: Path) -> None:
    """PEFT 0.21 adds it to their table twice; the oracle is the model before it is merged."""
    model = make_model(tie_word_embeddings=True, dtype=torch.float32)
    base = save_base(tmp_path / "base", model)
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = save_adapter(tmp_path / "adapter", load(base), **config)
    assert merge(base, adapter, to=tmp_path / "out").plan.untied == []
    ids = torch.arange(8)[None]
    expected = PeftModel.from_pretrained(load(base), adapter)(ids).logits
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert not torch.allclose(load(base)(ids).logits, expected, rtol=1e-2)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        *((False, ["q_proj"]), (True, ["q_proj"])),
        *((False, ["embed_tokens", "lm_head"]), (True, ["embed_tokens"])),
    ],
)
def test_resized_vocabulary(tmp_path: Path, tied: bool, targets: list[str]) -> None:
    """It comes with the adapter: the tables and the config have the new size."""
    sizes = {"tie_word_embeddings": tied, "dtype": torch.float32}
    base = save_base(tmp_path / "base", make_model(**sizes))
    model = make_model(**sizes)
    model.resize_token_embeddings(56)
    config = {"target_modules": targets, "save_embedding_layers": True}
    adapter = save_adapter(tmp_path / "adapter", model, **config)
    merge(base, adapter, to=tmp_path / "out")
    live = load(base)
    live.resize_token_embeddings(56)
    live = PeftModel.from_pretrained(live, adapter)
    merged = load(tmp_path / "out")
    assert merged.config.vocab_size == 56
    ids = torch.arange(40, 56)[None]
    torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_of_different_sizes_are_refused(tmp_path: Path) -> None:
    """As PEFT leaves them: the table of one, which is targeted, without that of the other."""
    base = save_base(tmp_path / "base", make_model())
    model = make_model()
    model.resize_token_embeddings(56)
    adapter = save_adapter(tmp_path / "adapter", model, target_modules=["embed_tokens"])
    refused("embeddings of different numbers of rows", base, adapter)


def test_longer_embeddings_without_their_table_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_model())
    longer = make_model(vocab_size=56)
    config = {"target_modules": ["embed_tokens"], "save_embedding_layers": False}
    adapter = save_adapter(tmp_path / "adapter", longer, **config)
    refused(r"resized vocabulary comes with base_layer\.weight", base, adapter)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 40]}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
    ids=["input", "output", "token rows", "once for both"],
)
def test_one_table_that_is_stored_twice(tmp_path: Path, config: dict[str, Any], tied: bool) -> None:
    """Under both names, as some files of tied models have it, it is merged like one."""
    base = save_base(tmp_path / "base", make_model(tie_word_embeddings=True))
    adapter = save_adapter(tmp_path / "adapter", load(base), **config)
    merge(base, adapter, to=tmp_path / "expected")
    with changing(base / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    merge(base, adapter, to=tmp_path / "out")
    merged, expected = load(tmp_path / "out"), load(tmp_path / "expected")
    assert merged.config.tie_word_embeddings == expected.config.tie_word_embeddings == tied
    assert_same_tensors(dict(merged.state_dict()), dict(expected.state_dict()))
