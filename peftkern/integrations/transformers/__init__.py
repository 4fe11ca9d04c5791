"""Hugging Face transformers: callbacks of the Trainer, LongLoRA's attention, NF4 experts."""

from peftkern.integrations.transformers.callbacks import (
    AdaLoraCallback,
    MonitorCallback,
    PeftKernCallback,
)
from peftkern.integrations.transformers.nf4_experts import NF4ExpertsConfig

__all__ = ["AdaLoraCallback", "MonitorCallback", "NF4ExpertsConfig", "PeftKernCallback"]
