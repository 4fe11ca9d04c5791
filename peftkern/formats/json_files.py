"""JSON that somebody else wrote: bounded and plain, or refused in one line.

What gets past `parse_json` can be printed, compared and written again without a surprise:
`json.loads` alone also returns lists nested so deeply that `repr` or `json.dumps` fails on them,
integers that no float holds, and text that no encoding takes. NaN and Infinity are let through,
since configs of transformers hold them; who needs a number has to check it.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

BYTES_MAX = 1 << 27  # the largest index of a checkpoint that is known has a few megabytes
DEPTH_MAX = 64  # records and configs have less than ten levels
DIGITS_MAX = 308  # of an integer: a float holds all of those


def read_json(path: str | os.PathLike) -> Any:
    """Read the value in a regular file; links are followed.

    Raises: OSError if it cannot be read; ValueError naming the file and what is wrong with it: no
        regular file (nothing waits for a pipe), too long, or as `parse_json`.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ValueError(f"{path}: expected a file of JSON, got {kind}")
    if status.st_size > BYTES_MAX:
        raise ValueError(f"{path}: expected at most {BYTES_MAX} bytes of JSON")
    with open(path, "rb") as file:
        data = file.read()
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(data: bytes, *, unique: bool = False) -> Any:
    """Parse the value that UTF-8 bytes hold. unique: no object may have a name twice.

    Raises: ValueError in one line: not UTF-8, not JSON, an integer of more than DIGITS_MAX digits,
        nested deeper than DEPTH_MAX, text with half a surrogate pair, or a name twice.
    """
    try:
        hooks = {"object_pairs_hook": _unique if unique else None, "parse_int": _integer}
        value = json.loads(data.decode(), **hooks)
        _check_depth_and_text(value)
    except RecursionError:
        raise ValueError(
            f"expected JSON of at most {DEPTH_MAX} levels, got deeper nesting"
        ) from None
    except ValueError as error:  # UnicodeError is one
        raise ValueError(f"expected JSON in UTF-8, got {error}") from None
    return value


def brief(value: Any, length: int = 120) -> str:
    """Format a value for an error: printable in every terminal, cut where it is too long."""
    text = ascii(value)  # it may hold anything, also what a terminal obeys
    return text if len(text) <= length else text[: length - 3] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):  # parsers disagree about which of the two counts
        raise ValueError("an object that has a name twice")
    return values


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS_MAX:
        raise ValueError(f"an integer of more than {DIGITS_MAX} digits")
    return int(text)


def _check_depth_and_text(value: Any) -> None:
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # raises UnicodeEncodeError for half a surrogate pair
            elif depth == DEPTH_MAX and isinstance(item, (dict, list)):
                raise RecursionError
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
        level, depth = below, depth + 1
