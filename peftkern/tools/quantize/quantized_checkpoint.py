"""Writer of checkpoints in a 4-bit format, one file at a time: kernels/FORMATS.md.

safetensors writes each file, which is read back and noted in a manifest with a digest of its
content. Until all is done everything lies in a work folder inside of the destination. A stopped
run, however it ended, resumes with the first file whose content is not that of the manifest, and
ends with the same files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional import dequantize
from peftkern.tools.checkpoints import four_bit, staging
from peftkern.tools.checkpoints.checkpoint import (
    CONFIG,
    DTYPES,
    INDEX,
    READ_ERRORS,
    Checkpoint,
    CheckpointError,
    open_safetensors,
)
from peftkern.tools.checkpoints.companions import find_companions
from peftkern.tools.quantize.file_plan import Choice, Options, Plan, Size, Unit, plan_files

MANIFEST = "manifest.json"  # in the work folder: a Note of each finished file
_METADATA = {"format": "pt"}
_ERROR_CHUNK = 1 << 18  # number of values per comparison with the source
Progress = Callable[[int, str], None]  # finished bytes of the source, and the tensor


@dataclass(frozen=True)
class Summary:
    """Summary of the output. An error is |w - w_4bit| / |w| (2-norms). resumed: number of tensors
    that an earlier run had written. copied, left: paths below the source of the files beside its
    weights, `left` those that are not in the copy."""

    plan: Plan
    copied: tuple[str, ...]
    left: tuple[str, ...]
    resumed: int = 0
    largest_error: float = 0.0
    largest_error_name: str = ""


class Note(NamedTuple):
    """Note on a finished file: its digest, the largest error of its weights, and whose it is."""

    digest: str
    error: float
    name: str


class Rewriter(Protocol):
    """Change of some weights on the way; what it finds is written, too.

    identity: what a run must have in common with one that it resumes. nbytes: of what it adds.
    """

    identity: dict[str, Any]
    nbytes: int

    def rewrite(
        self, unit: Unit, weight: Tensor
    ) -> tuple[QuantizedWeight | Tensor, float | None] | None:
        """Return what becomes of a weight, and its error if that is known; None of others.

        That of several tensors has their rows one after the other; of a stack it is each expert's
        in turn, as it is to be stored.
        """

    def keep(self, work: Path, file: str) -> None:
        """Store what was found while a file was written, before the file counts as finished."""

    def complete(self, work: Path, folder: Path) -> None:
        """Add files to the folder, when all others are there."""


def quantize_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    choice: Choice,
    quantization_config: Mapping[str, Any] | None,
    options: Options,
    *,
    force: bool = False,
    progress: Progress = lambda count, name: None,
    rewriter: Rewriter | None = None,
) -> Summary:
    """Write `checkpoint` to the folder `destination` with some of its weights in 4 bits.

    The files beside the weights are copied, but for weights in other formats: `find_companions`.

    Memory: about one file of the output and one tensor of the source, of a stack one expert.
    Calling it again after an interruption resumes; KeyboardInterrupt and OSError (a full disk)
    leave a state that allows it, a CheckpointError leaves nothing.

    Args:
        choice: the weights to quantize, float32, float16 or bfloat16. Linear layers have
            bitsandbytes' keys, or in other formats `BlockLinear`'s, a stack of experts, which is
            in NF4 or MXFP4, those of the model's parameter, whatever the source calls them.
        quantization_config: for config.json, as `linear_weights.find_weights` has it; None if
            nothing is quantized.
        force: replace the checkpoint that `destination` holds, once the new one is complete, and
            discard an unfinished run with other options. Other files there are left alone.
        progress: called with (bytes of the source, tensor name) after each piece of work.
        rewriter: changes weights before they are quantized or kept.
    Raises: CheckpointError for a request that cannot be met.
    """
    destination = Path(destination)
    plan = plan_files(checkpoint, choice, options)
    identity = _identity(checkpoint, choice, quantization_config, options, rewriter)
    summary = check_request(checkpoint, destination, plan, force, rewriter)
    with staging.work_folder(destination, identity, force) as work:
        notes = _read_manifest(work)
        resumed = _write(work, plan, notes, options, progress, rewriter)
        if _identity(checkpoint, choice, quantization_config, options, rewriter) != identity:
            raise CheckpointError(f"{checkpoint.folder}: changed while it was read")
        staging.copy_files(checkpoint.folder, work / staging.FILES, summary.copied)
        config = dict(checkpoint.config)
        if quantization_config is not None:
            config["quantization_config"] = dict(quantization_config)
        if rewriter is not None:
            rewriter.complete(work, work / staging.FILES)
        staging.replace_json(work / staging.FILES / CONFIG, config)
        staging.publish(work, destination, plan.files)
    error, name = max(((note.error, note.name) for note in notes.values()), default=(0.0, ""))
    return replace(summary, resumed=resumed, largest_error=error, largest_error_name=name)


def check_request(
    checkpoint: Checkpoint,
    destination: Path | None,
    plan: Plan,
    force: bool,
    rewriter: Rewriter | None = None,
) -> Summary:
    """Describe what would be written. Raises: CheckpointError if the destination is unfit for it.

    Without a destination that alone is not known.
    """
    companions = find_companions(checkpoint)
    if destination is not None:
        staging.check_destination(checkpoint.folder, destination, force, companions.copied)
        added = 0 if rewriter is None else rewriter.nbytes
        needed = plan.total.bytes_after + companions.nbytes + added
        staging.check_space(destination, needed, plan.files)
    return Summary(plan, companions.copied, companions.left)


def _identity(
    checkpoint: Checkpoint,
    choice: Choice,
    quantization_config: Mapping[str, Any] | None,
    options: Options,
    rewriter: Rewriter | None,
) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes."""
    return {
        "source": staging.fingerprint(checkpoint),
        **asdict(options),
        "choice of tensors": [sorted(choice.linear.items()), sorted(choice.stacks.items())],
        "quantization_config": dict(quantization_config or {}),
        **(rewriter.identity if rewriter is not None else {}),
    }


def _read_manifest(work: Path) -> dict[str, Note]:
    value = staging.try_json(work / MANIFEST)
    notes = {}
    for file, note in value.items() if isinstance(value, dict) else ():
        match note:
            case [str(), float(error), str()] if 0 <= error < 1:
                notes[file] = Note(*note)
    return notes


def _write(
    work: Path,
    plan: Plan,
    notes: dict[str, Note],
    options: Options,
    progress: Progress,
    rewriter: Rewriter | None,
) -> int:
    """Write all files and their index, and note them; return how many tensors were there.

    What a stopped run has noted may have been moved to the destination already.
    """
    folder, resumed = work / staging.FILES, 0
    folder.mkdir(exist_ok=True)
    staging.clear_folder(folder, keep=plan.files)  # of what a stopped run had begun or copied
    weight_map: dict[str, str] = {}
    for name, units in plan.files.items():
        places = (folder / name, work.parent / name) if name in notes else ()
        path = next((p for p in places if _digest_file(p) == notes[name].digest), None)
        if path != folder / name:
            (folder / name).unlink(missing_ok=True)
        if path is not None:
            resumed += Size.of(units).tensors
            progress(sum(unit.nbytes_before for unit in units), name)
        else:
            path = folder / name
            notes[name] = _write_file(path, units, options, progress, rewriter)
            if rewriter is not None:
                rewriter.keep(work, name)
            staging.replace_json(work / MANIFEST, notes)
        with open_safetensors(path) as file:
            weight_map.update(dict.fromkeys(file.offset_keys(), name))
    if len(plan.files) > 1:
        metadata = {"total_size": plan.total.bytes_after}
        staging.replace_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    return resumed


def _write_file(
    path: Path,
    units: list[Unit],
    options: Options,
    progress: Progress,
    rewriter: Rewriter | None,
) -> Note:
    """Write one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    largest = (0.0, "")
    for unit in units:
        state, error = (_stacked if unit.shape else _one)(unit, options, rewriter)
        tensors |= state
        if error is not None:
            largest = max(largest, (error, unit.name))
        progress(unit.nbytes_before, unit.name)
    temporary = path.with_name(path.name + ".new")
    staging.save_tensors(tensors, temporary, _METADATA)
    digest = _digest(_METADATA, sorted(tensors.items()))
    if _digest_file(temporary) != digest:
        raise OSError(f"{path}: what was written reads back differently: a faulty disk?")
    os.replace(temporary, path)
    return Note(digest, *largest)


def _digest_file(path: Path) -> str | None:
    """Return the digest of a file's content, None for a file that is damaged or missing."""
    try:
        with open_safetensors(path) as file:
            names = sorted(file.keys())
            return _digest(file.metadata(), ((name, file.get_tensor(name)) for name in names))
    except READ_ERRORS:
        return None


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(str(metadata).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _one(
    unit: Unit, options: Options, rewriter: Rewriter | None
) -> tuple[dict[str, Tensor], float | None]:
    """Return the tensors that a weight becomes, and its error unless it is kept as it is."""
    names, kept = [info.name for info in unit.infos], [info.read() for info in unit.infos]
    weight = kept[0] if len(kept) == 1 else torch.cat(kept)
    if unit.quantized:
        weight = weight.to(options.device)
        weight = weight.T.contiguous() if unit.transposed else weight
    rewritten = None if rewriter is None else rewriter.rewrite(unit, weight)
    if rewritten is not None:
        weight, error = rewritten
    elif unit.quantized:
        w = options.four_bit.quantize(weight)
        weight, error = w, _relative_error(unit.name, weight, dequantize(w))
    else:
        return dict(zip(names, kept, strict=True)), None
    if unit.quantized:
        state = four_bit.state(unit.name, weight)
    else:
        state = dict(zip(names, weight.split([len(part) for part in kept]), strict=True))
    return {key: tensor.cpu() for key, tensor in state.items()}, error


def _stacked(
    unit: Unit, options: Options, rewriter: Rewriter | None
) -> tuple[dict[str, Tensor], float]:
    """Return the two tensors that a stack of experts becomes, and the largest error of one."""
    count, *shape = unit.shape
    dtype, how = DTYPES[unit.infos[0].dtype], {"turned": unit.turned, "device": options.device}
    stack = options.four_bit.stack(unit.shape, dtype, **how)
    pieces = max(len(unit.infos) // count, 1)  # of an expert
    fused = len(unit.infos[0].shape) == 3
    parts = unit.infos[0].items() if fused else (info.read() for info in unit.infos)
    error = 0.0
    for expert in range(count):
        weight = torch.cat(list(islice(parts, pieces))).to(options.device)
        weight = weight.T.contiguous() if unit.transposed else weight.view(shape)
        rewritten = None if rewriter is None else rewriter.rewrite(unit, weight)
        if rewritten is not None:
            w, missed = rewritten
            stack.put_expert(expert, w)
        else:
            stack.set_expert(expert, weight)
            now = stack.dequantize(expert).contiguous()  # of one that is turned, too
            missed = _relative_error(unit.name, weight, now)
        error = max(error, missed)
    return {key: part.cpu() for key, part in stack.state(unit.name).items()}, error


def _relative_error(name: str, weight: Tensor, dense: Tensor) -> float:
    """Return |w - w_4bit| / |w|, by pieces: float32 of all would be the largest of all tensors.

    Around 0.1; zeros alone have 1, so that more is a defect, not rounding.
    """
    difference = norm = 0.0
    pieces = (tensor.view(-1).split(_ERROR_CHUNK) for tensor in (weight, dense))
    for piece, approximation in zip(*pieces, strict=True):
        piece = piece.float()
        errors = piece - approximation.float()
        difference += torch.linalg.vector_norm(errors, dtype=torch.float64).item() ** 2
        norm += torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2
    if not math.isfinite(norm):
        raise CheckpointError(f"{name}: holds NaN or infinity, which 4 bits cannot hold")
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    if not error < 1:
        raise RuntimeError(f"{name}: quantized with a relative error of {error:.3g}")
    return error
