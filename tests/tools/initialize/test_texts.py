"""Texts become what the loss of a checkpoint's model takes, and ranks come of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import refused
from framework_runs import letters_tokenizer, write_lines
from peft import LoraConfig, get_peft_model

from peftkern.cli import main
from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.initialize.texts import MASKED, kind_of, read_batches

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "and sleeps under a tree"]
_BERT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
_BERT |= {"num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 3}
CLASSES = {0: "good", 1: "bad", 2: "ugly"}
CONFIGS = {
    "BertForMaskedLM": transformers.BertConfig(**_BERT),
    "BertForSequenceClassification": transformers.BertConfig(**_BERT, id2label=CLASSES),
    "BertModel": transformers.BertConfig(**_BERT),
    "T5ForConditionalGeneration": transformers.T5Config(**_T5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    tokenizer = letters_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "\4"})
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        getattr(transformers, name)(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def lines(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    return file


def batches(folder: Path, data: Path, *, loss: bool = True, **options: Any) -> list[dict]:
    return read_batches(read_checkpoint(folder), data, 8, 64, loss=loss, **options)


def spelled(tokens: torch.Tensor) -> str:
    return "".join(map(chr, tokens.flatten().tolist()))


def test_a_share_of_the_tokens_is_masked_with_a_seed(folders, tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        found = batches(folders["BertForMaskedLM"], lines(tmp_path), seed=seed)
        for batch, text in zip(found, TEXTS, strict=True):
            masked = batch["labels"] != -100
            assert masked.sum() == round(MASKED * len(text))
            assert set(batch["input_ids"][masked].tolist()) == {4}
            whole = torch.where(masked, batch["labels"], batch["input_ids"])
            assert spelled(whole) == text
        drawn.append([batch["input_ids"].tolist() for batch in found])
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_encoder_and_decoder_gets_halves_or_targets(folders, tmp_path):
    folder = folders["T5ForConditionalGeneration"]
    for batch, text in zip(batches(folder, lines(tmp_path)), TEXTS, strict=True):
        first, second = spelled(batch["input_ids"]), spelled(batch["labels"])
        assert f"{first} {second}" == text
    data = write_lines(tmp_path / "a.jsonl", [{"text": "in it", "target": "out"}])
    (batch,) = batches(folder, data)
    assert (spelled(batch["input_ids"]), spelled(batch["labels"])) == ("in it", "out")


def test_classes_by_name_and_number(folders, tmp_path):
    folder = folders["BertForSequenceClassification"]
    labels = ["bad", 2, "good"]
    rows = [{"text": text, "label": one} for text, one in zip(TEXTS, labels, strict=True)]
    found = batches(folder, write_lines(tmp_path / "a.jsonl", rows))
    assert [batch["labels"].tolist() for batch in found] == [[1], [2], [0]]
    assert all("labels" not in one for one in batches(folder, lines(tmp_path), loss=False))
    for bad in ("best", 3, -1, True, 0.5, None, [1]):
        data = write_lines(tmp_path / "b.jsonl", [{"text": "a text", "label": bad}])
        with pytest.raises(CheckpointError, match="label: expected one of 'good', 'bad', 'ugly'"):
            batches(folder, data)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("BertForMaskedLM", "gradients"),
        ("T5ForConditionalGeneration", "gora"),
        ("BertForSequenceClassification", "gradients"),
        ("BertModel", "activations"),
    ],
)
def test_ranks_of_models_that_are_no_causal_ones(folders, tmp_path, capsys, name, by):
    rows = [{"text": text, "label": label} for label, text in enumerate(TEXTS)]
    data = write_lines(tmp_path / "a.jsonl", rows)
    capsys.readouterr()
    command = ["ranks", folders[name], "--by", by, "--data", data, "--rank", 4, "--json"]
    assert main([*map(str, command)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len({layer["rank"] for layer in record["layers"]}) > 1
    assert not any(layer["unreached"] for layer in record["layers"])
    base = getattr(transformers, name).from_pretrained(folders[name])
    get_peft_model(base, LoraConfig(**record["config"]))


def test_what_a_loss_lacks_is_one_line(folders, tmp_path, capfd):
    data = lines(tmp_path)
    for name, complaint in (
        ("BertModel", "BertModel has no loss of texts"),
        ("BertForSequenceClassification", "--data: "),
    ):
        given = ("ranks", folders[name], "--by", "gradients", "--data", data)
        refused(capfd, complaint, *given)
    bert = folders["BertForMaskedLM"]
    shutil.copytree(bert, tmp_path / "maskless")
    letters_tokenizer().save_pretrained(tmp_path / "maskless")
    with pytest.raises(CheckpointError, match="expected a tokenizer with a mask token"):
        batches(tmp_path / "maskless", data)
    for text, complaint in (
        ("[1]", 'an object with a "text"'),
        ('{"text": 3}', 'an object with a "text"'),
        ('{"text": "a", "target": 3}', 'an object with a "text"'),
        ("{", "expected JSON in UTF-8"),
    ):
        file = tmp_path / "bad.jsonl"
        file.write_text(text)
        with pytest.raises(CheckpointError, match=complaint):
            batches(bert, file)


def test_every_kind_of_transformers_own():
    for name, kind in {
        "BartForConditionalGeneration": "encoder-decoder",
        "GPT2LMHeadModel": "causal",
        "LlamaForCausalLM": "causal",
        "Qwen2_5_VLForConditionalGeneration": "causal",
        "ModernBertForMaskedLM": "masked",
        "LlamaForSequenceClassification": "classifier",
        "LlamaModel": None,
        "BertForTokenClassification": None,
    }.items():
        assert hasattr(transformers, name) and kind_of(name) == kind
