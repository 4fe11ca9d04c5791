"""What every command shares: how bad input ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXIT_BAD_INPUT = 2


class InputError(Exception):
    """What the user gave cannot be used; the message says what came and what is accepted."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Around the calls whose ValueError or OSError is about what the user gave, and around no more:
    the same error from elsewhere is a defect and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error
