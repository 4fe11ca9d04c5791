"""AdaLoRA in any training loop: ranks are allocated after every step of the optimizer.

steps = AdaLoraSteps(model, optimizer, total_step=1000)  # instead of update_and_allocate
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora.model import AdaLoraModel
from torch import nn

from peftkern.integrations.peft import zero
from peftkern.integrations.peft.adalora_budget import set_budget
from peftkern.integrations.peft.adalora_compact import FINAL, Compaction, watch_states
from peftkern.integrations.peft.adalora_layers import (
    find_tuner,
    layers_of,
    parameters_of,
    widen_diagonals,
)
from peftkern.integrations.peft.adalora_state import load_allocator, load_state, save_state
from peftkern.integrations.peft.adalora_state_dict import (
    fit_when_loading,
    load_state_dict,
    state_dict,
)
from peftkern.integrations.peft.patch import is_patched, patch
from peftkern.methods.processes import agree, check_not_flat, several, whole
from peftkern.methods.rank_budget import RankBudget

__all__ = ["AdaLoraSteps"]


class AdaLoraSteps:
    """Allocation of the ranks of an AdaLoRA model by the steps that its optimizer takes.

    A step is taken in when the optimizer has made it and before zero_grad(), the order that PEFT
    documents: gradients of the step, after clipping, and parameters after it. Steps that
    accumulate gradients, or that a gradient scaler skips, call no optimizer and do not count. What
    is not patched yet is (`peftkern.patch`), and lora_E is kept in float32: before DDP, therefore.
    Where several processes train, every mask is compared, and one that differs is an error.

    Under DeepSpeed's ZeRO this is made after `deepspeed.initialize`, in every process: ranks are
    allocated within engine.step(), and masks reach the masters that its optimizer keeps.

    Args:
        model: the PeftModel, or what wraps it.
        optimizer: of torch, accelerate's around one, or DeepSpeed's.
        total_step: steps of this training, which the config's schedule is set to.
        budget: in other units than triplets, with floors and caps per layer; by default target_r of
            the config, and PEFT's masks.
        compact: when pruned triplets leave parameters and optimizer, see
            `adalora_compact.Compaction`: "final", with the last mask; a step, with every mask from
            that one on; None, never.

    Raises: ValueError if no AdaLoRA adapter is trained, if so many steps leave none for the
        allocation, for another `compact`, or as `RankBudget.limits`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_step: int,
        *,
        budget: RankBudget | None = None,
        compact: str | int | None = FINAL,
    ) -> None:
        self._compaction = Compaction(compact)
        self.tuner = prepare(model)
        self.step = 0
        set_total_step(self.tuner, total_step, self.step)
        set_budget(self.tuner, budget)
        self._model = next(m for m in model.modules() if isinstance(m, PeftModel))
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._parameters = parameters_of(self.tuner)
        self._held = zero.held(self._parameters)
        if self._held:
            self._ends = [zero.after_steps(optimizer, self._held, self._take_in)]
            return
        watch_states(self.tuner, self._optimizer)
        self._ends = [handle.remove for handle in fit_when_loading(self.tuner)]
        self._ends.append(self._optimizer.register_step_post_hook(self._take_in).remove)

    def close(self) -> None:
        """Leave the optimizer: its further steps allocate nothing."""
        for end in self._ends:
            end()

    def save(self, folder: str | os.PathLike[str], *, write: bool = True) -> None:
        """Write, in one process, the adapter as PEFT does and beside it what `load` needs.

        Args: write, False in all processes but one, where DeepSpeed's ZeRO-3 has them gather it.
        """
        if write:
            os.makedirs(folder, exist_ok=True)
        with zero.whole(self._held):
            if write:
                self._model.save_pretrained(str(folder))
        save_state(self.tuner, folder, self.step, write=write)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on where `save` was called, bit for bit if the optimizer's state is loaded, too.

        Under DeepSpeed that is `engine.load_checkpoint`, which also loads the parameters.
        Raises: ValueError if the folder has no such state, or is of another model.
        """
        if self._held:
            state = load_allocator(self.tuner, folder)
        else:
            state = load_state(self._model, folder)
        if state.step < 0:
            raise ValueError(f"{folder}: expected a folder that AdaLoraSteps.save wrote")
        self.step = state.step

    def state_dict(self) -> dict[str, bytes]:
        """Return masks, importance, schedule and step, for what also saves the model's parameters.

        accelerator.register_for_checkpointing(steps), or {"model": ..., "adalora": steps} for
        torch.distributed.checkpoint.
        """
        return state_dict(self.tuner, self.step)

    def load_state_dict(self, state: Mapping[str, bytes]) -> None:
        """Go on after the step of `state_dict`; the model's parameters of that step come first.

        A model from which compaction has dropped triplets loads, too, with this object made before;
        torch.distributed.checkpoint alone wants the shapes that it had.
        Raises: ValueError if it is the state of another model, or of parameters not loaded yet.
        """
        self.step = load_state_dict(self.tuner, state)

    def _take_in(self, optimizer: Any = None, *args: Any) -> None:
        if isinstance(optimizer, torch.optim.Optimizer) and not _is_real(optimizer):
            return
        if not self._held and zero.held(self._parameters[:1]):
            raise ValueError(
                "model: DeepSpeed has taken it over since: make AdaLoraSteps after "
                "deepspeed.initialize"
            )
        self.step += 1
        if allocate(self.tuner, self.step):
            self._compaction.after(self.tuner, self.step, self._optimizer)


def _is_real(optimizer: torch.optim.Optimizer) -> bool:
    """Return False of the step by which torch.distributed.checkpoint has an optimizer make states:
    it sets all gradients and learning rates to zero."""
    if any(float(group.get("lr", 1)) for group in optimizer.param_groups):
        return True
    grads = (p.grad for group in optimizer.param_groups for p in group["params"])
    return any(bool(whole(grad).any()) for grad in grads if grad is not None)


def prepare(model: nn.Module | None) -> AdaLoraModel:
    """Return the AdaLoRA model inside, patched if nothing is, with its diagonals in float32.

    Raises: ValueError if there is none in training, or FSDP1 holds it in flat parameters.
    """
    tuner = find_tuner(model)
    if tuner is None:
        raise ValueError("model: expected an AdaLoRA adapter in training, found none")
    name = tuner.trainable_adapter_name
    for path, layer in layers_of(tuner).items():
        check_not_flat(f"{path}.lora_E", layer.lora_E[name], "AdaLoRA")
    if not is_patched(model):
        patch(model)
    widen_diagonals(tuner)
    return tuner


def set_total_step(tuner: AdaLoraModel, total_step: int, step: int) -> None:
    """Set the schedule to a training of so many steps, `step` of which are done.

    After the last mask the schedule stays as it is, for another would let pruned triplets revive.
    Raises: ValueError if it leaves no steps for the allocation.
    """
    config = tuner.peft_config[tuner.trainable_adapter_name]
    if config.total_step == total_step:
        return
    if config.rank_pattern and step >= config.total_step - config.tfinal:
        return
    if config.tinit >= total_step - config.tfinal:
        raise ValueError(
            f"tinit, tfinal: expected tinit + tfinal below the {total_step} steps of this "
            f"training, got {config.tinit} and {config.tfinal}"
        )
    warnings.warn(
        f"total_step of the AdaLoRA config is {config.total_step}, this training takes "
        f"{total_step} steps: using {total_step}",
        stacklevel=3,
    )
    tuner.rankallocator.set_total_step(total_step)


def allocate(tuner: AdaLoraModel, step: int, *, skipped: bool = False) -> bool:
    """Take in a step, counting from 1; compare the mask with those of the other processes.

    Args: skipped, whether a gradient scaler left the step out: then no gradient is read.
    Returns: whether a mask is in place now.
    Raises: RuntimeError if other processes drew another mask.
    """
    config = tuner.peft_config[tuner.trainable_adapter_name]
    last = config.total_step - config.tfinal
    if not skipped or step >= last:
        tuner.update_and_allocate(step)
    draws = step == last or (step < last and tuner.rankallocator.budget_schedule(step)[1])
    if draws and several():
        _compare_masks(tuner, step)
    masked = step >= last or (draws and not skipped)
    if masked and zero.is_within_step():
        name = tuner.trainable_adapter_name
        zero.zero_masters(zero.held(layer.lora_E[name] for layer in layers_of(tuner).values()))
    return masked


def _compare_masks(tuner: AdaLoraModel, step: int) -> None:
    """Raise where masks differ among processes."""
    name = tuner.trainable_adapter_name
    kept = list((tuner.peft_config[name].rank_pattern or {}).values())
    device = next(p for n, p in tuner.named_parameters() if "lora_E" in n).device
    if not agree(repr(kept).encode(), device):
        raise RuntimeError(
            f"AdaLoRA: the mask of step {step} is not the same in all processes; gradients must be "
            "reduced, and parameters equal, before update_and_allocate"
        )
