"""What the forward op of a layer leaves to the backward op, which would make it again."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor

from peftkern.backends import ops

_kept: ContextVar[list[Tensor] | None] = ContextVar("peftkern_kept", default=None)


def run(kept: list[Tensor], op: str, *args: Any) -> Any:
    """Call an op that may leave a tensor in an empty list, or may find the one that was left."""
    token = _kept.set(kept)
    try:
        return ops.run(op, *args)
    finally:
        _kept.reset(token)


def find() -> Tensor | None:
    """Return what the forward op has left."""
    kept = _kept.get()
    return kept[0] if kept else None


def leave(tensor: Tensor) -> None:
    """Leave a tensor to the backward op, if its caller saves it."""
    kept = _kept.get()
    if kept is not None:
        kept.append(tensor)
