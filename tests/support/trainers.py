"""transformers' Trainer over the tiny Llama of peft_models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_models import text_batch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

ROWS, LENGTH = 4, 16


class Texts(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[0] for k, v in text_batch(rows=1, length=LENGTH, seed=i).items()}


def trainer(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any
) -> Trainer:
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    run = {"per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "use_cpu": True, "seed": 3}
    arguments = TrainingArguments(output_dir=str(folder), **{**quiet, **run, **options})
    data = {"train_dataset": Texts(), "eval_dataset": Texts()}
    return Trainer(model, arguments, callbacks=callbacks, **data)
