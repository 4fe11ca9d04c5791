"""Initialization of a checkpoint's adapters from texts, which run through the whole model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftkern.integrations.peft.initialize import initialize_
from peftkern.methods.initialization.report import InitReport
from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.companions import Companions, find_companions
from peftkern.tools.initialize.request import Request, find_targets
from peftkern.tools.initialize.starts import ADAPTER


@dataclass(frozen=True)
class TextJob:
    """A checked request of a method that learns from texts. Memory: the model, and statistics."""

    checkpoint: Checkpoint
    destination: Path
    request: Request
    config: LoraConfig
    companions: Companions
    batches: list[dict[str, Any]]
    shard_bytes: int
    device: str

    def run(self, force: bool) -> InitReport:
        """Write the new base, and the adapter in its folder `adapter`.

        Raises: CheckpointError for a model or texts that the method cannot start from.
        """
        request, folder = self.request, self.checkpoint.folder
        model = load_model(self.checkpoint, self.device)
        try:
            report = initialize_(
                model, request.method, self.config, batches=self.batches, **request.svd_options
            )
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        identity = {**request.identity(), "source": str(folder)}
        with staging.work_folder(self.destination, identity, force) as work:
            files = work / staging.FILES
            staging.clear_folder(work, keep=("lock", "run.json"))
            files.mkdir()
            staging.copy_files(folder, files, self.companions.copied)
            base = os.path.abspath(self.destination)
            report.model.peft_config["default"].base_model_name_or_path = base
            report.model.save_pretrained(files / ADAPTER)
            report.model.unload().save_pretrained(files, max_shard_size=self.shard_bytes)
            staging.publish(work, self.destination, [p.name for p in files.glob("*.safetensors")])
        return report


def prepare(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    request: Request,
    data: Path,
    names: Sequence[str] | str = (),
    *,
    most: int = 64,
    length: int = 1024,
    shard_bytes: int = 5 * 10**9,
    device: str = "cpu",
    force: bool = False,
) -> TextJob:
    """Check a request of "corda", "eva" or "lora_ga".

    Args: data, a file with a text on each line, of which the first `most` are taken, and of each
        the first `length` tokens.
    Raises: CheckpointError for what cannot be done.
    """
    half = request.method == "lora_ga"
    how = {"half": half, "method": request.method}
    _, config = find_targets(checkpoint, names, request.rank_of, **how)
    companions = find_companions(checkpoint)
    destination = Path(destination)
    staging.check_destination(checkpoint.folder, destination, force, companions.copied)
    config = request.complete(config)
    batches = read_batches(checkpoint.folder, data, most, length)
    parts = (companions, batches, shard_bytes, device)
    return TextJob(checkpoint, destination, request, config, *parts)


def load_model(checkpoint: Checkpoint, device: str) -> Any:
    """Load a language model. Raises: CheckpointError if it is none."""
    options = {"local_files_only": True, "trust_remote_code": False, "dtype": "auto"}
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options)
    except (ValueError, KeyError) as error:
        folder = checkpoint.folder
        raise CheckpointError(f"{folder}: expected a language model: {error}") from error
    return model.to(device)


def read_batches(folder: Path, data: Path, most: int, length: int) -> list[dict[str, Any]]:
    """Return a batch of each of the first `most` lines of a file, as CorDA weighs them.

    Raises: CheckpointError for a file without texts, or a folder without a tokenizer.
    """
    for name, value, low in (("texts", most, 1), ("length", length, 2)):
        if value < low:
            raise CheckpointError(f"{name}: expected at least {low}, got {value}")
    try:
        lines = data.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"data: {data}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"data: {data}: expected text in UTF-8: {error}") from None
    texts = [line for line in lines if line.strip()][:most]
    if not texts:
        raise CheckpointError(f"data: {data}: expected a text on each line, got none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: expected a tokenizer: {error}") from error
    batches = []
    for text in texts:
        found = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
        if found["input_ids"].shape[1] > 1:
            batches.append({**found, "labels": found["input_ids"]})
    if not batches:
        raise CheckpointError("data: expected texts of more than one token, got none")
    return batches
