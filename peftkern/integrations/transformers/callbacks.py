"""Callbacks of transformers' Trainer: patching, monitoring, and AdaLoRA's rank allocation.

trainer = Trainer(model, ..., callbacks=[PeftKernCallback(), AdaLoraCallback()])
MonitorCallback.attach(trainer, jsonl="run.jsonl")
trainer.train()
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkern.integrations.packages import needed_by
from peftkern.monitor import FIELDS, TrainingMonitor, scalars

with needed_by("peftkern.integrations.transformers"):
    from peft import PeftModel
    from peft.tuners.adalora.model import AdaLoraModel
    from tqdm.auto import tqdm
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import logging as transformers_logging

    from peftkern.integrations.peft import zero
    from peftkern.integrations.peft.adalora_budget import set_budget
    from peftkern.integrations.peft.adalora_compact import FINAL, Compaction, watch_states
    from peftkern.integrations.peft.adalora_layers import find_tuner, layers_of, parameters_of
    from peftkern.integrations.peft.adalora_state import (
        keep_state_when_loading,
        load_allocator,
        save_state,
    )
    from peftkern.integrations.peft.adalora_steps import allocate, prepare, set_total_step
    from peftkern.integrations.peft.patch import PatchReport, patch
    from peftkern.methods.processes import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import Trainer

    from peftkern.integrations.peft.adalora import DrawnMask
    from peftkern.methods.rank_budget import RankBudget

__all__ = ["AdaLoraCallback", "MonitorCallback", "PeftKernCallback"]
logger = logging.getLogger("peftkern")
_LOGGED = ("loss", "grad_norm", "learning_rate")  # of the Trainer, also in the JSONL records


class PeftKernCallback(TrainerCallback):
    """Callback that patches the Trainer's model, as `peftkern.patch`, before accelerate wraps it.

    It patches when the Trainer is made. When training begins it looks again: at a callback that was
    added later, a model that `model_init` made, or adapters that came in between. What was patched
    is in `report` and is said once, by the first process: through logging, and where that does not
    show level INFO, as by default, as the Trainer writes its own logs, unless transformers or the
    logger "peftkern" are told to say less than warnings. Layers that were skipped, fall back or are
    never called are a warning, and so is a model without any.

    Args: args and trainer are not read; ms-swift gives them to every callback. options are those
        of `peftkern.patch`.
    """

    def __init__(
        self,
        args: TrainingArguments | None = None,
        trainer: Trainer | None = None,
        **options: Any,
    ) -> None:
        self.report: PatchReport | None = None
        self._options = options
        self._said: set[str] = set()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            self._patch(model, state)

    on_train_begin = on_init_end

    def _patch(self, model: nn.Module, state: TrainerState) -> None:
        self.report = patch(model, **self._options)
        said = f"peftkern: {self.report}"
        if said in self._said or not state.is_world_process_zero:
            return
        self._said.add(said)
        levels = logger.getEffectiveLevel(), transformers_logging.get_verbosity()
        if not self.report.patched or self.report.unserved:
            logger.warning("%s", said)
        elif logger.isEnabledFor(logging.INFO):
            logger.info("%s", said)
        elif max(levels) <= logging.WARNING:
            tqdm.write(said)  # to stdout, above a progress bar if there is one


class MonitorCallback(TrainerCallback):
    """Measurements of `peftkern.monitor.TrainingMonitor` in the Trainer's own log.

    Every log of training gets the numbers since the one before as "peftkern/tokens_per_second",
    "peftkern/step_seconds", "peftkern/cuda_allocated_bytes" and so on, see FIELDS there. They reach
    TensorBoard, W&B and other reporters through `attach`: a callback in the list that Trainer takes
    comes after the reporters, and reaches `state.log_history` and the progress bar alone.

    Tokens are those that the shapes of the inputs of this process tell, padding included, without
    passes that take no gradient, as of a reference; with `include_num_input_tokens_seen` they are
    what the Trainer counted, in all processes. They are missing under `torch_compile` without that
    option. Loading data is part of a step; evaluating and saving are not, though the calls of an
    evaluation count with those of the next steps.

    Of an AdaLoRA model the file also gets, with each mask, the ranks and importance of all layers,
    and which triplets it pruned or let revive. The log gets "peftkern/adalora_rank", the triplets
    that are kept, "peftkern/adalora_pruned", how many were pruned since the log before, and of the
    last mask "peftkern/adalora_budget" and "peftkern/adalora_importance", the mean over triplets.

    Args: jsonl, a file for the records (only of the first process); device, as for TrainingMonitor.
    """

    def __init__(
        self,
        *,
        jsonl: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.monitor: TrainingMonitor | None = None
        self._options = {"jsonl": jsonl, "device": device}
        self._hook: Any = None
        self._tokens = 0
        self._tuner: AdaLoraModel | None = None
        self._pattern: dict[str, list[bool]] | None = None
        self._drawn: DrawnMask | None = None
        self._adalora: dict[str, float] = {}
        self._pruned = 0  # triplets, since the last log

    @classmethod
    def attach(cls, trainer: Trainer, **options: Any) -> MonitorCallback:
        """Add a callback in front of all others of a Trainer, its reporters among them."""
        callback = cls(**options)
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._stop()  # of a training that was interrupted
        self._counted = args.include_num_input_tokens_seen not in ("no", False)
        self._tokens = state.num_input_tokens_seen if self._counted else 0
        options = {**self._options, "device": self._options["device"] or args.device}
        if not state.is_world_process_zero:
            options["jsonl"] = None
        self.monitor = TrainingMonitor(**options, every=0).start()
        if model is not None and not self._counted and not args.torch_compile:
            self._hook = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self._tuner = find_tuner(model)
        self._adalora, self._pruned = {}, 0
        if self._tuner is not None:
            self._drawn = getattr(self._tuner.rankallocator, "drawn", None)
            self._write_ranks(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._counted:
            tokens = state.num_input_tokens_seen - self._tokens
            self._tokens = state.num_input_tokens_seen
        else:
            tokens, self._tokens = self._tokens, 0
        self.monitor.step(tokens)
        if self._tuner is not None and self._pattern is not _rank_pattern(self._tuner):
            self._write_ranks(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.monitor is None or not self.monitor.running or not logs or "loss" not in logs:
            return  # an evaluation, or what is said when all is done
        values = {name: logs[name] for name in _LOGGED if isinstance(logs.get(name), float)}
        record = self.monitor.record(global_step=state.global_step, **values, **self._adalora)
        if record is None:
            return
        told = FIELDS | self._adalora.keys()
        added = {f"peftkern/{k}": v for k, v in scalars(record).items() if k in told}
        if self._adalora:  # of each mask the file has which were pruned
            added["peftkern/adalora_pruned"], self._pruned = self._pruned, 0
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)  # the Trainer has stored its copy by now

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.monitor is not None and self.monitor.running:
            self.monitor.skip()

    on_save = on_evaluate

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._stop()

    def _write_ranks(self, state: TrainerState) -> None:
        """Write the mask that is there, and what it was drawn from; before the first one all."""
        adapter = self._tuner.trainable_adapter_name
        # Saving makes another pattern of the same mask.
        self._pattern = _rank_pattern(self._tuner)
        layers = layers_of(self._tuner).items()
        pattern = {n: [True] * len(layer.lora_E[adapter]) for n, layer in layers}
        for name, kept in (self._pattern or {}).items():
            pattern[name.partition(".lora_E")[0]] = kept
        drawn, values = getattr(self._tuner.rankallocator, "drawn", None), {}
        if drawn is not None and drawn is not self._drawn:
            self._drawn = drawn
            values = {"importance": drawn.layer_importance(), "budget": drawn.budget}
            self._adalora["adalora_budget"] = float(drawn.budget)
            self._adalora["adalora_importance"] = float(drawn.scores.double().mean())
        moved = self.monitor.ranks(pattern, global_step=state.global_step, **values)
        self._adalora["adalora_rank"] = moved["kept"]
        self._pruned += moved["pruned"]

    def _count_tokens(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        # A reference reads what the policy reads, in the training mode of trainers that ask both.
        if model.training and torch.is_grad_enabled() and isinstance(inputs, torch.Tensor):
            self._tokens += inputs.shape[:2].numel()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.monitor is not None:
            self.monitor.close()


class AdaLoraCallback(TrainerCallback):
    """Callback that prunes an AdaLoRA model to its budget after every optimizer step.

    It patches a model that nothing has patched before (put PeftKernCallback, with its options and
    its report, in front if you want those), and keeps lora_E in float32 where a trainer casts
    adapters to 16 bits.

    The Trainer announces `on_optimizer_step` between optimizer.step() and zero_grad(), once per
    step whatever the gradient accumulation: the order that PEFT documents, with gradients of the
    step and parameters after it. Steps count from 1, so that the masks are drawn at multiples of
    deltaT and become final at step total_step - tfinal. A step that the gradient scaler skips, for
    its gradients are not finite, leaves importance and masks alone. The Trainer knows how many
    steps it will take: a config with another total_step is told so, with a warning. In several
    processes each mask is compared, and a difference is an error.

    A checkpoint of the Trainer has, beside the adapter that PEFT makes of the triplets kept so far,
    a file with all of them, their importance and the schedule. Resuming and
    `load_best_model_at_end` read it and go on bit for bit; give the callback to the Trainer's
    constructor for that. A checkpoint without the file resumes with a warning; in a hyperparameter
    search only trials with a name (hp_name) have it.

    With the last mask, after which no triplet revives, what it has pruned leaves the parameters,
    their gradients and the optimizer's states, also under DistributedDataParallel: steps get
    faster and smaller, the outputs stay. The orthogonality loss and the norm of gradients to clip
    no longer count it. Where that cannot be (FSDP, DeepSpeed, a state that is not understood) a
    warning says so.

    Args: budget, a `peftkern.methods.RankBudget` in other units than triplets, with floors and caps
        per layer; by default target_r of the config, and PEFT's masks. A checkpoint keeps its own.
        compact, when pruned triplets leave the model: "final"; a step, from which on every mask
        that is drawn drops what it prunes, which then cannot revive; None, never, as in PEFT.
    Raises: ValueError when training begins if no AdaLoRA adapter is trained, if the number of steps
        leaves none for the allocation, or as `RankBudget.limits`; at once for another `compact`.
    """

    def __init__(
        self, *, budget: RankBudget | None = None, compact: str | int | None = FINAL
    ) -> None:
        self._budget = budget
        self.compact = compact
        self._compaction = Compaction(compact)
        self._end: Callable[[], None] | None = None  # of the hold on DeepSpeed's optimizer

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if find_tuner(model) is not None:
            prepare(model)
        if isinstance(model, PeftModel):
            keep_state_when_loading(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        tuner = prepare(model)
        set_total_step(tuner, state.max_steps, state.global_step)
        set_budget(tuner, self._budget)
        self._compaction = Compaction(self.compact)
        if self._end is not None:  # of a training that was interrupted
            self._end()
        held = zero.held(parameters_of(tuner))
        if state.global_step and _in_parts(tuner):
            self._go_on(tuner, _folder_of(args, state))
        if held:
            self._end = zero.after_steps(
                kwargs.get("optimizer"),
                held,
                lambda: self._take_in(tuner, state.global_step + 1),
            )
        elif kwargs.get("optimizer") is not None:
            watch_states(tuner, kwargs["optimizer"])

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._end is not None:  # DeepSpeed, whose step has dropped the gradients by now
            return
        optimizer = kwargs.get("optimizer")
        skipped = getattr(optimizer, "step_was_skipped", False)
        self._take_in(find_tuner(model), state.global_step + 1, optimizer, skipped)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_hyper_param_search and state.trial_name is None:
            warnings.warn(
                "AdaLoRA's state is not in the checkpoints of a hyperparameter search without "
                "hp_name: they resume with another importance of the triplets",
                stacklevel=2,
            )
            return
        folder = _folder_of(args, state)
        write = args.should_save and os.path.isdir(folder)
        save_state(find_tuner(model), folder, state.global_step, write=write)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._end is not None:
            self._end()
            self._end = None
        tuner = find_tuner(model)
        if args.load_best_model_at_end and state.best_model_checkpoint and _in_parts(tuner):
            self._go_on(tuner, state.best_model_checkpoint)
        config = tuner.peft_config[tuner.trainable_adapter_name]
        last = config.total_step - config.tfinal
        if state.global_step < last and state.is_world_process_zero:
            logger.warning(
                "peftkern: AdaLoRA stopped at step %d, before the last mask at step %d: the budget "
                "is not reached. save_pretrained drops what has revived since the mask before; "
                "peftkern.export_lora keeps it",
                state.global_step,
                last,
            )

    def _take_in(
        self,
        tuner: AdaLoraModel,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        skipped: bool = False,
    ) -> None:
        if allocate(tuner, step, skipped=skipped):
            self._compaction.after(tuner, step, optimizer)

    def _go_on(self, tuner: AdaLoraModel, folder: str) -> None:
        """Load what an engine's own checkpoint has not: the importance, and the mask."""
        try:
            load_allocator(tuner, folder)
        except ValueError as error:
            warnings.warn(
                f"AdaLoRA resumes with another importance of the triplets: {error}", stacklevel=2
            )


def _in_parts(tuner: AdaLoraModel) -> bool:
    """Return whether DeepSpeed or FSDP2 has the parameters, and loads them past `load_adapter`."""
    parameters = parameters_of(tuner)
    return bool(zero.held(parameters)) or any(map(is_sharded, parameters))


def _folder_of(args: TrainingArguments, state: TrainerState) -> str:
    """Return the folder of the checkpoint of this step; of a trial only hp_name is known."""
    trial = [state.trial_name] if state.is_hyper_param_search and state.trial_name else []
    return os.path.join(args.output_dir, *trial, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _rank_pattern(tuner: AdaLoraModel) -> dict[str, list[bool]] | None:
    return tuner.peft_config[tuner.trainable_adapter_name].rank_pattern
