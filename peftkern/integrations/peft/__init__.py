"""Hugging Face PEFT: `patch` swaps the classes of a model's adapter layers, `unpatch` undoes it."""

from peftkern.integrations.peft.lora import PatchedLinear, PatchedLinear4bit
from peftkern.integrations.peft.patch import PatchReport, patch, unpatch

__all__ = ["PatchReport", "PatchedLinear", "PatchedLinear4bit", "patch", "unpatch"]
