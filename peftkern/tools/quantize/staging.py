"""Atomic, resumable output directory, filled in a work folder inside of it.

The work folder belongs to one process and to one set of options; a run that resumes it must have
the same. Complete output is moved, config.json last: without it nothing loads the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftkern.formats.json_files import read_json
from peftkern.tools.quantize.checkpoint import CONFIG, INDEX, CheckpointError

WORK = ".peftkern-quantize"
_COPIES = "copies"  # below the work folder: the files that were copied, in their folders
_SPARE_BYTES = 1 << 24  # for the journal and the index


def check_destination(source: Path, destination: Path, force: bool, copies: Iterable[str]) -> None:
    """Raise CheckpointError unless the destination is apart from the source, and empty, unfinished
    or, with `force`, a checkpoint in which `copies` find their places."""
    here, there = os.path.realpath(source), os.path.realpath(destination)
    if os.path.commonpath([here, there]) in (here, there):
        raise CheckpointError(f"{destination}: expected a folder apart from the source {source}")
    if os.path.lexists(destination) and not destination.is_dir():
        raise CheckpointError(f"{destination}: expected a new or empty folder, got a file")
    held = sorted(path.name for path in destination.iterdir()) if destination.exists() else []
    if held and WORK not in held:
        if not force:
            raise CheckpointError(
                f"{destination}: expected a new or empty folder, it holds {held[0]!r} "
                "(--force replaces the checkpoint in it)"
            )
        config = _read_json(destination / CONFIG)
        if not isinstance(config, dict) or "model_type" not in config:
            raise CheckpointError(
                f"{destination}: --force replaces a checkpoint, and this folder holds none"
            )
    for name in copies:
        _check_place(destination, name)


def _check_place(destination: Path, name: str) -> None:
    """Refuse a file whose path goes through a link or is a folder."""
    path = destination / name
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a file or nothing, got a folder")
    while (path := path.parent) != destination:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path}: expected a folder or nothing, got a link or a file")


@contextlib.contextmanager
def work_folder(destination: Path, identity: dict[str, Any], force: bool) -> Iterator[Path]:
    """Open the work folder of this run, new or resumed, locked against a second process."""
    identity = json.loads(json.dumps(identity))
    work = destination / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{destination}: another process is writing to it") from None
        other = _read_json(work / "run.json")
        if other is not None and other != identity:
            if not force:
                raise CheckpointError(
                    f"{destination}: holds an unfinished run with {_difference(other, identity)}; "
                    "repeat it as it was, or start over with --force"
                )
            for path in work.iterdir():
                if path.name == "lock":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        replace_json(work / "run.json", identity)
        yield work


def _difference(other: Any, identity: dict[str, Any]) -> str:
    if isinstance(other, dict):
        for key, value in identity.items():
            if other.get(key) != value:
                if isinstance(value, (int, str)) and key != "source":
                    return f"{key} {other.get(key)}, not {value}"
                return f"another {key}"
    return "other options"


def check_space(destination: Path, needed: int) -> None:
    """Raise CheckpointError if that many bytes, less those already written, do not fit."""
    work = destination / WORK
    there = sum(path.lstat().st_size for path in work.rglob("*") if not path.is_dir())
    parent = Path(os.path.realpath(destination))
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed + _SPARE_BYTES > there + free:
        needed = max(needed + _SPARE_BYTES - there, 0)
        raise CheckpointError(
            f"{destination}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB"
        )


def copy_files(source: Path, work: Path, names: Iterable[str]) -> None:
    """Copy files below `source` into the work folder; an earlier run's copies are removed."""
    copies = work / _COPIES
    if copies.exists():
        shutil.rmtree(copies)
    copies.mkdir()
    for name in names:
        (copies / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copies / name)


def publish(work: Path, destination: Path, weights: list[str], copies: Iterable[str]) -> None:
    """Move everything to its place, after removing the files of a checkpoint that was there."""
    if (work / CONFIG).exists():  # else only the work folder is left to remove
        (destination / CONFIG).unlink(missing_ok=True)
        new = {*weights, *copies, *([INDEX] if len(weights) > 1 else [])}
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for path in destination.glob(pattern):
                if path.name not in new:
                    path.unlink()
        moves = {work / name: name for name in weights}
        for path in sorted((work / _COPIES).rglob("*")):
            if path.is_file():
                moves[path] = str(path.relative_to(work / _COPIES))
        for path, name in {**moves, work / INDEX: INDEX, work / CONFIG: CONFIG}.items():
            if path.exists():
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, destination / name)
    shutil.rmtree(work)


def _read_json(path: Path) -> Any:
    """Return the file's content; None if there is no file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return "unreadable"


def replace_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write text atomically."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
