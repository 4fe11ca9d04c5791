"""Lightning: a callback that has the LoRA layers of a module served by peftkern.

trainer = lightning.Trainer(callbacks=[PeftKernCallback()])
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from peftkern.integrations.peft import PatchReport, patch

__all__ = ["PeftKernCallback"]


class PeftKernCallback(pl.Callback):
    """Callback that patches the LightningModule, as `peftkern.patch`.

    It patches in `setup`, before a strategy wraps the module, and looks again when fitting begins,
    for adapters that the module's own `setup` or `configure_model` made. What was patched is in
    `report` and is said once, by the first process.

    Args: options, those of `peftkern.patch`.
    """

    def __init__(self, **options: Any) -> None:
        self.report: PatchReport | None = None
        self._options = options

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Patch a module whose adapters are there before the run."""
        self._patch(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Patch the adapters that came since."""
        self._patch(pl_module)

    def _patch(self, module: pl.LightningModule) -> None:
        before, self.report = self.report, patch(module, **self._options)
        if str(self.report) != str(before):
            rank_zero_info(f"peftkern: {self.report}")
