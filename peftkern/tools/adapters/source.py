"""Untrusted files of adapters: opened, checked, read whole. What the tensors mean is for READERS.

Pickles are never opened. safetensors reads the tensors, not through a map, so that a file that
shrinks is an error, not a signal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.tools.adapters.adapter import AdapterError
from peftkern.tools.checkpoints.checkpoint import (
    READ_ERRORS,
    CheckpointError,
    folder_file,
    json_object,
    open_safetensors,
    read_header,
)

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
# What a folder's file of weights is called: by PEFT, mlx-lm, diffusers.
NAMES = (MODEL, "adapters.safetensors", "pytorch_lora_weights.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """One file of tensors, the metadata in its header, and the config beside it, if any."""

    path: Path
    config: dict[str, Any] | None
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def open_source(path: str | os.PathLike) -> Source:
    """Read an adapter's folder, or a safetensors file by itself.

    Raises: AdapterError naming the file: none there, a pickle, damaged or cut off, a name twice or
        one that cannot be printed, a dtype that is not known, a config that is no JSON object.
    """
    path = Path(path)
    try:
        file = folder_file(path, _weights(path)) if path.is_dir() else _plain(path)
        metadata, config = read_header(file).metadata, None
        if os.path.lexists(file.parent / CONFIG):
            config = json_object(folder_file(file.parent, CONFIG))
    except (CheckpointError, OSError) as error:
        raise AdapterError(str(error)) from None
    try:
        with open_safetensors(file) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    except READ_ERRORS as error:
        raise AdapterError(f"{file}: changed while it was read: {error}") from None
    if not tensors:
        raise AdapterError(f"{file}: holds no tensors")
    return Source(file, config, metadata, tensors)


def _weights(folder: Path) -> str:
    """Return the name of the file of weights in a folder."""
    present = sorted(path.name for path in folder.iterdir())
    for name in NAMES:
        if name in present:
            return name
    pickles = [name for name in present if name.lower().endswith(_PICKLES)]
    if pickles:
        raise AdapterError(f"{folder / pickles[0]}: {_pickled()}")
    came = f"one with {brief(present[0])}" if present else "an empty one"
    raise AdapterError(f"{folder}: expected a folder with {MODEL}, got {came}")


def _plain(path: Path) -> Path:
    if not path.is_file():
        kind = "a pipe, socket or device" if path.exists() else "nothing"
        raise AdapterError(
            f"{path}: expected an adapter's folder or a safetensors file, got {kind}"
        )
    if path.name.lower().endswith(_PICKLES):
        raise AdapterError(f"{path}: {_pickled()}")
    return path


def _pickled() -> str:
    return (
        "a pickle, which runs code when it is read: load it where you trust it and "
        "save_pretrained() it as safetensors"
    )
