"""Merging of adapters into a checkpoint, from folder to folder.

All but the sums is checked before anything is written. Files are written one after the other, each
panel by panel, into a work folder inside of the destination; a manifest notes what is on the disk.
A stopped run, however it ended, goes on with the first file that is not noted, or was changed
since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peftkern.tools.adapters import Adapter, Update, write_adapter
from peftkern.tools.adapters.adapter import named_tensors
from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.checkpoint import CONFIG, INDEX, Checkpoint, CheckpointError
from peftkern.tools.merge.arithmetic import Change
from peftkern.tools.merge.plan import Options, index_of
from peftkern.tools.merge.request import Adapters, Plan, plan_merge
from peftkern.tools.merge.writer import Progress, Written, write_file

MANIFEST = "manifest.json"  # in the work folder: a note of each finished file
RESIDUAL = "residual_adapter"  # in the destination
_RESIDUALS = "residuals"  # in the work folder: those of each finished file


@dataclass(frozen=True)
class Summary:
    """Summary of a merge. changes: of each merged weight, by the name in the base; others: of those
    that are in other 4 bits than before, and not merged. resumed: number of files that an earlier
    run had written."""

    plan: Plan
    resumed: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    others: dict[str, Change] = field(default_factory=dict)

    @property
    def total(self) -> Change:
        return sum((change.scaled for change in self.changes.values()), Change())

    @property
    def total_of_others(self) -> Change:
        return sum((change.scaled for change in self.others.values()), Change())


def merge_checkpoint(
    checkpoint: Checkpoint,
    adapters: Adapters,
    destination: str | os.PathLike,
    options: Options,
    *,
    force: bool = False,
    progress: Progress = lambda count, name: None,
) -> Summary:
    """Write `checkpoint`, with adapters merged into it, to the folder `destination`.

    What no adapter changes is copied byte for byte, and so are the files beside the weights.
    Weights have the bits of PEFT's merge_and_unload where one adapter is merged; where that is
    wrong they are right: an adapter of one of two tied embeddings leaves the other alone, and a
    bias of lora_B is scaled over a base in 4 bits, too.

    Memory: the adapters, and for each thread a panel of rows; the whole of a weight that is, will
    be or was in 4 bits (of a stack of experts one), that an adapter replaces, wholly or in some
    rows, that is a convolution's, or whose DoRA normalizes columns; two tied tables that are both
    stored. Calling it again after an interruption resumes; KeyboardInterrupt and OSError leave a
    state that allows it, a CheckpointError leaves nothing.

    Args:
        checkpoint: of `read_checkpoint`, quantized=True for a base in 4 bits.
        adapters: with a weight each, by which the update is multiplied.
        force: replace the checkpoint that `destination` holds, once the new one is complete.
        progress: called with (bytes of the base, tensor name) after each piece of work.
    Raises: CheckpointError for a request that cannot be met.
    """
    destination = Path(destination)
    plan = plan_merge(checkpoint, adapters, options)
    check_destination(checkpoint, destination, plan, force)
    identity = _identity(checkpoint, adapters, options)
    with staging.work_folder(destination, identity, force) as work:
        summary = _write(work, plan, options, progress)
        if _identity(checkpoint, adapters, options) != identity:
            raise CheckpointError(f"{checkpoint.folder}: changed while it was read")
        files = work / staging.FILES
        staging.copy_files(checkpoint.folder, files, plan.companions.copied)
        if options.residual:
            _write_residual(work, plan, destination)
        staging.replace_json(files / CONFIG, plan.config)
        staging.publish(work, destination, {file.name for file in plan.files})
    return summary


def check_destination(checkpoint: Checkpoint, destination: Path, plan: Plan, force: bool) -> None:
    """Raise CheckpointError if the destination is unfit for what is planned."""
    staging.check_destination(checkpoint.folder, destination, force, plan.companions.copied)
    staging.check_space(destination, plan.nbytes, [file.name for file in plan.files])


def _identity(checkpoint: Checkpoint, adapters: Adapters, options: Options) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes."""
    return {
        "source": staging.fingerprint(checkpoint),
        "set of adapters": [[_digest(adapter), weight] for adapter, weight in adapters],
        **asdict(options),
    }


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256(json.dumps(adapter.config, sort_keys=True).encode())
    for key, update in adapter.updates.items():  # the scaling may come from elsewhere
        digest.update(f"{key} {update.kind} {update.scaling!r} {update.shape}".encode())
    for name, tensor in named_tensors(adapter):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(work: Path, plan: Plan, options: Options, progress: Progress) -> Summary:
    """Write all files and their index, and note them.

    What a stopped run has noted may have been moved to the destination already.
    """
    folder, residuals, notes = work / staging.FILES, work / _RESIDUALS, _read_manifest(work)
    folder.mkdir(exist_ok=True)
    residuals.mkdir(exist_ok=True)
    staging.clear_folder(folder, keep={file.name for file in plan.files})
    changes: dict[str, Change] = {}
    resumed = 0
    for file in plan.files:
        path, note = folder / file.name, notes.get(file.name)
        places = (path, work.parent / file.name) if note else ()
        if any(_state(place) == note["state"] for place in places):
            resumed += 1
            progress(sum(i.nbytes for unit in file.units for i in unit.infos), file.name)
        else:
            path.unlink(missing_ok=True)
            written = write_file(path, file, options, progress)
            _save_residuals(residuals / file.name, written)
            note = {"state": _state(path), "changes": written.changes}
            notes[file.name] = note
            staging.replace_json(work / MANIFEST, notes)
        changes |= {name: Change(*values) for name, values in note["changes"].items()}
    if (index := index_of(plan.files)) is not None:
        staging.replace_json(folder / INDEX, index)
    merged = {unit.name for file in plan.files for unit in file.units if unit.edits}
    others = {name: changes.pop(name) for name in [*changes] if name not in merged}
    return Summary(plan, resumed, changes, others)


def _read_manifest(work: Path) -> dict[str, Any]:
    """Return the notes that have the form of one."""
    value = staging.try_json(work / MANIFEST)
    notes = {}
    for name, note in value.items() if isinstance(value, dict) else ():
        match note:
            case {"state": [int(), int()], "changes": dict(changes)} if all(
                isinstance(values, list)
                and len(values) == len(Change())
                and all(type(one) in (int, float) for one in values)
                for values in changes.values()
            ):
                notes[name] = note
    return notes


def _state(path: Path) -> list[int] | None:
    """Return what changes when somebody writes to a file; moving it leaves it the same."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _save_residuals(path: Path, written: Written) -> None:
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, residual in written.residuals.items()
        for part, tensor in residual._asdict().items()
    }
    if tensors:
        staging.save_tensors(tensors, path, {"format": "pt"})


def _write_residual(work: Path, plan: Plan, destination: Path) -> None:
    """Write an adapter of PEFT's for what 4 bits have lost of all weights."""
    updates = {}
    for file in plan.files:
        path = work / _RESIDUALS / file.name
        tensors = load_file(path) if path.exists() else {}
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            (place, *_) = plan.places.by_tensor[name]
            module = place.parameter.removesuffix(".weight")
            A, B = (tensors[f"{name}.{part}"] for part in ("lora_A", "lora_B"))
            updates[module] = Update(module, "weight", "linear", A, B, scaling=1.0)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(destination),
        "target_modules": sorted(updates),
    }
    target = work / staging.FILES / RESIDUAL
    shutil.rmtree(target, ignore_errors=True)
    write_adapter(Adapter(config, updates, source=str(destination)), target)
