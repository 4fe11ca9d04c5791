"""What a call costs in calls, which no other work on the machine changes as it changes seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType


def calls_of(function: Callable[..., object], *args: object, **kwargs: object) -> list[str]:
    """The names of all Python and C functions that a call comes to, its own first.

    Garbage is not collected meanwhile: what is told of that, Hypothesis for one, is called, too.
    """
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            called.append(frame.f_code.co_name if event == "call" else argument.__name__)

    gc.disable()
    sys.setprofile(note)
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
        gc.enable()
    return called[:-1]  # without setprofile
