"""Initialization of a checkpoint's adapters from texts, which run through the whole model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from peftkern.integrations.peft.initialize import initialize_
from peftkern.methods.initialization.report import InitReport
from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.architecture import model_class
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.companions import Companions, find_companions
from peftkern.tools.checkpoints.decoded import DecodedInfo
from peftkern.tools.initialize.request import Request, find_targets, keeps_transposed
from peftkern.tools.initialize.starts import ADAPTER
from peftkern.tools.initialize.texts import read_batches


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
            with warnings.catch_warnings():
                # PEFT looks for the vocabulary of a base that is not there yet
                warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
                report.model.save_pretrained(files / ADAPTER)
            # What loading does to bitsandbytes' 4 bits transformers has no way back from.
            back = getattr(model, "quantization_method", None) != "bitsandbytes"
            how = {"max_shard_size": self.shard_bytes, "save_original_format": back}
            report.model.unload().save_pretrained(files, **how)
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

    Args: checkpoint, dense, or `decoded`, whose model is loaded as it is stored; data, a file of
        texts as `read_batches` takes it, of which the first `most` are taken, and of each the first
        `length` tokens.
    Raises: CheckpointError for what cannot be done.
    """
    _check_saved(checkpoint, request.method)
    half = request.method == "lora_ga"
    how = {"half": half, "method": request.method}
    targets, config = find_targets(checkpoint, names, request.rank_of, **how)
    config.fan_in_fan_out = keeps_transposed(checkpoint, targets)
    companions = find_companions(checkpoint)
    destination = Path(destination)
    staging.check_destination(checkpoint.folder, destination, force, companions.copied)
    config = request.complete(config)
    loss = request.method == "lora_ga"
    batches = read_batches(checkpoint, data, most, length, loss=loss, seed=request.seed)
    parts = (companions, batches, shard_bytes, device)
    return TextJob(checkpoint, destination, request, config, *parts)


def _check_saved(checkpoint: Checkpoint, method: str) -> None:
    """Raise CheckpointError for a model that transformers loads and cannot save."""
    for info in checkpoint.tensors.values():
        stack = isinstance(info, DecodedInfo) and info.weight.stack
        if stack and info.weight.four_bit.format == "mxfp4":
            raise CheckpointError(
                f"{checkpoint.folder}: {info.name}: {method} loads the whole model and saves it, "
                "and experts in MXFP4 transformers does not save; expected dense ones, or in NF4"
            )


def load_model(checkpoint: Checkpoint, device: str) -> Any:
    """Load the model that config.json names. Raises: CheckpointError where that fails."""
    folder, kind = checkpoint.folder, model_class(checkpoint)
    try:
        model = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no {kind.__name__} can be loaded: {error}") from error
    return model.to(device)
