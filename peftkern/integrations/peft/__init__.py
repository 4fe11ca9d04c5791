"""Hugging Face PEFT: `patch` swaps the classes of a model's adapter layers, `unpatch` undoes it."""

from peftkern.integrations.peft import lora
from peftkern.integrations.peft.patch import PatchReport, is_patched, patch, patched, unpatch

__all__ = ["PatchReport", "is_patched", "patch", "patched", "unpatch"]

# Where models that were pickled whole look for the classes of their layers.
PatchedLinear = lora.PatchedLinear
if hasattr(lora, "PatchedLinear4bit"):  # where bitsandbytes is installed
    PatchedLinear4bit = lora.PatchedLinear4bit
