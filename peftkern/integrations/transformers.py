"""AdaLoRA under transformers' Trainer, which by itself never calls `update_and_allocate`.

model = get_peft_model(base, AdaLoraConfig(total_step=..., ...))
peftkern.patch(model)  # optional
Trainer(model, ..., callbacks=[AdaLoraCallback()]).train()
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.adalora.model import AdaLoraModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AdaLoraCallback(TrainerCallback):
    """Prune an AdaLoRA model to its budget after every optimizer step.

    The Trainer announces `on_optimizer_step` between optimizer.step() and zero_grad(), once per
    step whatever the gradient accumulation: the order that PEFT documents, with gradients of the
    step and parameters after it. Steps count from 1, so that the masks are drawn at multiples of
    deltaT and become final at step total_step - tfinal. A step that the gradient scaler skips, for
    its gradients are not finite, leaves importance and masks alone. The Trainer knows how many
    steps it will take: a config with another total_step is told so, with a warning.

    Resuming from a checkpoint that the Trainer wrote after the first mask fails, as it does without
    this callback: PEFT saves fewer triplets than the new model has. Save the adapter with
    `save_pretrained` instead and load that.

    Raises: ValueError when training begins if no AdaLoRA adapter is trained, or if the number of
        steps leaves none for the allocation.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        tuner = _tuner(model)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        steps = state.max_steps
        if config.tinit >= steps - config.tfinal:
            raise ValueError(
                f"tinit, tfinal: expected tinit + tfinal below the {steps} steps of this training, "
                f"got {config.tinit} and {config.tfinal}"
            )
        if config.total_step != steps:
            warnings.warn(
                f"total_step of the AdaLoRA config is {config.total_step}, this training takes "
                f"{steps} steps: using {steps}",
                stacklevel=2,
            )
            tuner.rankallocator.set_total_step(steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        tuner, step = _tuner(model), state.global_step + 1
        config = tuner.peft_config[tuner.trainable_adapter_name]
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if skipped and step < config.total_step - config.tfinal:
            return  # from then on no gradient is read
        tuner.update_and_allocate(step)


def _tuner(model: nn.Module | None) -> AdaLoraModel:
    modules = () if model is None else model.modules()
    for module in modules:
        if isinstance(module, AdaLoraModel) and hasattr(module, "rankallocator"):
            return module
    raise ValueError("model: AdaLoraCallback expects an AdaLoRA adapter in training, found none")
