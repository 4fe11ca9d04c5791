"""Formats of quantized weights that the kernels of each back end decode.

A call over any other goes to the next back end: Triton's kernels and torch's own operations decode
them all.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftkern.formats.table import FORMATS

_DECODED = {
    "cuda": {"nf4", "fp4"},
    "cpu": {"nf4", "fp4", "mxfp4", "nvfp4", "int4"},
}
_NUMBERS = {
    backend: tuple(number for number, row in enumerate(FORMATS) if row.name in names)
    for backend, names in _DECODED.items()
}


def refusal_format(backend: str, layout: Sequence[int]) -> str | None:
    """Refuse a weight of a format that a back end does not decode.

    What is no format at all is left to the checks of whoever reads the weight.
    """
    number = layout[0]
    if number in _NUMBERS[backend] or not 0 <= number < len(FORMATS):
        return None
    return f"no kernel decodes {FORMATS[number].name}"
