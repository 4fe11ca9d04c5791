"""Hugging Face PEFT: `patch` swaps the classes of a model's adapter layers, `unpatch` undoes it."""

from peftkern.integrations.peft.serve import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
