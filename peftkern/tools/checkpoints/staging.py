"""Atomic, resumable output directory, filled in a work folder inside of it.

The work folder belongs to one process and to one set of options; a run that resumes it must have
the same. Its `files` are the output to be; when all are there they are moved, config.json last:
without it nothing loads the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peftkern.formats.json_files import read_json
from peftkern.tools import destinations
from peftkern.tools.checkpoints.checkpoint import CONFIG, Checkpoint, CheckpointError

try:
    import fcntl
except ImportError:  # not POSIX: nothing stops a second process that writes to the same folder
    fcntl = None

WORK = ".peftkern-unfinished"
_DONE = ".peftkern-finished"  # the work folder while it is removed: no run goes on with half of it
FILES = "files"  # in the work folder: the output, until it is moved
ADAPTERS = ("residual_adapter", "adapter")  # folders that belong to one checkpoint: see publish
_SPARE_BYTES = 1 << 24  # for headers, manifest and index


def check_destination(source: Path, destination: Path, force: bool, copies: Iterable[str]) -> None:
    """Raise CheckpointError unless the destination is apart from the source, and empty, unfinished
    or, with `force`, a checkpoint in which `copies`, and adapters, find their places."""
    destinations.check_apart(destination, CheckpointError, source)
    held = destinations.held(destination, CheckpointError)
    if held and WORK not in held:
        if not force:
            raise CheckpointError(
                f"{destination}: expected a new or empty folder, it holds {held[0]!r} "
                "(--force replaces the checkpoint in it)"
            )
        config = try_json(destination / CONFIG)
        if not isinstance(config, dict) or "model_type" not in config:
            raise CheckpointError(
                f"{destination}: --force replaces a checkpoint, and this folder holds none"
            )
    for name in (*copies, *(f"{folder}/adapter_config.json" for folder in ADAPTERS)):
        _check_place(destination, name)


def _check_place(destination: Path, name: str) -> None:
    """Refuse a file whose path goes through a link or is a folder."""
    path = destination / name
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a file or nothing, got a folder")
    while (path := path.parent) != destination:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path}: expected a folder or nothing, got a link or a file")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return what changes when somebody writes to the config or the weights."""
    states = [(path.name, path.stat()) for path in checkpoint.files]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps([files, checkpoint.config]).encode()).hexdigest()


@contextlib.contextmanager
def work_folder(destination: Path, identity: dict[str, Any], force: bool) -> Iterator[Path]:
    """Open the work folder of this run, new or resumed, locked against a second process.

    A CheckpointError inside leaves nothing of it: the request cannot be met, and no run resumes.
    """
    created = not destination.exists()
    identity = json.loads(json.dumps(identity))
    work = destination / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{destination}: another process is writing to it") from None
        other = try_json(work / "run.json")
        if other != identity:
            if other is not None and not force:
                raise CheckpointError(
                    f"{destination}: holds an unfinished run with {_difference(other, identity)}; "
                    "repeat it as it was, or start over with --force"
                )
            clear_folder(work, keep=("lock",))
        replace_json(work / "run.json", identity)
        try:
            yield work
        except CheckpointError:
            shutil.rmtree(work)
            with contextlib.suppress(OSError):
                if created:
                    destination.rmdir()
            raise


def clear_folder(folder: Path, keep: Collection[str]) -> None:
    """Remove all that lies in a folder, but for the names in `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _difference(other: Any, identity: dict[str, Any]) -> str:
    other = other if isinstance(other, dict) else {}
    key, value = next(item for item in identity.items() if other.get(item[0]) != item[1])
    told = isinstance(value, (int, str)) and key != "source"
    return f"{key} {other.get(key)}, not {value}" if told else f"another {key}"


def check_space(destination: Path, needed: int, moved: Iterable[str]) -> None:
    """Raise CheckpointError if that many bytes, less those already written, do not fit.

    moved: names of files that lie in the destination if a run was stopped while it moved them.
    """
    work = destination / WORK
    written = [path for path in work.rglob("*") if not path.is_dir()]
    if written and not (destination / CONFIG).exists():
        written += [destination / name for name in moved if (destination / name).exists()]
    there = sum(path.lstat().st_size for path in written)
    path = Path(os.path.realpath(destination))
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if needed + _SPARE_BYTES > there + free:
        needed = max(needed + _SPARE_BYTES - there, 0)
        raise CheckpointError(
            f"{destination}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB"
        )


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def publish(work: Path, destination: Path, weights: Collection[str]) -> None:
    """Move the files to their places, after removing those of a checkpoint that was there.

    weights: names of the new files of weights, some of which an earlier run may have moved.
    """
    (destination / CONFIG).unlink(missing_ok=True)
    files = work / FILES
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in destination.glob(pattern):
            if path.name not in weights:
                path.unlink()
    for name in ADAPTERS:  # they do not fit other weights
        if (destination / name).is_dir() and not (destination / name).is_symlink():
            shutil.rmtree(destination / name)
    for path in sorted(files.rglob("*"), key=lambda path: path == files / CONFIG):
        if path.is_file():
            target = destination / path.relative_to(files)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copymode(work / "lock", path)  # safetensors writes for the owner alone
            os.replace(path, target)
    shutil.rmtree(destination / _DONE, ignore_errors=True)
    os.replace(work, destination / _DONE)
    shutil.rmtree(destination / _DONE)


def try_json(path: Path) -> Any:
    """Return the file's content; None if there is no file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return "unreadable"


def replace_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync_file(temporary)
    os.replace(temporary, path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, and wait until it is on the disk."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # its own for those of the system
        raise OSError(f"{path}: {error}") from error
    sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
