"""PeftKernCallback of Lightning in real Trainers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import add_lora, served_by_us, text_batch, tiny_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader

import peftkern

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from peftkern.integrations.lightning import PeftKernCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LAYERS = 4, 14
CALLBACK = PeftKernCallback


class Module(pl.LightningModule):
    """A tiny Llama with LoRA; `late` makes the adapter in the hook of that name."""

    def __init__(self, late: str | None = None) -> None:
        super().__init__()
        self.late, self.losses = late, []
        self.model: nn.Module = tiny_llama()
        if late is None:
            self._add_adapter()

    def setup(self, stage: str) -> None:
        if self.late == "setup":
            self._add_adapter()

    def configure_model(self) -> None:
        if self.late == "configure_model":
            self._add_adapter()

    def _add_adapter(self) -> None:
        self.model = add_lora(self.model)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches() -> DataLoader:
    return DataLoader([text_batch(seed=i) for i in range(STEPS)], batch_size=None)


def trainer(folder: Path, *callbacks: PeftKernCallback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False}
    return pl.Trainer(**quiet, **run, default_root_dir=folder, callbacks=[*callbacks], **options)


def fit(folder: Path, *callbacks: PeftKernCallback, late: str | None = None) -> list[float]:
    module = Module(late)
    peftkern.reset_stats()
    trainer(folder, *callbacks).fit(module, batches())
    return module.losses


@pytest.mark.parametrize("late", [None, "setup", "configure_model"])
def test_the_losses_are_those_without_it(tmp_path, late):
    expected = fit(tmp_path, late=late)
    assert served_by_us() == 0
    callback = CALLBACK()
    losses = fit(tmp_path, callback, late=late)
    assert served_by_us() == STEPS * LAYERS
    assert len(callback.report.patched) == LAYERS
    assert len(losses) == STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


def test_validation_alone_is_patched_too(tmp_path):
    module, callback = Module(), CALLBACK()
    peftkern.reset_stats()
    trainer(tmp_path, callback).validate(module, batches(), verbose=False)
    assert served_by_us() == STEPS * LAYERS


def test_what_was_patched_is_said_once(tmp_path, caplog):
    callback = CALLBACK()
    with caplog.at_level(logging.INFO, "lightning"):
        fit(tmp_path, callback)
        fit(tmp_path, callback)
    said = [r.message for r in caplog.records if "peftkern" in r.message]
    assert said == [f"peftkern: {callback.report}"]
    assert said[0].startswith("peftkern: 14 patched (lora.Linear 14), 0 skipped")
