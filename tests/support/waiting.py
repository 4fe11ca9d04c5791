"""Waiting for another process: for as long as a busy machine needs, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

from tolerances import HANG_SECONDS


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {HANG_SECONDS} s"
        time.sleep(0.01)
