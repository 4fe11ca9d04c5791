"""`peftkern.quantize_`: `layers.quantize_`, and word of it to transformers, which then saves."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from peftkern import layers

__all__ = ["quantize_"]


@functools.wraps(layers.quantize_)
def quantize_(model: nn.Module, **options: Any) -> list[str]:
    names = layers.quantize_(model, **options)
    if names and "transformers" in sys.modules:
        try:
            from peftkern.integrations.transformers.nf4_experts import describe
        except ImportError:  # before transformers 5, or without bitsandbytes, nothing would load it
            return names
        describe(model)
    return names
