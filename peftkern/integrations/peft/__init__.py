"""Hugging Face PEFT: `patch` swaps the classes of a model's adapter layers, `unpatch` undoes it."""

from peftkern.integrations.peft.patch import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
