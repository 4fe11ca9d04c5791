"""Folders that commands write to."""

from __future__ import annotations

import os
from pathlib import Path


def check_apart(
    path: Path,
    error: type[Exception],
    *sources: str | os.PathLike | None,
    within: bool = False,
) -> None:
    """Raise `error` where a folder to write is one that is read, or one of them is in the other.

    Links are followed. sources: folders, or files, which a folder beside them is apart from;
    within: take a folder in one that is read, too, as adapters are kept beside their model.
    """
    there = os.path.realpath(path)
    for source in sources:
        if source is not None:
            here = os.path.realpath(source)
            common = os.path.commonpath([here, there])
            if common == there or (common == here and not within):
                raise error(f"{path}: expected a folder apart from the source {source}")


def held(path: Path, error: type[Exception]) -> list[str]:
    """Return what a folder holds that is to be written, nothing if it is new.

    Raises: `error` where a file is in its place, or above it.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise error(f"{path}: expected a new or empty folder, got a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise error(f"{path}: expected a new or empty folder, but {above} is a file")
    return sorted(one.name for one in path.iterdir()) if path.exists() else []
