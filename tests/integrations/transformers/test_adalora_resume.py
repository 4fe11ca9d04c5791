"""AdaLoRA's checkpoints under the Trainer: resuming is going on, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from adalora_models import adalora_llama
from adalora_runs import (
    BEST,
    LAST_MASK,
    SCHEDULE,
    STEPS,
    BestAt,
    Digests,
    PlainAllocation,
    digest,
    mask,
    run,
)
from peft import PeftModel
from peft_models import logits, take_small_layers, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from peftkern.integrations.peft.adalora_layers import layers_of
from peftkern.integrations.peft.adalora_state import FILE, load_state
from peftkern.integrations.transformers.callbacks import AdaLoraCallback

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """The checkpoints of an uninterrupted training, and its state after every step."""
    folder, digests = tmp_path_factory.mktemp("whole"), Digests()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patches:  # as the fixtures of a test do
        take_small_layers(patches.setattr)
        torch.set_num_threads(1)
        run(folder, [AdaLoraCallback(), digests])
    torch.set_num_threads(threads)
    assert list(digests.by_step) == list(range(1, STEPS + 1))
    return folder, digests.by_step


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Checkpoints that PEFT and transformers write by themselves."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, [PlainAllocation()])
    return folder


# On the first mask, on the last, before the first, between two, before the last, on one, after all.
RESUMED = [3, LAST_MASK]
RESUMED += [pytest.param(step, marks=pytest.mark.more) for step in (1, 8, LAST_MASK - 1)]
RESUMED += [pytest.param(step, marks=pytest.mark.long) for step in (6, LAST_MASK + 3)]


@pytest.mark.parametrize("step", RESUMED)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, whole, step):
    folder, expected = whole
    digests = Digests()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*AdaLoRA|.*importance")
        run(tmp_path, [AdaLoraCallback(), digests], resume=folder / f"checkpoint-{step}")
    assert digests.by_step == {k: v for k, v in expected.items() if k > step}


def test_what_is_trained_whole_compacted_early_or_copied_resumes_too(tmp_path):
    digests, resumed = Digests(), Digests()
    options = {"config": {"modules_to_save": ["lm_head"], "tfinal": 2}, "max_steps": 8}
    trainer = run(tmp_path, [AdaLoraCallback(compact=2), digests], **options)  # masks at 3 and 6
    checkpoint = tmp_path / "checkpoint-4"
    run(tmp_path, [AdaLoraCallback(compact=2), resumed], resume=checkpoint, **options)
    with safe_open(checkpoint / FILE, "pt") as file:
        assert len(file.get_slice("model.layers.0.self_attn.q_proj.rows").get_shape()) == 1
        assert min(file.get_slice(k).get_shape()[0] for k in file.keys() if "lora_E" in k) < 6  # noqa: SIM118
    assert resumed.by_step[8] == digests.by_step[8]
    for twin in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        assert digest(twin) == digests.by_step[8]
        twin.load_adapter(str(tmp_path / "checkpoint-6"), "default", is_trainable=True)


def test_a_training_that_stops_early_is_told_what_is_saved(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == 4

    with caplog.at_level("WARNING", "peftkern"):
        run(tmp_path, [AdaLoraCallback(), Stop()], save_strategy="no")
    said = [r.getMessage() for r in caplog.records if "AdaLoRA stopped" in r.getMessage()]
    assert len(said) == 1 and f"step 4, before the last mask at step {LAST_MASK}" in said[0]


def test_peft_alone_cannot_resume_after_the_first_mask(tmp_path, plain):
    """PEFT saves fewer triplets than the new model has."""
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(tmp_path, [PlainAllocation()], resume=plain / "checkpoint-3")


def test_peft_alone_resumes_before_the_first_mask_as_another_training(tmp_path, plain):
    """Silently: the moving averages are gone."""
    digests, resumed = Digests(), Digests()
    run(tmp_path / "a", [PlainAllocation(), digests], save_strategy="no", max_steps=8)
    options = {"save_strategy": "no", "max_steps": 8}
    run(tmp_path / "b", [PlainAllocation(), resumed], resume=plain / "checkpoint-2", **options)
    assert resumed.by_step[8] != digests.by_step[8]


def best_of(folder: Path, step: int, callbacks: list[TrainerCallback]) -> tuple[Trainer, BestAt]:
    best = BestAt(step)
    return run(folder, [best, *callbacks], **BEST), best


def test_training_goes_on_from_the_best_model_before_compaction(tmp_path):
    """The Trainer keeps its optimizer, whose states have the triplets of the last step."""
    trainer, _ = best_of(tmp_path, 3, [AdaLoraCallback()])
    model = trainer.model
    rows = {len(layer.lora_E["default"]) for layer in layers_of(model.base_model).values()}
    assert rows == {6}  # of step 3; at the last one there were fewer
    trainer.args.load_best_model_at_end = False
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    with pytest.warns(UserWarning, match=r"states of \d+ parameters are of another number of tri"):
        trainer.train()
    for parameter, held in trainer.optimizer.optimizer.state.items():
        assert held["exp_avg"].shape == parameter.shape


def test_a_compacted_checkpoint_without_the_state_goes_on(tmp_path):
    """Its optimizer has fewer triplets than a new model, into which PEFT's file is scattered."""
    run(tmp_path / "a", [AdaLoraCallback()], save_steps=LAST_MASK + 1)
    checkpoint = tmp_path / "a" / f"checkpoint-{LAST_MASK + 1}"
    (checkpoint / FILE).unlink()
    with pytest.warns(UserWarning, match=r"states of \d+ parameters are of another number of tri"):
        trainer = run(tmp_path / "b", [AdaLoraCallback()], resume=checkpoint, save_strategy="no")
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    for parameter, held in trainer.optimizer.optimizer.state.items():
        assert held["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("step", [2, 8, LAST_MASK])
def test_the_best_model_is_loaded_as_it_was(tmp_path, step):
    trainer, best = best_of(tmp_path, step, [AdaLoraCallback()])
    assert trainer.state.best_global_step == step
    assert digest(trainer.model) == best.digest


def test_early_stopping_ends_with_the_best_model(tmp_path, caplog):
    """Whose triplets, masks and importance are those of its step, and from which training goes on
    as it did."""
    digests, resumed = Digests(), Digests()
    callbacks = [AdaLoraCallback(), EarlyStoppingCallback(early_stopping_patience=2), digests]
    with caplog.at_level("WARNING", "peftkern"):
        trainer, best = best_of(tmp_path / "a", 8, callbacks)
    assert max(digests.by_step) == 10 and trainer.state.best_global_step == 8
    assert digest(trainer.model) == best.digest == digests.by_step[8]
    assert "AdaLoRA stopped at step 10, before the last mask" in caplog.text
    run(
        tmp_path / "b",
        [AdaLoraCallback(), resumed],
        resume=tmp_path / "a" / "checkpoint-8",
        save_strategy="no",
    )
    assert {step: resumed.by_step[step] for step in (9, 10)} == {
        step: digests.by_step[step] for step in (9, 10)
    }
    assert max(resumed.by_step) == STEPS


def test_peft_alone_cannot_load_the_best_model(tmp_path):
    with pytest.raises(RuntimeError, match="size mismatch"):
        best_of(tmp_path, 8, [PlainAllocation()])


def test_unpatched_peft_loads_the_adapter_in_the_checkpoint(whole):
    """Also with rank 0 in some layers; after the last mask it is the model."""
    checkpoint = whole[0] / f"checkpoint-{STEPS}"
    loaded = PeftModel.from_pretrained(tiny_llama(), str(checkpoint))
    assert 0 in {sum(kept) for kept in mask(loaded).values()}
    full = adalora_llama(**SCHEDULE)
    weights = load_file(checkpoint / FILE)
    for name, parameter in full.base_model.model.named_parameters():
        if "lora_" in name:
            parameter.data = weights[name.removesuffix(".default")]
    torch.testing.assert_close(logits(loaded), logits(full), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [3, LAST_MASK + 2])
def test_a_folder_of_pefts_own_is_scattered_back_with_a_warning(tmp_path, plain, step):
    checkpoint = plain / f"checkpoint-{step}"
    digests = Digests()
    with pytest.warns(UserWarning, match=f"has no {FILE}"):
        trainer = run(tmp_path, [AdaLoraCallback(), digests], resume=checkpoint)
    assert list(digests.by_step) == list(range(step + 1, STEPS + 1))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    fresh = adalora_llama(**SCHEDULE)
    callback = AdaLoraCallback()
    callback.on_init_end(None, None, None, model=fresh)
    with pytest.warns(UserWarning, match=f"has no {FILE}"):
        fresh.load_adapter(str(checkpoint), "default", is_trainable=True)
    for name, kept in mask(fresh).items():
        layer = fresh.base_model.model.get_submodule(name.removesuffix(".lora_E"))
        E, A = layer.lora_E["default"], layer.lora_A["default"]
        assert len(E) == 6 and not E[~torch.tensor(kept)].any()
        assert torch.equal(E[kept], saved[f"base_model.model.{name}"])
        assert torch.equal(A[kept], saved[f"base_model.model.{name[:-1]}A"])
    if step > LAST_MASK:
        assert mask(trainer.model) == mask(fresh)


def test_what_does_not_fit_is_named(tmp_path, whole):
    checkpoint = shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    model = adalora_llama(**SCHEDULE, target_modules=["q_proj"])
    AdaLoraCallback().on_init_end(None, None, None, model=model)
    with pytest.raises(
        ValueError, match=r"expected the layers of the model, differs in .*down_proj"
    ):
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
    save_file(load_file(checkpoint / FILE), checkpoint / FILE, {"adalora": '{"version": 2}'})
    with pytest.raises(ValueError, match=rf"{FILE}: version 2, expected 1"):
        model.load_adapter(str(checkpoint), "default", is_trainable=True)


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_folder_that_does_not_fit_changes_nothing(tmp_path, whole, plain):
    """A last layer of another size, or without its weights or its mask."""
    model = adalora_llama(**SCHEDULE)
    before, last = state_of(model), list(layers_of(model.base_model))[-1]
    checkpoint = shutil.copytree(whole[0] / "checkpoint-8", tmp_path / "whole")
    with safe_open(checkpoint / FILE, "pt") as file:
        record = file.metadata()
    tensors = load_file(checkpoint / FILE)
    key, weights = f"{last}.lora_B", "adapter_model.safetensors"
    save_file({**tensors, key: tensors[key][1:].contiguous()}, checkpoint / FILE, record)
    with pytest.raises(ValueError, match=f"{last}.lora_B is "):
        load_state(model, checkpoint)
    save_file({k: t for k, t in tensors.items() if k != f"{last}.kept"}, checkpoint / FILE, record)
    with pytest.raises(ValueError, match=f"{FILE}: expected the layers .* nothing of {last}"):
        load_state(model, checkpoint)
    checkpoint = shutil.copytree(plain / "checkpoint-8", tmp_path / "plain")
    saved, key = load_file(checkpoint / weights), f"base_model.model.{last}.lora_B"
    save_file({**saved, key: saved[key][1:].contiguous()}, checkpoint / weights)
    with pytest.raises(ValueError, match=f"{weights}: {last}.lora_B is "):
        load_state(model, checkpoint)
    save_file({k: t for k, t in saved.items() if k != key}, checkpoint / weights)
    with pytest.raises(ValueError, match=f"{weights}: expected the layers .* nothing of {key}"):
        load_state(model, checkpoint)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    del config["rank_pattern"][f"{last}.lora_E"]
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"adapter_config.json: .* nothing of {last}.lora_E"):
        load_state(model, checkpoint)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_schedule_is_said(whole):
    model = adalora_llama(**{**SCHEDULE, "deltaT": 5})
    AdaLoraCallback().on_init_end(None, None, None, model=model)
    with pytest.warns(UserWarning, match=r"another schedule: deltaT 5 \(was 3\)"):
        model.load_adapter(str(whole[0] / "checkpoint-8"), "default", is_trainable=True)


def test_trials_of_a_search_have_folders_of_their_own(tmp_path):
    model, args = adalora_llama(**SCHEDULE), TrainingArguments(str(tmp_path), use_cpu=True)
    for folder in (tmp_path / "checkpoint-3", tmp_path / "mine" / "checkpoint-3"):
        folder.mkdir(parents=True)
    state = TrainerState(global_step=3, is_hyper_param_search=True, trial_name="mine")
    AdaLoraCallback().on_save(args, state, None, model=model)
    assert [file.parent for file in tmp_path.rglob(FILE)] == [tmp_path / "mine" / "checkpoint-3"]
    state.trial_name = None
    (tmp_path / "mine" / "checkpoint-3" / FILE).unlink()
    with pytest.warns(UserWarning, match="hyperparameter search without hp_name"):
        AdaLoraCallback().on_save(args, state, None, model=model)
    assert not list(tmp_path.rglob(FILE))
