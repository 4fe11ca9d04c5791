"""Batches of texts for the model of a checkpoint, with the labels that its loss takes.

    causal language model      the tokens themselves
    masked language model      15 % of the tokens, which are masked in the input
    encoder and decoder        "target"; or the second half of a text, after the first one
    sequence classification    "label": the name or number of a class, or what is to be predicted
    anything else              none: it has no loss of texts

Each text is a batch of its own, so that none is padded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto as auto

from peftkern.formats.json_files import brief, parse_json
from peftkern.tools.checkpoints.architecture import model_class
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError

MASKED = 0.15  # of the tokens of a masked language model, as in BERT
_LEFT_OUT = -100  # label of a token that the loss leaves out
_MAPPINGS = {  # in this order: transformers lists BART among masked language models, too
    "encoder-decoder": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classifier": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
Batch = dict[str, Tensor]


def read_batches(
    checkpoint: Checkpoint, data: Path, most: int, length: int, *, loss: bool, seed: int = 0
) -> list[Batch]:
    """Return a batch of each of the first `most` texts of a file, as CorDA weighs them.

    Args: data, a file with a text on each line, or if its name ends in .jsonl an object: "text",
        and "target" or "label"; of each the first `length` tokens; loss, whether the model has to
        return one; seed, of what is masked.
    Raises: CheckpointError for a file without texts or the labels that are needed, a folder without
        a tokenizer, or a model that has no loss.
    """
    for name, value, low in (("texts", most, 1), ("length", length, 2)):
        if value < low:
            raise CheckpointError(f"{name}: expected at least {low}, got {value}")
    folder, architecture = checkpoint.folder, model_class(checkpoint).__name__
    kind = kind_of(architecture)
    if loss and kind is None:
        raise CheckpointError(
            f"{folder}: {architecture} has no loss of texts; `peftkern ranks FILE.py` and the "
            "functions of Python take one of your own"
        )
    records = _records(data)[:most]
    without = None if kind != "classifier" else next((r for r in records if "label" not in r), None)
    if loss and without is not None:
        raise CheckpointError(
            f"data: {data}: expected lines of JSON (.jsonl) with a text and a label, which "
            f"the loss of {architecture} takes, got {brief(without['text'])} alone"
        )
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: expected a tokenizer: {error}") from error
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise CheckpointError(
            f"{folder}: expected a tokenizer with a mask token for {architecture}"
        )
    config = AutoConfig.from_pretrained(folder, **options)
    generator = torch.Generator("cpu").manual_seed(seed)
    cut = {"return_tensors": "pt", "truncation": True, "max_length": length}
    batches = []
    for record in records:
        text, target = record["text"], record.get("target")
        if kind == "encoder-decoder" and target is None:
            text, target = _halves(text)
        batch = dict(tokenizer(text, **cut))
        tokens = batch["input_ids"]
        if tokens.shape[1] < 2:
            continue
        if kind == "causal":
            batch["labels"] = tokens
        elif kind == "masked":
            batch |= _masked(tokens, tokenizer, generator)
        elif kind == "encoder-decoder":
            batch["labels"] = tokenizer(text_target=target, **cut)["input_ids"]
        elif kind == "classifier" and "label" in record:
            batch["labels"] = _class(record["label"], config, data)
        batches.append(batch)
    if not batches:
        raise CheckpointError("data: expected texts of more than one token, got none")
    return batches


def kind_of(architecture: str) -> str | None:
    """Return which kind of model a class of transformers is, None for one without a loss."""
    for kind, mapping in _MAPPINGS.items():
        if architecture in mapping.values():
            return kind
    return "causal" if architecture.endswith("ForConditionalGeneration") else None  # of images, too


def _records(data: Path) -> list[dict[str, Any]]:
    """Read the texts of a file, with what else is known of each. Raises: CheckpointError."""
    try:
        lines = data.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"data: {data}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"data: {data}: expected text in UTF-8: {error}") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise CheckpointError(f"data: {data}: expected a text on each line, got none")
    if data.suffix != ".jsonl":
        return [{"text": line} for line in lines]
    return [_record(line, data) for line in lines]


def _record(line: str, data: Path) -> dict[str, Any]:
    try:
        found = parse_json(line.encode())
    except ValueError as error:
        raise CheckpointError(f"data: {data}: {error}") from None
    texts = [found.get("text"), found.get("target", "")] if isinstance(found, dict) else [None]
    if not all(isinstance(one, str) for one in texts):
        expected = 'an object with a "text", and a "target" if there is one'
        raise CheckpointError(f"data: {data}: expected {expected} on each line, got {brief(found)}")
    return found


def _halves(text: str) -> tuple[str, str]:
    """Cut a text in two, between words if there are some."""
    middle = text.find(" ", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return text[:middle], text[middle:].strip()


def _masked(tokens: Tensor, tokenizer: Any, generator: torch.Generator) -> Batch:
    """Mask some tokens [1, T], one at least; the labels of the others are left out."""
    special = tokenizer.get_special_tokens_mask(tokens[0].tolist(), already_has_special_tokens=True)
    own = (torch.tensor(special) == 0).nonzero()[:, 0]
    count = max(round(MASKED * len(own)), 1)
    chosen = own[torch.randperm(len(own), generator=generator)[:count]]
    labels = torch.full_like(tokens, _LEFT_OUT)
    labels[0, chosen] = tokens[0, chosen]
    return {"input_ids": tokens.index_fill(1, chosen, tokenizer.mask_token_id), "labels": labels}


def _class(label: Any, config: Any, data: Path) -> Tensor:
    """Return a label as the loss of a classifier takes it. Raises: CheckpointError."""
    named = {name: int(number) for number, name in config.id2label.items()}
    number = named.get(label) if isinstance(label, str) else label
    if config.num_labels == 1 and type(number) in (int, float):
        return torch.tensor([float(number)])
    if type(number) is int and 0 <= number < config.num_labels:
        return torch.tensor([number])
    names = ", ".join(map(repr, named))
    expected = "a number" if config.num_labels == 1 else f"one of {names}, or its number"
    raise CheckpointError(f"data: {data}: label: expected {expected}, got {brief(label)}")
