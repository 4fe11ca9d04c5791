"""Writer of NF4 checkpoints with bitsandbytes' keys, one file at a time.

safetensors writes each file, which is read back and noted in a manifest with a digest of its
content. Until all is done everything lies in a work folder inside of the destination. A stopped
run, however it ended, resumes with the first file whose content is not that of the manifest, and
ends with the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peftkern.formats.nf4 import BLOCKSIZES, STATE_BYTES, STATE_KEY, state_dict_bytes
from peftkern.functional import dequantize_nf4, quantize_nf4
from peftkern.tools.quantize import staging
from peftkern.tools.quantize.checkpoint import (
    CONFIG,
    INDEX,
    READ_ERRORS,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    open_safetensors,
    read_tensors,
)
from peftkern.tools.quantize.companions import find_companions

MANIFEST = "manifest.json"  # in the work folder: a Note of each finished file
_WEIGHT_DTYPES = ("F32", "F16", "BF16")  # that quantize_nf4 takes
_METADATA = {"format": "pt"}
_ERROR_CHUNK = 1 << 18  # number of values per comparison with the source
Progress = Callable[[int, str], None]  # finished bytes of the source, and the tensor


@dataclass(frozen=True)
class Options:
    """Options that decide the written bytes: a run resumes only with the same.

    Args: blocksize, double_quant as for `peftkern.quantize_nf4`; shard_bytes, where a new file
        begins (a larger tensor has one of its own); device that quantizes.
    """

    blocksize: int = 64
    double_quant: bool = True
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise CheckpointError(f"blocksize: expected one of {BLOCKSIZES}, got {self.blocksize}")
        if self.shard_bytes < 1:
            raise CheckpointError(f"shard_bytes: expected at least 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class Unit:
    """Tensor of the source; `nbytes` of it are written. transposed: None if it is kept as it is."""

    info: TensorInfo
    transposed: bool | None
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.transposed is not None

    @property
    def experts(self) -> bool:
        """A weight of experts: one, or a stack of them."""
        return "experts" in self.info.name.split(".") and len(self.info.shape) > 1


@dataclass(frozen=True)
class Size:
    """Size of some tensors; bytes are those of the tensors themselves."""

    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Size:
        sizes = [(1, math.prod(u.info.shape), u.info.nbytes, u.nbytes) for u in units]
        return cls(*map(sum, zip((0, 0, 0, 0), *sizes, strict=True)))

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.bytes_after / max(self.parameters, 1)


@dataclass(frozen=True)
class Plan:
    """Files to write, by name, and their tensors; sizes of all and of some of these: experts are
    those in 4 bits, kept_experts the others."""

    files: dict[str, list[Unit]]
    total: Size
    quantized: Size
    experts: Size
    kept_experts: Size


@dataclass(frozen=True)
class Summary:
    """Summary of the output. An error is |w - w_nf4| / |w| (2-norms). resumed: number of tensors
    that an earlier run had written. copied, left: paths below the source of the files beside its
    weights, `left` those that are not in the copy."""

    plan: Plan
    resumed: int
    largest_error: float
    largest_error_name: str
    copied: tuple[str, ...]
    left: tuple[str, ...]


class Note(NamedTuple):
    """Note on a finished file: its digest, the largest error of its weights, and whose it is."""

    digest: str
    error: float
    name: str


def plan_files(checkpoint: Checkpoint, weights: Mapping[str, bool], options: Options) -> Plan:
    """Plan all files from shapes alone.

    Raises: CheckpointError for a weight that is none.
    """
    for name in weights:
        info = checkpoint.tensors.get(name)
        stack = info is not None and _is_stack(info) and info.shape[0] > 0 and not weights[name]
        if info is None or not (stack or len(info.shape) == 2) or info.dtype not in _WEIGHT_DTYPES:
            came = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{name}: expected a weight of two dimensions, or a stack of them, in one of "
                f"{_WEIGHT_DTYPES}, got {came}"
            )
    units = {
        name: Unit(info, weights[name], _written_bytes(info, options))
        if name in weights
        else Unit(info, None, info.nbytes)
        for name, info in checkpoint.tensors.items()
    }
    split = split_state_dict_into_shards_factory(
        units,
        get_storage_size=attrgetter("nbytes"),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.shard_bytes,
    )
    return Plan(
        {file: [units[n] for n in names] for file, names in split.filename_to_tensors.items()},
        Size.of(units.values()),
        Size.of(unit for unit in units.values() if unit.quantized),
        Size.of(unit for unit in units.values() if unit.experts and unit.quantized),
        Size.of(unit for unit in units.values() if unit.experts and not unit.quantized),
    )


def _written_bytes(info: TensorInfo, options: Options) -> int:
    double_quant = options.double_quant and not _is_stack(info)
    return state_dict_bytes(
        math.prod(info.shape), blocksize=options.blocksize, double_quant=double_quant
    )


def _is_stack(info: TensorInfo) -> bool:
    """Return whether a weight is [E, N, K]. Its absmax is not nested: one offset for all experts
    would tie them together, and bitsandbytes' own quantization of a parameter has none either."""
    return len(info.shape) == 3


def quantize_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    weights: Mapping[str, bool],
    quantization_config: Mapping[str, Any],
    options: Options,
    *,
    force: bool = False,
    progress: Progress = lambda count, name: None,
) -> Summary:
    """Write `checkpoint` to the folder `destination` with some of its weights in NF4.

    The files beside the weights are copied, but for weights in other formats: `find_companions`.

    Memory: about one file of the output and one tensor of the source, of a stack one expert.
    Calling it again after an interruption resumes; KeyboardInterrupt and OSError (a full disk)
    leave a state that allows it, a CheckpointError leaves nothing.

    Args:
        weights: names of the tensors to quantize, [N, K] or experts [E, N, K], float32, float16 or
            bfloat16; True for those that are kept as [K, N] and are transposed first, as
            transformers does for Conv1D.
        quantization_config: for config.json, as transformers' BitsAndBytesConfig writes it.
        force: replace the checkpoint that `destination` holds, once the new one is complete, and
            discard an unfinished run with other options. Other files there are left alone.
        progress: called with (bytes of the source, tensor name) after each piece of work.
    Raises: CheckpointError for a request that cannot be met.
    """
    destination = Path(destination)
    plan = plan_files(checkpoint, weights, options)
    identity = _identity(checkpoint, weights, quantization_config, options)
    companions = find_companions(checkpoint)
    staging.check_destination(checkpoint.folder, destination, force, companions.copied)
    staging.check_space(destination, plan.total.bytes_after + companions.nbytes)
    created = not destination.exists()
    with staging.work_folder(destination, identity, force) as work:
        notes, resumed = _read_manifest(work), plan.total.tensors
        try:
            if not (work / staging.COMPLETE).exists():
                resumed = _write(work, plan, notes, options, progress)
                staging.copy_files(checkpoint.folder, work / staging.FILES, companions.copied)
                config = {**checkpoint.config, "quantization_config": dict(quantization_config)}
                staging.replace_json(work / staging.FILES / CONFIG, config)
        except CheckpointError:
            shutil.rmtree(work)
            with contextlib.suppress(OSError):
                if created:
                    destination.rmdir()
            raise
        staging.publish(work, destination)
    largest = max(((note.error, note.name) for note in notes.values()), default=(0.0, ""))
    return Summary(plan, resumed, *largest, companions.copied, companions.left)


def _identity(
    checkpoint: Checkpoint,
    weights: Mapping[str, bool],
    quantization_config: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes."""
    states = [(path.name, path.stat()) for path in checkpoint.files]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    text = json.dumps([files, checkpoint.config])
    return {
        "source": hashlib.sha256(text.encode()).hexdigest(),
        **asdict(options),
        "choice of tensors": sorted(weights.items()),
        "quantization_config": dict(quantization_config),
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
    work: Path, plan: Plan, notes: dict[str, Note], options: Options, progress: Progress
) -> int:
    """Write all files and their index, and note them; return how many tensors were there."""
    folder, resumed = work / staging.FILES, 0
    folder.mkdir(exist_ok=True)
    staging.clear_folder(folder, keep=plan.files)  # of what a stopped run had begun or copied
    weight_map: dict[str, str] = {}
    for name, units in plan.files.items():
        path = folder / name
        if name in notes and notes[name].digest == _digest_file(path):
            resumed += len(units)
            progress(sum(unit.info.nbytes for unit in units), name)
        else:
            path.unlink(missing_ok=True)
            notes[name] = _write_file(path, units, options, progress)
            staging.replace_json(work / MANIFEST, notes)
        with open_safetensors(path) as file:
            weight_map.update(dict.fromkeys(file.offset_keys(), name))
    if len(plan.files) > 1:
        metadata = {"total_size": plan.total.bytes_after}
        staging.replace_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    return resumed


def _write_file(path: Path, units: list[Unit], options: Options, progress: Progress) -> Note:
    """Write one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    largest = (0.0, "")
    stacks = {unit.info.name for unit in units if unit.quantized and _is_stack(unit.info)}
    sources = read_tensors((unit.info for unit in units), stacks)
    for unit, parts in zip(units, sources, strict=True):
        name = unit.info.name
        if unit.quantized:
            state, error = _quantized(unit, parts, options)
            tensors |= state
            largest = max(largest, (error, name))
        else:
            (tensors[name],) = parts
        progress(unit.info.nbytes, name)
    temporary = path.with_name(path.name + ".new")
    try:
        save_file(tensors, temporary, metadata=_METADATA)
    except SafetensorError as error:  # its own for those of the system
        raise OSError(f"{path}: {error}") from error
    staging.sync_file(temporary)
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


def _quantized(
    unit: Unit, parts: Iterable[Tensor], options: Options
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors that a weight becomes, and its error, of a stack the largest one.

    A stack is quantized by experts. Blocks do not cross them, so that it has the same bytes whole.
    """
    name, stack = unit.info.name, _is_stack(unit.info)
    how = {"blocksize": options.blocksize, "double_quant": options.double_quant and not stack}
    done, error = [], 0.0
    for weight in parts:
        weight = weight.to(options.device)
        if unit.transposed:
            weight = weight.T.contiguous()
        done.append(quantize_nf4(weight, **how))
        error = max(error, _relative_error(name, weight, dequantize_nf4(done[-1])))
    nf4 = done[0]
    if stack:
        packed, absmax = (torch.cat([getattr(w, f) for w in done]) for f in ("packed", "absmax"))
        nf4 = replace(nf4, packed=packed, absmax=absmax, shape=unit.info.shape)
    state = {name + key.removeprefix("weight"): t for key, t in nf4.state_dict().items()}
    key = f"{name}.{STATE_KEY}"  # JSON, in as many bytes for every weight: shapes tell the sizes
    room = STATE_BYTES - len(state[key])
    state[key] = torch.nn.functional.pad(state[key], (0, room), value=ord(" "))
    return {key: tensor.cpu() for key, tensor in state.items()}, error


def _relative_error(name: str, weight: Tensor, dense: Tensor) -> float:
    """Return |w - w_nf4| / |w|, by pieces: float32 of all would be the largest of all tensors.

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
        raise CheckpointError(f"{name}: holds NaN or infinity, which NF4 cannot hold")
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    if not error < 1:
        raise RuntimeError(f"{name}: quantized with a relative error of {error:.3g}")
    return error
