"""Writer of NF4 checkpoints with bitsandbytes' keys, one tensor at a time.

The position of every byte follows from shapes alone (`nf4_layout`). Until all is done everything
lies in a work folder inside of the destination, with a journal of one line, with a checksum, per
written tensor. A stopped run, however it ended, resumes after the last line whose bytes are still
there, and ends with the same files. At the end all is read back, then moved, config.json last:
without that file nothing loads the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from peftkern.formats.json_files import parse_json
from peftkern.formats.nf4 import NESTED_BLOCKSIZE, NF4Weight
from peftkern.functional import dequantize_nf4, quantize_nf4
from peftkern.tools.quantize.checkpoint import (
    CHUNK,
    CONFIG,
    INDEX,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    chunks_of,
    read_tensor,
)
from peftkern.tools.quantize.companions import find_companions
from peftkern.tools.quantize.nf4_layout import Options, Shard, Sizes, Unit, plan_shards, sizes_of
from peftkern.tools.quantize.staging import (
    check_destination,
    check_space,
    copy_files,
    publish,
    replace_json,
    replace_text,
    work_folder,
)

_ERROR_CHUNK = 1 << 18  # minimum number of values per comparison with the source
Progress = Callable[[int, str], None]  # finished bytes of the source, and the tensor


@dataclass(frozen=True)
class Summary(Sizes):
    """Summary of the output. An error is |w - w_nf4| / |w| (2-norms). copied, left: paths below the
    source of the files beside its weights, `left` those that are not in the copy."""

    resumed: int
    largest_error: float
    largest_error_name: str
    copied: tuple[str, ...]
    left: tuple[str, ...]


def quantize_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    linear: Mapping[str, bool],
    quantization_config: Mapping[str, Any],
    options: Options | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write `checkpoint` to the folder `destination` with its linear weights in NF4.

    The files beside the weights are copied, but for weights in other formats: `find_companions`.

    Memory: about one tensor, as read and in 4 bits; what is kept is copied in pieces. Calling it
    again after an interruption resumes; KeyboardInterrupt and OSError (a full disk) leave a state
    that allows it, a CheckpointError leaves nothing.

    Args:
        linear: names of the tensors to quantize, [N, K] float32, float16 or bfloat16; True for
            those that are kept as [K, N] and are transposed first, as transformers does for Conv1D.
        quantization_config: for config.json, as transformers' BitsAndBytesConfig writes it.
        force: replace the checkpoint that `destination` holds, once the new one is complete, and
            discard an unfinished run with other options. Other files there are left alone.
        progress: called with (bytes of the source, tensor name) after each piece of work.
    Raises: CheckpointError for a request that cannot be met.
    """
    options = options or Options()
    destination = Path(destination)
    shards = plan_shards(checkpoint, linear, options)
    identity = _identity(checkpoint, linear, quantization_config, options)
    companions = find_companions(checkpoint)
    check_destination(checkpoint.folder, destination, force, companions.copied)
    weights = sum(len(shard.header) + shard.nbytes for shard in shards)
    check_space(destination, weights + companions.nbytes)
    created = not destination.exists()
    with work_folder(destination, identity, force) as work:
        try:
            journal = _Journal(work, shards)
            resumed = len(journal.entries)
            if not journal.complete:
                _write(work, shards, journal, options, progress or (lambda count, name: None))
                _read_back(work, shards, journal)
                copy_files(checkpoint.folder, work, companions.copied)
                _write_index(work, shards)
                config = {**checkpoint.config, "quantization_config": dict(quantization_config)}
                replace_json(work / CONFIG, config)
                journal.finish()
        except CheckpointError:
            shutil.rmtree(work)
            with contextlib.suppress(OSError):
                if created:
                    destination.rmdir()
            raise
        publish(work, destination, [shard.name for shard in shards], companions.copied)
    error, name = _largest_error(shards, journal)
    more = (resumed, error, name, companions.copied, companions.left)
    return Summary(*astuple(sizes_of(shards)), *more)


def _identity(
    checkpoint: Checkpoint,
    linear: Mapping[str, bool],
    quantization_config: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes."""
    files = []
    for path in checkpoint.files:
        status = path.stat()
        files.append([path.name, status.st_size, status.st_mtime_ns])
    tensors = [
        (i.name, i.file.name, i.dtype, i.shape, i.start) for i in checkpoint.tensors.values()
    ]
    text = json.dumps([files, tensors, checkpoint.config])
    return {
        "source": hashlib.sha256(text.encode()).hexdigest(),
        **asdict(options),
        "choice of tensors": sorted(linear.items()),
        "quantization_config": dict(quantization_config),
    }


class _Journal:
    """Journal of the written units in order: a line of JSON each, with checksum and error.

    Reading it checks the bytes of every unit against its line, up to the first that differs, as
    after a power failure. A last line states that all was read back.
    """

    def __init__(self, work: Path, shards: tuple[Shard, ...]) -> None:
        self.path = work / "journal"
        lines = self._lines()
        units = sum(len(shard.units) for shard in shards)
        self.complete = lines[units:] == [{"complete": True}]
        self.entries = lines[:-1] if self.complete else []
        if not self.complete:
            for entry, checksum in zip(lines, _checksums(work, shards), strict=False):
                if checksum is None or entry.get("checksum") != checksum:
                    break
                self.entries.append(entry)
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            replace_text(self.path, text)

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # a truncated line
            for line in self.path.read_bytes().splitlines():
                entry = parse_json(line)
                if not isinstance(entry, dict) or not _is_entry(entry):
                    break
                lines.append(entry)
        return lines

    def add(self, checksum: int, error: float | None) -> None:
        self.entries.append({"checksum": checksum, "error": error})
        self._append(self.entries[-1])

    def finish(self) -> None:
        self._append({"complete": True})

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")


def _is_entry(entry: dict[str, Any]) -> bool:
    if entry == {"complete": True}:
        return True
    error = entry.get("error")
    return (
        entry.keys() == {"checksum", "error"}
        and isinstance(entry["checksum"], int)
        and (error is None or (isinstance(error, float) and math.isfinite(error)))
    )


def _checksums(work: Path, shards: Iterable[Shard]) -> Iterator[int | None]:
    """Yield the checksum of every unit on disk; None from the first impossible one on."""
    for shard in shards:
        try:
            file = open(work / shard.name, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            yield None
            return
        with file:
            if file.read(len(shard.header)) != shard.header:
                yield None
                return
            for unit in shard.units:
                yield _checksum(file, unit.nbytes)


def _checksum(file: BinaryIO, nbytes: int) -> int | None:
    checksum, left = 0, nbytes
    while left:
        chunk = file.read(min(left, CHUNK))
        if not chunk:
            return None
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return checksum


def _write(
    work: Path, shards: tuple[Shard, ...], journal: _Journal, options: Options, progress: Progress
) -> None:
    """Fill all files from the end of the journal on."""
    number, done = 0, len(journal.entries)
    units = [unit for shard in shards for unit in shard.units]
    # One buffer for all weights: freed and taken again, they leave gaps in the process's heap.
    memory = bytearray(max((unit.info.nbytes for unit in units if unit.quantized), default=0))
    for shard in shards:
        path = work / shard.name
        if number + len(shard.units) <= done:
            number += len(shard.units)
            progress(sum(unit.info.nbytes for unit in shard.units), shard.name)
            continue
        with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
            _write_all(file, shard.header)
            for unit, start in shard.starts():
                number += 1
                if number <= done:
                    progress(unit.info.nbytes, unit.info.name)
                    continue
                file.seek(start)
                if unit.quantized:
                    pieces, error = _quantized(unit, options, memory)
                    checksum = _copy(pieces, file)
                    progress(unit.info.nbytes, unit.info.name)
                else:
                    error, checksum = None, _copy(chunks_of(unit.info), file, progress, unit)
                journal.add(checksum, error)
            file.truncate(len(shard.header) + shard.nbytes)
            os.fsync(file.fileno())


def _copy(
    pieces: Iterable[bytes],
    file: BinaryIO,
    progress: Progress | None = None,
    unit: Unit | None = None,
) -> int:
    """Write the pieces; return their checksum."""
    checksum = 0
    for piece in pieces:
        _write_all(file, piece)
        checksum = zlib.crc32(piece, checksum)
        if progress is not None:
            progress(len(piece), unit.info.name)
    return checksum


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _quantized(unit: Unit, options: Options, memory: bytearray) -> tuple[Iterator[bytes], float]:
    """Return the bytes of a weight's parts, and its error."""
    weight = read_tensor(unit.info, memory).to(options.device)
    if unit.transposed:
        weight = weight.T.contiguous()
    nf4 = quantize_nf4(weight, blocksize=options.blocksize, double_quant=options.double_quant)
    error = _relative_error(weight, nf4, unit.info)
    state = nf4.state_dict(unit.info.name.removesuffix("weight"))
    return (_bytes_of(state[name], nbytes) for name, _, _, nbytes in unit.parts), error


def _bytes_of(tensor: Tensor, nbytes: int) -> bytes:
    """Return a tensor's bytes, padded with spaces to `nbytes`: the JSON is shorter."""
    data = bytearray(b" " * nbytes)
    used = tensor.numel() * tensor.element_size()
    if used:  # torch.frombuffer takes no empty buffer
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        torch.frombuffer(data, dtype=torch.uint8, count=used).copy_(flat)
    return data


def _relative_error(weight: Tensor, nf4: NF4Weight, info: TensorInfo) -> float:
    """Return |w - w_nf4| / |w|, by pieces that begin with a block (of absmax, too, if nested).

    Around 0.1; zeros alone have 1, so that more is a defect, not rounding.
    """
    values = weight.view(-1)
    span = nf4.blocksize * NESTED_BLOCKSIZE
    step = -(-_ERROR_CHUNK // span) * span
    difference = norm = 0.0
    for start in range(0, nf4.numel, step):
        piece = values[start : start + step].float()
        dense = dequantize_nf4(_piece(nf4, start, len(piece))).float()
        difference += torch.linalg.vector_norm(piece - dense, dtype=torch.float64).item() ** 2
        norm += torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2
    if not math.isfinite(norm):
        raise CheckpointError(f"{info.name}: holds NaN or infinity, which NF4 cannot hold")
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    if not error < 1:
        raise RuntimeError(f"{info.name}: quantized with a relative error of {error:.3g}")
    return error


def _piece(nf4: NF4Weight, start: int, length: int) -> NF4Weight:
    """Slice values start .. start + length into a weight; start begins a nested block."""
    first, blocks = start // nf4.blocksize, -(-length // nf4.blocksize)
    nested = {}
    if nf4.nested:
        at = first // NESTED_BLOCKSIZE
        nested = {
            "nested_absmax": nf4.nested_absmax[at : at + -(-blocks // NESTED_BLOCKSIZE)],
            "nested_code": nf4.nested_code,
            "nested_offset": nf4.nested_offset,
            "nested_blocksize": nf4.nested_blocksize,
        }
    packed = nf4.packed[start // 2 : (start + length + 1) // 2]
    absmax = nf4.absmax[first : first + blocks]
    return NF4Weight(packed, absmax, (length,), nf4.blocksize, nf4.dtype, **nested)


def _read_back(work: Path, shards: tuple[Shard, ...], journal: _Journal) -> None:
    """Compare the files on disk with the written checksums."""
    written = [entry["checksum"] for entry in journal.entries]
    if list(_checksums(work, shards)) != written:
        raise OSError(f"{work.parent}: what was written reads back differently: a faulty disk?")
    for shard in shards:
        with safe_open(work / shard.name, framework="pt"):  # its reader accepts the header, too
            pass


def _write_index(work: Path, shards: tuple[Shard, ...]) -> None:
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {
                part[0]: shard.name
                for shard in shards
                for unit in shard.units
                for part in unit.parts
            },
        }
        replace_json(work / INDEX, index)


def _largest_error(shards: tuple[Shard, ...], journal: _Journal) -> tuple[float, str]:
    units = [unit for shard in shards for unit in shard.units]
    errors = [
        (entry["error"] or 0.0, unit.info.name)
        for unit, entry in zip(units, journal.entries, strict=True)
        if unit.quantized
    ]
    return max(errors, default=(0.0, ""))
