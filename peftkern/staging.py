"""A folder that is filled in a work folder inside of it, and is there whole or not at all.

The work folder belongs to one process and to one set of options, which a run that goes on with it
has to have, too. What is complete is moved, config.json last: without it nothing loads the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkern.checkpoint import CONFIG, INDEX, CheckpointError

WORK = ".peftkern-quantize"
_SPARE_BYTES = 1 << 24  # for the journal, the index and the copied files


def check_destination(source: Path, destination: Path, force: bool) -> None:
    """Raises: CheckpointError unless it is apart from the source, and empty, unfinished or, with
    `force`, a checkpoint."""
    here, there = os.path.realpath(source), os.path.realpath(destination)
    if os.path.commonpath([here, there]) in (here, there):
        raise CheckpointError(f"{destination}: expected a folder apart from the source {source}")
    if os.path.lexists(destination) and not destination.is_dir():
        raise CheckpointError(f"{destination}: expected a new or empty folder, got a file")
    held = sorted(path.name for path in destination.iterdir()) if destination.exists() else []
    if not held or WORK in held:
        return
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


@contextlib.contextmanager
def work_folder(destination: Path, identity: dict[str, Any], force: bool) -> Iterator[Path]:
    """The work folder of this very run, new or as it was left, and locked against a second one."""
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
                if path.name != "lock":
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
    """Raises: CheckpointError if that many bytes, less what is written already, do not fit."""
    work = destination / WORK
    there = sum(path.stat().st_size for path in work.iterdir()) if work.exists() else 0
    parent = Path(os.path.realpath(destination))
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed + _SPARE_BYTES > there + free:
        needed = max(needed + _SPARE_BYTES - there, 0)
        raise CheckpointError(
            f"{destination}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB"
        )


def publish(work: Path, destination: Path, weights: list[str]) -> None:
    """Move everything to its place; what a checkpoint that was there would mix in goes first."""
    if (work / CONFIG).exists():  # else all but the work folder's end is done
        (destination / CONFIG).unlink(missing_ok=True)
        new = {*weights, *([INDEX] if len(weights) > 1 else [])}
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for path in destination.glob(pattern):
                if path.name not in new:
                    path.unlink()
        copies = sorted(path.name for path in work.glob("copy of *"))
        for name in [*weights, *copies, INDEX, CONFIG]:
            if (work / name).exists():
                os.replace(work / name, destination / name.removeprefix("copy of "))
    shutil.rmtree(work)


def _read_json(path: Path) -> Any:
    """What the file holds; None if there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return "unreadable"


def replace_json(path: Path, value: Any) -> None:
    """The whole file or none of it."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """The whole file or none of it."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
