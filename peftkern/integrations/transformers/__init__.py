"""Hugging Face transformers: callbacks of the Trainer, LongLoRA's attention, NF4 experts."""

from typing import Any

from peftkern.integrations.frozen_experts import serve_nf4_experts, stop_serving
from peftkern.integrations.transformers.callbacks import (
    AdaLoraCallback,
    MonitorCallback,
    PeftKernCallback,
)

__all__ = [
    "AdaLoraCallback",
    "MonitorCallback",
    "NF4ExpertsConfig",
    "PeftKernCallback",
    "serve_nf4_experts",
    "stop_serving",
]


def __getattr__(name: str) -> Any:
    if name == "NF4ExpertsConfig":  # which needs transformers 5, and registers a quantizer there
        from peftkern.integrations.transformers.nf4_experts import NF4ExpertsConfig

        return NF4ExpertsConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
