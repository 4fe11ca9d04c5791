"""Hugging Face PEFT: `patch` swaps the classes of a model's adapter layers, `unpatch` undoes it."""

from peftkern.integrations.peft import lora
from peftkern.integrations.peft.patch import PatchReport, is_patched, patch, patched, unpatch
from peftkern.integrations.peft.register import LoRAParts, register_layer

__all__ = [
    "LoRAParts",
    "PatchReport",
    "is_patched",
    "patch",
    "patched",
    "register_layer",
    "unpatch",
]

# Where models that were pickled whole look for the classes of their layers.
PatchedLinear = lora.PatchedLinear
if hasattr(lora, "PatchedLinear4bit"):  # where bitsandbytes is installed
    PatchedLinear4bit = lora.PatchedLinear4bit
