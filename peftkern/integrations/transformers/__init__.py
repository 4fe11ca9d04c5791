"""Hugging Face transformers: callbacks of the Trainer, and LongLoRA's attention."""

from peftkern.integrations.transformers.callbacks import (
    AdaLoraCallback,
    MonitorCallback,
    PeftKernCallback,
)

__all__ = ["AdaLoraCallback", "MonitorCallback", "PeftKernCallback"]
