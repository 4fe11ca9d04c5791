"""PeftKernCallback and MonitorCallback in real Trainers."""

from __future__ import annotations

import functools
import json
import logging

import adalora_runs
import pytest
import torch
import trainers
import transformers
from adalora_models import adalora_llama
from peft_models import add_lora, patched_copy, served_by_us, tiny_llama
from trainers import LENGTH, ROWS, Texts
from transformers import Trainer, TrainerCallback, TrainingArguments

import peftkern
from peftkern.backends.cpu.module import cpu_isa
from peftkern.integrations.peft.lora import PatchedLinear
from peftkern.integrations.transformers.callbacks import (
    AdaLoraCallback,
    MonitorCallback,
    PeftKernCallback,
)
from peftkern.methods import RankBudget

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 5
LAYERS = 14
LOGGER = "peftkern"


@pytest.fixture(autouse=True)
def as_transformers_speaks_by_itself():
    """Whatever in this process has told it to be quiet, as plans do."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield
    transformers.logging.set_verbosity(before)


class Reporter(TrainerCallback):
    """Keeps what TensorBoard and W&B get: the logs, at the place where they stand in the list."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


trainer = functools.partial(trainers.trainer, max_steps=STEPS)


def training_logs(done: Trainer) -> list[dict]:
    return [entry for entry in done.state.log_history if "loss" in entry]


SAID = f"peftkern: 14 patched (lora.Linear 14), 0 skipped; on cpu: C++ ({cpu_isa()})"


def patched_layers(model) -> int:
    return sum(type(module) is PatchedLinear for module in model.modules())


def test_patches_when_the_trainer_is_made(tmp_path, caplog):
    model = add_lora(tiny_llama())
    by_hand = patched_copy(model)
    callback = PeftKernCallback()
    with caplog.at_level(logging.INFO, LOGGER):
        run = trainer(model, tmp_path, [callback])
        assert patched_layers(model) == len(callback.report.patched) == LAYERS
        peftkern.reset_stats()
        run.train()
    assert served_by_us() == STEPS * LAYERS
    said = [(r.levelname, r.message) for r in caplog.records if r.name == LOGGER]
    assert said == [("INFO", SAID)]
    other = trainer(by_hand, tmp_path)
    other.train()
    losses = [[entry["loss"] for entry in training_logs(one)] for one in (run, other)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_patches_late_and_only_once(tmp_path, caplog):
    model = add_lora(tiny_llama())
    run = trainer(model, tmp_path)
    assert patched_layers(model) == 0
    run.add_callback(PeftKernCallback())
    with caplog.at_level(logging.INFO, LOGGER):
        run.train()
        run.train()
    assert patched_layers(model) == LAYERS
    assert len([r for r in caplog.records if r.name == LOGGER]) == 1


@pytest.mark.parametrize(("disable_tqdm", "late"), [(True, False), (False, True)])
def test_what_was_patched_is_seen_once_in_a_trainer_s_output(tmp_path, capfd, disable_tqdm, late):
    callback = PeftKernCallback()
    model = add_lora(tiny_llama())
    callbacks = [] if late else [callback]
    run = trainer(model, tmp_path, callbacks, max_steps=1, disable_tqdm=disable_tqdm)
    if late:
        run.add_callback(callback)
    run.train()
    run.train()
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "peftkern" in line] == [SAID]
    assert "peftkern" not in err and ("1/1" in err) != disable_tqdm


@pytest.mark.parametrize("level", ["error", "critical"])
def test_a_trainer_or_logger_that_is_told_to_be_quiet_is_quiet(tmp_path, capfd, caplog, level):
    before = transformers.logging.get_verbosity()
    try:
        trainer(add_lora(tiny_llama()), tmp_path, [PeftKernCallback()], log_level=level)
    finally:
        transformers.logging.set_verbosity(before)
    with caplog.at_level(logging.ERROR, LOGGER):
        trainer(add_lora(tiny_llama()), tmp_path, [PeftKernCallback()])
    assert "peftkern" not in "".join(capfd.readouterr())


def test_another_report_is_said_and_an_earlier_one_not_again(tmp_path, capfd):
    callback = PeftKernCallback()
    first, second = add_lora(tiny_llama()), add_lora(tiny_llama(), target_modules=["q_proj"])
    for model in (first, second, first):
        trainer(model, tmp_path, [callback])
    assert capfd.readouterr().out.splitlines() == [SAID, SAID.replace("14", "2")]


def test_the_callback_is_made_as_ms_swift_makes_it(tmp_path):
    run = trainer(add_lora(tiny_llama()), tmp_path)
    assert PeftKernCallback(run.args, run).report is None


def test_its_options_are_those_of_patch(tmp_path):
    callback = PeftKernCallback(exclude=["layers.0"])
    trainer(add_lora(tiny_llama()), tmp_path, [callback])
    assert len(callback.report.patched) == LAYERS // 2


def test_patches_adapters_that_came_in_between(tmp_path):
    model = add_lora(tiny_llama(), target_modules=["q_proj"])
    callback = PeftKernCallback()
    run = trainer(model, tmp_path, [callback])
    assert patched_layers(model) == 2
    config = model.peft_config["default"]
    model.add_adapter("more", type(config)(r=2, target_modules=["v_proj"]))
    model.set_adapter("more")
    run.train()
    assert patched_layers(model) == len(callback.report.patched) == 4


def test_model_of_model_init_is_patched(tmp_path):
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, **quiet)
    data = {"train_dataset": Texts(), "callbacks": [PeftKernCallback()]}
    run = Trainer(model_init=lambda: add_lora(tiny_llama()), args=arguments, **data)
    run.train()
    assert patched_layers(run.model) == LAYERS


def test_what_is_not_served_is_a_warning(tmp_path, caplog):
    trainer(tiny_llama(), tmp_path, [PeftKernCallback()], max_steps=1).train()
    trainer(add_lora(tiny_llama(), lora_dropout=1.0), tmp_path, [PeftKernCallback()])
    first, second = (r for r in caplog.records if r.name == LOGGER)
    assert first.levelname == second.levelname == "WARNING"
    assert first.message == "peftkern: 0 patched: the model has no PEFT adapter layers"
    assert "14 of the patched fall back for now: lora_dropout is Dropout(p=1.0" in second.message


def test_adalora_is_patched_too(tmp_path):
    callback = PeftKernCallback()
    trainer(adalora_llama(), tmp_path, [callback], max_steps=1).train()
    assert callback.report.kinds["adalora.SVDLinear"] == LAYERS


@pytest.mark.parametrize(("accumulation", "counted"), [(1, "all"), (2, "no")])
def test_monitor_s_numbers_reach_the_reporters(tmp_path, accumulation, counted):
    model = add_lora(tiny_llama())
    reporter = Reporter()
    options = {"include_num_input_tokens_seen": counted, "logging_steps": 2}
    options |= {"gradient_accumulation_steps": accumulation}
    run = trainer(model, tmp_path, [PeftKernCallback(), reporter], **options)
    callback = MonitorCallback.attach(run, jsonl=tmp_path / "run.jsonl")
    run.train()
    tokens = ROWS * LENGTH * accumulation
    logged = training_logs(run)
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry, told in zip(logged, reporter.logs, strict=False):
        assert entry["peftkern/tokens"] == told["peftkern/tokens"] == 2 * tokens
        assert entry["peftkern/kernel_calls"] >= 2 * accumulation * LAYERS * 2  # forward, backward
        assert entry["peftkern/reference_calls"] == entry["peftkern/fallbacks"] == 0
        assert entry["peftkern/tokens_per_second"] > 0
        assert entry["peftkern/process_rss_bytes"] <= entry["peftkern/process_peak_rss_bytes"]
        assert entry["peftkern/step_seconds"] == told["peftkern/step_seconds"]
    summary = callback.monitor.summary()
    assert (summary.steps, summary.tokens) == (STEPS, STEPS * tokens)
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [r["type"] for r in records] == ["start", "step", "step", "step", "summary"]
    assert [r["loss"] for r in records[1:3]] == [entry["loss"] for entry in logged]
    assert records[2]["global_step"] == 4
    assert not model._forward_pre_hooks


def test_tokens_of_a_reference_are_not_counted_again(tmp_path):
    """Preference trainers ask the model once more, with its adapters off and without gradients."""

    class Preferences(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad(), model.disable_adapter():
                reference = model(**inputs).loss
            return (super().compute_loss(model, inputs, *args, **kwargs) - reference).square()

    model = add_lora(tiny_llama())
    arguments = trainer(model, tmp_path).args
    preferences = Preferences(model, arguments, train_dataset=Texts())
    callback = MonitorCallback.attach(preferences)
    preferences.train()
    assert callback.monitor.summary().tokens == STEPS * ROWS * LENGTH


def test_ranks_are_recorded_when_a_mask_moves_them(tmp_path):
    model = adalora_llama(total_step=8, tinit=1, tfinal=3, deltaT=2)
    saving = {"save_strategy": "steps", "save_steps": 1}  # PEFT makes a new pattern of it
    run = trainer(model, tmp_path, [AdaLoraCallback()], max_steps=8, **saving)
    MonitorCallback.attach(run, jsonl=tmp_path / "run.jsonl")
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    first, *moved = [r for r in records if r["type"] == "ranks"]
    assert first["global_step"] == 0 and [*first["ranks"].values()] == [6] * LAYERS
    # By deltaT; the final mask, at step 5, has the budget of step 4.
    assert [r["global_step"] for r in moved][:2] == [2, 4] and len(moved) <= 3
    pattern = model.peft_config["default"].rank_pattern.items()
    assert moved[-1]["ranks"] == {name.split(".lora_E")[0]: sum(kept) for name, kept in pattern}
    assert moved[-1]["ranks"].keys() == first["ranks"].keys()
    check_masks(run, first, moved)


def check_masks(run: Trainer, first: dict, moved: list[dict]) -> None:
    """What was pruned and revived adds up to the masks; the log tells the same in numbers."""
    assert "pruned" not in first and "importance" not in first
    alive = {name: set(range(6)) for name in first["ranks"]}
    for record in moved:
        for name, kept in alive.items():
            kept -= {*record.get("pruned", {}).get(name, ())}
            kept |= {*record.get("revived", {}).get(name, ())}
            assert len(kept) == record["ranks"][name]
        assert record["importance"].keys() == alive.keys()
        assert min(record["importance"].values()) >= 0 < max(record["importance"].values())
        assert sum(record["ranks"].values()) <= record["budget"]
    pattern = run.model.peft_config["default"].rank_pattern.items()
    assert alive == {
        name.split(".lora_E")[0]: {i for i, one in enumerate(kept) if one} for name, kept in pattern
    }
    names = [f"peftkern/adalora_{name}" for name in ("rank", "budget", "importance", "pruned")]
    logged = training_logs(run)
    assert [name in logged[0] for name in names] == [True, False, False, True]  # no mask yet
    assert [entry[names[0]] for entry in logged][-1] == sum(moved[-1]["ranks"].values())
    assert logged[-1][names[1]] == moved[-1]["budget"] and logged[-1][names[2]] > 0
    pruned = [sum(map(len, record.get("pruned", {}).values())) for record in moved]
    assert sum(entry[names[3]] for entry in logged) == sum(pruned) > 0


def test_a_budget_of_the_callback_s(tmp_path):
    """In parameters; the checkpoint keeps it, and training goes on from it bit for bit."""
    budget = RankBudget(cost="parameters", min_rank=1, max_rank={"down_proj": 2})
    schedule = {"total_step": 8, "tinit": 1, "tfinal": 3, "deltaT": 2}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = adalora_llama(**schedule)
        callbacks = [AdaLoraCallback(budget=budget if resume is None else None)]
        runs.append(trainer(model, tmp_path, callbacks, **saving))
        runs[-1].train(resume_from_checkpoint=resume)
    first, second = (one.model for one in runs)
    limits = first.base_model.rankallocator.limits
    assert limits == second.base_model.rankallocator.limits
    spent = 0.0
    for name, kept in adalora_runs.mask(first).items():
        name = name.removesuffix(".lora_E")
        assert 1 <= sum(kept) <= (limits.max_rank[name] or 6)
        spent += limits.cost[name] * sum(kept)
    assert spent <= limits.target_budget == 2 * sum(limits.cost.values())
    assert adalora_runs.digest(first) == adalora_runs.digest(second)


def test_monitor_in_the_trainer_s_list_reaches_the_history(tmp_path):
    reporter = Reporter()
    run = trainer(add_lora(tiny_llama()), tmp_path, [reporter, MonitorCallback()], max_steps=2)
    run.train()
    assert ["peftkern/tokens" in entry for entry in training_logs(run)] == [True, True]
    assert not any("peftkern/tokens" in logs for logs in reporter.logs)


def test_evaluating_and_saving_is_in_no_step(tmp_path, clock):
    class Slow(TrainerCallback):
        paused = 0

        def on_step_begin(self, args, state, control, **kwargs):
            clock.now += 2.0

        def on_evaluate(self, args, state, control, **kwargs):
            clock.now += 100.0
            self.paused += 1

        on_save = on_evaluate

    slow = Slow()
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    options |= {"save_strategy": "steps", "save_steps": 1}
    run = trainer(add_lora(tiny_llama()), tmp_path, [slow, MonitorCallback()], **options)
    run.train()
    logged = training_logs(run)
    assert slow.paused >= 3 + STEPS
    assert [entry["peftkern/step_seconds"] for entry in logged] == [2.0] * STEPS
    assert all(entry["peftkern/tokens"] == ROWS * LENGTH for entry in logged)
    assert not any("peftkern/tokens" in e for e in run.state.log_history if "eval_loss" in e)
    run.evaluate()  # when all is done the monitor is closed
    run.log({"loss": 1.0})
    assert "peftkern/tokens" not in run.state.log_history[-1]


def test_file_that_cannot_be_opened_leaves_the_model_alone(tmp_path):
    model = add_lora(tiny_llama())
    run = trainer(model, tmp_path, [MonitorCallback(jsonl=tmp_path / "no" / "run.jsonl")])
    with pytest.raises(FileNotFoundError, match=r"run\.jsonl"):
        run.train()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("counted", ["no", "all"])
def test_resumed_training_goes_on_in_the_same_file(tmp_path, counted):
    options = {"save_strategy": "steps", "save_steps": 3, "include_num_input_tokens_seen": counted}
    path = tmp_path / "run.jsonl"
    for steps, resume in ((3, None), (STEPS, str(tmp_path / "checkpoint-3"))):
        model = add_lora(tiny_llama())
        run = trainer(model, tmp_path, [PeftKernCallback()], max_steps=steps, **options)
        MonitorCallback.attach(run, jsonl=path)
        peftkern.reset_stats()
        run.train(resume_from_checkpoint=resume)
        assert served_by_us() == LAYERS * (steps if resume is None else STEPS - 3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [r for r in records if r["type"] == "step"]
    assert [r["global_step"] for r in steps] == [1, 2, 3, 4, 5]
    assert {r["tokens"] for r in steps} == {ROWS * LENGTH}
    assert [entry["step"] for entry in training_logs(run)] == [1, 2, 3, 4, 5]


def test_monitor_starts_again_after_an_interrupted_training(tmp_path):
    class Stop(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed:
                raise KeyboardInterrupt

    stop, model = Stop(), add_lora(tiny_llama())
    run = trainer(model, tmp_path, [stop])
    callback = MonitorCallback.attach(run)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    stop.armed = False
    run.train()
    assert callback.monitor.summary().tokens == STEPS * ROWS * LENGTH
    assert not model._forward_pre_hooks
