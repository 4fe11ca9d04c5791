"""Reader of untrusted safetensors folders, as transformers writes them.

The whole folder is checked before any tensor is read: the tensors of `read_checkpoint` lie within
the files, which lie within the folder. Pickles are never opened. Tensors are read one at a time and
not through a map, so that a file that shrinks is an error, not a signal.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftkern.formats.json_files import brief, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST = 1024  # name of a tensor, whose numbers are read as such
# What safetensors raises for a file that it cannot read, or that is none.
READ_ERRORS = (SafetensorError, OSError, ValueError, OverflowError)

# Tensor names of quantized checkpoints: bitsandbytes, GPTQ, AWQ, compressed-tensors.
_QUANTIZED = re.compile(
    r"\.((nested_)?absmax|(nested_)?quant_map|SCB|qweight|qzeros|weight_packed|quant_state\..*)$"
)


class CheckpointError(ValueError):
    """Unusable folder or options; the message is one clear line."""


@dataclass(frozen=True)
class TensorInfo:
    """Place and kind of a tensor; dtype in safetensors' name; offset in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    written: int  # when the file was, in ns

    def read(self) -> Tensor:
        """Return the values. Raises: CheckpointError if the file was written to since its check."""
        return self.fill(torch.empty(self.shape, dtype=DTYPES[self.dtype]))

    def fill(self, tensor: Tensor) -> Tensor:
        """Read the values into a contiguous tensor of as many bytes; raises as `read`."""
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        with unchanged(self.file), open(self.file, "rb") as file:
            file.seek(self.offset)
            whole = file.readinto(data) == len(data)
            if not whole or os.fstat(file.fileno()).st_mtime_ns != self.written:
                raise OSError("written to since its check")
        return tensor

    def item(self, number: int) -> TensorInfo:
        """Return the place of one item along the first dimension."""
        nbytes = self.nbytes // self.shape[0]
        place = {"nbytes": nbytes, "offset": self.offset + number * nbytes}
        return replace(self, shape=self.shape[1:], **place)

    def items(self) -> Iterator[Tensor]:
        """Yield the values along the first dimension, read one at a time."""
        return (self.item(number).read() for number in range(self.shape[0]))


@dataclass(frozen=True)
class Checkpoint:
    """Checked folder: its config and its tensors, by file and by place in the file."""

    folder: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def read_checkpoint(folder: str | os.PathLike, *, quantized: bool = False) -> Checkpoint:
    """Check a checkpoint folder: config.json, and model.safetensors or its index and shards.

    A symbolic link counts if it stays in the folder, or points to the blobs of the same Hugging
    Face cache. Only headers are read.

    Args: quantized, take a quantized checkpoint, too; its tensors are then as they are stored.
    Raises: CheckpointError naming the defect: no such folder, no safetensors, a pickle or
        GGUF instead, already quantized, a file that is missing, outside of the folder, damaged, or
        not what the index says, a tensor that comes twice, an unknown dtype.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        hint = " GGUF is not read;" if folder.suffix.lower() == ".gguf" else ""
        raise CheckpointError(
            f"{folder}:{hint} expected a folder with {CONFIG} and safetensors, got {what}"
        )
    names = _weight_files(folder)
    if not os.path.lexists(folder / CONFIG):
        raise CheckpointError(f"{folder}: expected {CONFIG} beside the weights, got none")
    config = json_object(folder_file(folder, CONFIG))
    if config.get("quantization_config") is not None and not quantized:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder}: already quantized ({brief(method)}); expected the original weights"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in names:
        for info in _tensors_of(folder_file(folder, file), quantized):
            other = tensors.setdefault(info.name, info)
            if other is not info:
                raise CheckpointError(
                    f"{brief(info.name)}: in both {other.file.name} and {info.file.name}"
                )
    for name, file in _weight_map(folder).items() if names != [SINGLE] else ():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{INDEX}: says that {brief(name)} is in {file}, which does not have it"
            )
    if not tensors:
        raise CheckpointError(f"{folder}: holds no tensors")
    return Checkpoint(folder, config, tuple(folder / name for name in names), tensors)


def folder_file(folder: Path, name: str) -> Path:
    """Return `folder / name`, if that is a regular file that belongs to the folder.

    Raises: CheckpointError if it is missing, of another kind, or a link to somewhere else.
    """
    home = os.path.realpath(folder)
    roots = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":  # of a Hugging Face cache
        roots.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    try:
        target = os.path.realpath(folder / name, strict=True)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: {error.strerror}") from None
    if not any(os.path.commonpath([root, target]) == root for root in roots):
        raise CheckpointError(f"{folder / name}: a link to outside of the folder")
    if not os.path.isfile(target):
        raise CheckpointError(f"{folder / name}: expected a file")
    return folder / name


@contextlib.contextmanager
def unchanged(path: Path, errors: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Name a checked file in the error of a read, one of `errors`. Raises: CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except errors as error:
        raise CheckpointError(f"{path}: changed while it was read: {error}") from None


def open_safetensors(path: Path) -> safe_open:
    return safe_open(path, framework="pt", backend="pread")


def _weight_files(folder: Path) -> list[str]:
    """Find the files with the weights, in transformers' order of preference."""
    if os.path.lexists(folder / SINGLE):
        return [SINGLE]
    if os.path.lexists(folder / INDEX):
        return sorted(set(_weight_map(folder).values()))
    present = sorted(path.name for path in folder.iterdir())
    wanted = f"expected {SINGLE}, or {INDEX} and its shards"
    for suffixes, why in (
        ((".safetensors",), "safetensors of other names, or shards without their index"),
        ((".bin", ".pt", ".pth", ".ckpt"), "pickles, which run code when they are read: load them "
         "where you trust them and save_pretrained() the model"),
        ((".gguf",), "GGUF, which is already quantized"),
    ):  # fmt: skip
        found = [name for name in present if name.lower().endswith(suffixes)]
        if found:
            raise CheckpointError(f"{folder}: {wanted}, got {why} ({brief(found[0])})")
    raise CheckpointError(f"{folder}: {wanted}, got neither")


def _weight_map(folder: Path) -> dict[str, str]:
    """Read the index: tensor name to file name, which must be a plain safetensors name."""
    weight_map = json_object(folder_file(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map with entries")
    for name in weight_map.values():
        plain = isinstance(name, str) and re.fullmatch(r"[^./\\][^/\\]*\.safetensors", name)
        if not plain or not name.isprintable():
            raise CheckpointError(
                f"{folder / INDEX}: expected names of safetensors files in the folder, "
                f"got {brief(name)}"
            )
    return weight_map


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: CheckpointError if it holds none; OSError."""
    try:
        value = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


class Header(NamedTuple):
    """Entries of a file's tensors, its metadata, all bytes before the tensors, and when it was
    written, in ns."""

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data: bytes
    written: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file that is not trusted.

    Raises: CheckpointError naming the file: damaged or cut off, a name twice or one that cannot be
        printed, a dtype that is not known.
    """
    try:
        # Proves that shapes, dtypes and offsets agree and that the tensors fill the file.
        with open_safetensors(path):
            pass
        with open(path, "rb") as file:
            length = file.read(8)
            text = file.read(int.from_bytes(length, "little"))
            written = os.fstat(file.fileno()).st_mtime_ns
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: damaged, cut off or not safetensors: {error}") from None
    try:
        entries = parse_json(text, unique=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header: {error}") from None
    metadata = entries.pop("__metadata__", None) or {}
    for name, entry in entries.items():
        if not name.isprintable() or len(name) > _LONGEST:
            raise CheckpointError(
                f"{path}: expected names of at most {_LONGEST} characters that can be printed, "
                f"got {brief(name)}"
            )
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {brief(name)} has dtype {brief(entry['dtype'])}, "
                f"expected one of {', '.join(DTYPES)}"
            )
    return Header(entries, metadata, length + text, written)


def _tensors_of(path: Path, quantized: bool) -> list[TensorInfo]:
    """Read the header of one file, in the order of its data."""
    header, metadata, data, written = read_header(path)
    if metadata.get("format", "pt") != "pt":
        raise CheckpointError(
            f"{path}: expected weights of PyTorch, got format {brief(metadata['format'])}"
        )
    found = []
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        if _QUANTIZED.search(name) and not quantized:
            raise CheckpointError(f"{path}: already quantized, it holds {brief(name)}")
        begin, end = entry["data_offsets"]
        shape, at = tuple(entry["shape"]), len(data) + begin
        found.append(TensorInfo(name, path, entry["dtype"], shape, end - begin, at, written))
    return found
