"""Advice of other libraries, kept out of what is told here."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers and bitsandbytes log nothing but errors, and afterwards what they did."""
    import transformers  # noqa: F401  # which sets its level

    loggers = logging.getLogger("transformers"), logging.getLogger("bitsandbytes")
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
