"""Hugging Face transformers: callbacks of the Trainer, and LongLoRA's attention."""

from peftkern.integrations.transformers.callbacks import MonitorCallback, PeftKernCallback

__all__ = ["MonitorCallback", "PeftKernCallback"]
