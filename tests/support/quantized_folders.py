"""Calls of what `peftkern quantize` calls, and tensors of many dtypes and odd sizes for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import save_tensors

from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.quantize import quantized_checkpoint
from peftkern.tools.quantize.file_plan import Choice, Options
from peftkern.tools.quantize.linear_weights import find_weights

CONFIG = {"quant_method": "bitsandbytes"}
SMALL = {
    "one.weight": (torch.randn(24, 40) * 0.1).bfloat16(),
    "one.bias": torch.randn(7),
    "two.weight": torch.randn(5, 13),
    "norm": torch.randn(3).half(),
    "steps": torch.arange(5),
    "mask": torch.tensor([True, False, True]),
    "three.weight": torch.randn(33, 65).half(),
}
SMALL_LINEAR = {"one.weight": False, "two.weight": False, "three.weight": True}
# Of at most 1500 bytes: "one.weight" alone, "three.weight" alone, and the rest.
FILES_OF_SMALL = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def save_small(folder: Path) -> Path:
    """In two shards."""
    names = list(SMALL)
    shards = {
        "model-00001-of-00002.safetensors": {name: SMALL[name] for name in names[:3]},
        "model-00002-of-00002.safetensors": {name: SMALL[name] for name in names[3:]},
    }
    save_tensors(folder, shards)
    (folder / "config.json").write_text('{"model_type": "none", "limit": [0.0, Infinity]}')
    return folder


def convert(source: Path, destination: Path, **options: Any) -> quantized_checkpoint.Summary:
    """As the command does it."""
    checkpoint = read_checkpoint(source)
    mine = {k: options.pop(k) for k in ("skip", "compute_dtype", "stack") if k in options}
    given = {"format": "nf4", "blocksize": None, **options}
    chosen = Options.of(given.pop("format"), given.pop("blocksize"), **given)
    mine |= {"format": chosen.format, "blocksize": chosen.blocksize}
    found = find_weights(checkpoint, double_quant=chosen.double_quant, **mine)
    parts = (checkpoint, destination, *found, chosen)
    return quantized_checkpoint.quantize_checkpoint(*parts)


def convert_small(source: Path, destination: Path, **options: Any) -> quantized_checkpoint.Summary:
    """Whose layers are told."""
    how = {name: options.pop(name) for name in ("force", "progress") if name in options}
    linear, checkpoint = options.pop("linear", SMALL_LINEAR), read_checkpoint(source)
    choice = Choice(linear)
    parts = (checkpoint, destination, choice, CONFIG, Options(**options))
    return quantized_checkpoint.quantize_checkpoint(*parts, **how)


def refused(words: str, *folders: Path, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=words):
        convert_small(*folders, **options)


def stopped(calls: int, *folders: Path, error: Any = KeyboardInterrupt, **options: Any) -> None:
    """Ctrl-C, or that error, at a piece of work."""
    numbers = itertools.count()

    def progress(count: int, name: str) -> None:
        if next(numbers) == calls:
            raise error

    with pytest.raises(error):
        convert_small(*folders, progress=progress, **options)
