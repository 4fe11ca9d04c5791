"""Writer of adapters: a folder that PEFT, vLLM and diffusers read alike.

Scalings are folded into lora_B, so that lora_alpha = r, alpha_pattern = rank_pattern and scaling is
exactly 1 for every reader, also for those that look at lora_alpha and r alone. The fold rounds B
once, or not at all where the scaling is a power of two.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peftkern.formats.rank_patterns import rank_fields
from peftkern.tools import destinations
from peftkern.tools.adapters import peft_keys
from peftkern.tools.adapters.adapter import (
    Adapter,
    AdapterError,
    Update,
    changed_base,
    check_finite,
    not_finite,
)
from peftkern.tools.adapters.experts import settled
from peftkern.tools.adapters.scaling import scale_of
from peftkern.tools.adapters.source import CONFIG, MODEL, NAMES
from peftkern.tools.adapters.targets import target_name
from peftkern.tools.checkpoints.staging import sync_file

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fields of AdaLoRA's config that LoRA's has not.
_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")
_ADALORA += ("orth_reg_weight",)
_OWN = {CONFIG, *NAMES}  # files that give way to those of an adapter


class Files(NamedTuple):
    """What an adapter's folder holds."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]
    config: Mapping[str, Any] | None


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Write an adapter as PEFT's folder, whole or not at all, with every scaling folded to 1.

    AdaLoRA becomes LoRA; modules of rank 0 are left out.

    Args:
        dtype: of the factors, float32, bfloat16 or float16. None: as they are where folding the
            scaling rounds nothing (a power of two), else float32.
        force: replace the adapter in the folder; other files there are left alone.
    Raises: AdapterError naming the folder or the tensor: a folder that holds something, NaN or
        infinity, factors beyond the dtype, other ranks for a base that PEFT would change anew.
    """
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise AdapterError(f"dtype: expected one of {DTYPES}, got {dtype}")
    check_destination(path, force)
    check_finite(adapter)
    folded = fold(adapter, dtype)
    tensors = file_tensors(folded)
    for name, tensor in tensors.items():
        if not_finite(tensor):
            raise AdapterError(f"{adapter.source}: {name}: beyond {tensor.dtype}")
    publish(path, Files(MODEL, tensors, {"format": "pt"}, folded.config))


def fold(adapter: Adapter, dtype: torch.dtype | None = None) -> Adapter:
    """Return the adapter with every scaling 1 and a config that says so.

    Raises: AdapterError where ranks changed and PEFT would change the base anew by them.
    """
    kept = adapter.with_updates(one for one in adapter.updates.values() if one.rank)
    config = _config(kept)
    if (init := changed_base(config)) and _ranks(adapter.config, kept) != _ranks(config, kept):
        raise AdapterError(
            f"{adapter.source}: init_lora_weights: PEFT computes the base of {init} from the rank, "
            "which is another now"
        )
    return replace(
        kept, config=config, updates={k: _fold(u, dtype) for k, u in kept.updates.items()}
    )


def _fold(update: Update, dtype: torch.dtype | None) -> Update:
    A, B, bias, scaling = update.lora_A, update.lora_B, update.bias, update.scaling
    exact = B.double() * scaling
    if dtype is None:
        power = abs(math.frexp(scaling)[0]) == 0.5
        same = power and torch.equal(exact.to(B.dtype).double(), exact)  # unless it underflows
        B = exact.to(B.dtype if same else torch.promote_types(B.dtype, torch.float32))
    else:
        A, B = A.to(dtype), exact.to(dtype)
    if bias is not None:
        bias = (bias.double() * scaling).to(torch.promote_types(bias.dtype, B.dtype))
    return replace(update, lora_A=A, lora_B=B, bias=bias, scaling=1.0)


def _config(adapter: Adapter) -> dict[str, Any]:
    """Return a config of LoRA that has each module's rank as it is and a scaling of 1."""
    config = dict(adapter.config)
    if config["peft_type"] == "ADALORA":
        config = {key: value for key, value in config.items() if key not in _ADALORA}
        config["peft_type"] = "LORA"
    if any(update.kind == "experts" for update in adapter.updates.values()):
        config |= settled(config)
    ranks = {_target(adapter, update): update.rank for update in adapter.updates.values()}
    return config | rank_fields(ranks)


def _target(adapter: Adapter, update: Update) -> str:
    return target_name(adapter.config, update.module, update.parameter)


def _ranks(config: Mapping[str, Any], adapter: Adapter) -> list[int | None]:
    names = [_target(adapter, update) for update in adapter.updates.values()]
    return [scale_of(config, name, adapter.source).rank for name in names]


def file_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of PEFT's file."""
    parameters: dict[str, list[str]] = {}
    for one in adapter.updates.values():
        parameters.setdefault(one.module, []).append(one.parameter)
    named = [pair for one in adapter.updates.values() for pair in peft_keys.named(one, parameters)]
    return dict([*named, *adapter.extras.items()])


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor with memory of its own."""
    tensor = tensor.detach().cpu().contiguous()
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if shared else tensor


def check_destination(path: Path, force: bool, *sources: str | os.PathLike | None) -> None:
    """Raise AdapterError unless a folder is none of the sources, where there are any, and new,
    empty or, with `force`, an adapter's."""
    destinations.check_apart(path, AdapterError, *sources, within=True)
    held = destinations.held(path, AdapterError)
    if held and not force:
        raise AdapterError(
            f"{path}: expected a new or empty folder, it holds {held[0]!r} "
            "(--force replaces the adapter in it)"
        )
    if held and not _OWN & set(held):
        raise AdapterError(f"{path}: --force replaces an adapter, and this folder holds none")


def publish(path: Path, files: Files) -> None:
    """Write an adapter's files to a folder beside the destination, which takes its place.

    Where other files are there, those of an adapter are replaced, the config last: without it
    nothing loads.
    """
    path = Path(os.path.realpath(path))  # "." has no name, and what a link names takes the place
    work = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        (work / files.name).touch()
        mode = (work / files.name).stat().st_mode  # safetensors writes for the owner alone
        tensors = {name: _own(tensor) for name, tensor in files.tensors.items()}
        save_file(tensors, work / files.name, metadata=files.metadata)
        (work / files.name).chmod(mode)
        if files.config is not None:
            text = json.dumps(files.config, indent=2, sort_keys=True) + "\n"
            (work / CONFIG).write_text(text, encoding="utf-8")
        written = sorted(work.iterdir(), key=lambda file: file.name == CONFIG)
        for file in written:
            sync_file(file)
        if path.is_dir() and any(path.iterdir()):
            (path / CONFIG).unlink(missing_ok=True)
            for name in _OWN - {file.name for file in written}:
                (path / name).unlink(missing_ok=True)
            for file in written:
                os.replace(file, path / file.name)
        else:
            os.replace(work, path)
    except SafetensorError as error:  # its own for those of the system
        raise OSError(f"{path}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
