"""Folders that commands write to."""

from __future__ import annotations

import os
from pathlib import Path


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
