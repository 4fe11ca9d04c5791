"""Checkpoints of patched models under DDP and FSDP: what goes on from one is the same training."""

from __future__ import annotations

import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import trainers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from adalora_models import adalora_llama
from adalora_runs import BEST, BestAt
from engines import (
    CURVE,
    LAYERS,
    in_ranks,
    lora_llama,
    loss_curve,
    nf4_llama,
    optimizer_of,
    outcome,
    qlora_llama,
    share,
)
from fsdp import flat, in_layers
from peft_models import fill_adapters
from rows import ACCELERATE, CHECKPOINTS, DCP, TRAINER, Checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, TrainerCallback

import peftkern
from peftkern.integrations.peft.adalora_layers import find_tuner
from peftkern.integrations.peft.adalora_state import collect, read_state
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.integrations.transformers import AdaLoraCallback, PeftKernCallback

pytestmark = pytest.mark.usefixtures("one_thread")
SAVED, END = 4, 8  # steps
SCHEDULE = {"total_step": END, "tinit": 1, "tfinal": 3, "deltaT": 2}  # masks from 3 to 5
MODELS = {
    "LoRA": lora_llama,
    "QLoRA (bitsandbytes)": qlora_llama,
    "QLoRA (peftkern.quantize_)": nf4_llama,
    "AdaLoRA": lambda: adalora_llama(**SCHEDULE),
}


WRAPS = {"FSDP1": flat, "FSDP2": in_layers}
TWINS = [  # of what the same engine does with another base, or saves by another writer
    Checkpoint("FSDP1", DCP, "QLoRA (bitsandbytes)", "resumes"),
    Checkpoint("FSDP2", DCP, "LoRA", "resumes"),
    Checkpoint("DDP", ACCELERATE, "LoRA", "resumes"),
    Checkpoint("FSDP2", TRAINER, "QLoRA (bitsandbytes)", "resumes"),
]
assert set(TWINS) < set(CHECKPOINTS)


def written_by(writer: str) -> list[Any]:
    """The rows of the table, twins of others as `more`."""
    return [
        pytest.param(c, marks=[pytest.mark.more] * (c in TWINS), id=f"{c.engine} {c.method}")
        for c in CHECKPOINTS
        if c.writer == writer
    ]


class Run(NamedTuple):
    """A training in this rank, and what accelerate or AdaLoRA have of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: AdaLoraSteps | None = None
    accelerator: Accelerator | None = None

    def losses(self, *steps: int) -> Tensor:
        return loss_curve(self.model, self.optimizer, range(*steps))


def sharded(engine: str, method: str, patched: bool) -> Run:
    model = MODELS[method]()
    if patched:
        peftkern.patch(model)
    model = WRAPS[engine](model)
    optimizer = optimizer_of(model)
    steps = AdaLoraSteps(model, optimizer, END) if method == "AdaLoRA" else None
    return Run(model, optimizer, steps)


def options(full: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=full, ignore_frozen_params=True, strict=False)


def parts_of(run: Run, full: bool) -> dict[str, Any]:
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options(full))
    adalora = {} if run.steps is None else {"adalora": run.steps}
    return {"model": model, "optimizer": optimizer, **adalora}


def resumed(rank: int, engine: str, method: str, patched: bool, full: bool, folder: Path) -> Tensor:
    run = sharded(engine, method, patched)
    parts = parts_of(run, full)
    dcp.load(parts, checkpoint_id=folder)
    state = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizer"]}
    set_state_dict(run.model, run.optimizer, **state, options=options(full))
    return run.losses(SAVED, END)


def saved_and_resumed(rank: int, engine: str, method: str, folder: Path) -> dict[str, Any]:
    """Two trainings that save, and new ones that go on from either checkpoint.

    Patched ones alone, where an unpatched one has no AdaLoraSteps.
    """
    found, adapted = {}, method == "AdaLoRA"
    for patched in (True,) if adapted else (True, False):
        run, name = sharded(engine, method, patched), "ours" if patched else "theirs"
        first = run.losses(SAVED)
        dcp.save(parts_of(run, full=patched), checkpoint_id=folder / name)
        found[name] = torch.cat([first, run.losses(SAVED, END)])
        if patched:
            found["outcome"] = outcome(END * LAYERS)
            found["keys"] = sorted(get_model_state_dict(run.model))
            whole = get_model_state_dict(run.model, options=options(True))
            run.model.save_pretrained(folder / f"adapter-{rank}", state_dict=whole)
        else:
            assert found["keys"] == sorted(get_model_state_dict(run.model))
    if adapted:
        run = sharded(engine, method, True)
        parts_of(run, full=False)  # with a step of zeros, to have the optimizer make states
        assert run.steps.step == 0 and not run.steps.tuner.rankallocator.exp_avg_ipt
    for patched, name in ((True, "ours"), (False, "ours"), (True, "theirs"))[: 1 if adapted else 3]:
        full = name == "ours"
        found[patched, name] = resumed(rank, engine, method, patched, full, folder / name)
    return found


def file_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("case", written_by(DCP))
def test_distributed_checkpoints_go_on_as_the_training(tmp_path, case):
    """One that was patched goes on bit for bit, an unpatched one as a patched one, and back."""
    engine, method = case.engine, case.method
    for found in in_ranks(saved_and_resumed, 2, tmp_path / "run", engine, method, tmp_path):
        assert found["outcome"] == "served"
        ours = found["ours"]
        assert torch.equal(found[True, "ours"], ours[SAVED:])
        if method != "AdaLoRA":
            torch.testing.assert_close(ours, found["theirs"], **CURVE)
            torch.testing.assert_close(found[False, "ours"], ours[SAVED:], **CURVE)
            torch.testing.assert_close(found[True, "theirs"], ours[SAVED:], **CURVE)
    assert file_of(tmp_path / "adapter-0") == file_of(tmp_path / "adapter-1")
    if method == "QLoRA (bitsandbytes)":  # in other shards than were saved
        sharded = engine, method, True, False, tmp_path / "theirs"
        for losses in in_ranks(resumed, 4, tmp_path / "four", *sharded):
            torch.testing.assert_close(losses, ours[SAVED:], **CURVE)


def told_that_it_is_fsdp(state: Any, state_dict_type: str, version: int = 2) -> None:
    """Have accelerate's own code shard on a CPU, where it would fall back to DDP without a word."""
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=state_dict_type,
        cpu_ram_efficient_loading=False,
        **({"use_orig_params": True} if version == 1 else {}),
    )
    state.device = torch.device("cpu")  # accelerate numbers it, which FSDP1 does not take
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def accelerated(method: str, engine: str, patched: bool = True) -> Run:
    model = MODELS[method]()
    if patched:
        peftkern.patch(model)
    accelerator = Accelerator(cpu=True)
    if engine.startswith("FSDP"):
        told_that_it_is_fsdp(accelerator.state, engine.split()[-1], int(engine[len("FSDP")]))
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    steps = AdaLoraSteps(model, optimizer, END) if method == "AdaLoRA" else None
    if steps is not None:
        accelerator.register_for_checkpointing(steps)
    return Run(model, optimizer, steps, accelerator)


def states(rank: int, method: str, engine: str, folder: Path) -> dict[str, Any]:
    run, found = accelerated(method, engine), {}
    curve = [run.losses(0, SAVED)]
    for at in (SAVED, SAVED + 2):  # then AdaLoRA's last mask is there, and under DDP compacted
        # safetensors leaves out what is empty, as layers without a triplet are.
        run.accelerator.save_state(str(folder / str(at)), safe_serialization=method != "AdaLoRA")
        curve.append(run.losses(at, at + 2))
    curve = torch.cat(curve)
    found["outcome"] = outcome(END * LAYERS)
    cases = [(True, SAVED)] if method == "AdaLoRA" else [(True, SAVED), (False, SAVED)]
    compacted = method == "AdaLoRA" and engine == "DDP"
    for patched, at in [*cases, (True, SAVED + 2)] if compacted else cases:
        run = accelerated(method, engine, patched)
        if engine == "FSDP1 SHARDED_STATE_DICT":
            get_optimizer_state_dict(run.model, run.optimizer)  # which makes its states
        run.accelerator.load_state(str(folder / str(at)))
        found[patched, at] = run.losses(at, END), curve[at:]
    if compacted:  # and back to where nothing was dropped
        run.accelerator.load_state(str(folder / str(SAVED)))
        found[True, "back"] = run.losses(SAVED, END), curve[SAVED:]
    return found


def loaded(rank: int, method: str, engine: str, folder: Path) -> None:
    """Without peftkern: what does not load, does not load then either."""
    run = accelerated(method, engine, patched=False)
    run.accelerator.save_state(str(folder / "state"))
    run.accelerator.wait_for_everyone()  # the first process writes
    run.accelerator.load_state(str(folder / "state"))


@pytest.mark.parametrize("case", written_by(ACCELERATE))
def test_states_of_accelerate_go_on_as_the_training(tmp_path, case):
    if case.outcome.startswith("fails"):
        reason = case.outcome.partition(": ")[2].strip("`")
        with pytest.raises(ProcessRaisedException, match=re.escape(reason)):
            in_ranks(loaded, 2, tmp_path / "run", case.method, case.engine, tmp_path)
        return
    for found in in_ranks(states, 2, tmp_path / "run", case.method, case.engine, tmp_path):
        assert found.pop("outcome") == "served"
        for (patched, _), (got, expected) in found.items():
            assert torch.equal(got, expected) or not patched
            torch.testing.assert_close(got, expected, **CURVE)


def forgotten(rank: int, engine: str, folder: Path) -> dict[bool, tuple[int, int]]:
    """How many states an optimizer had that was saved, and one that has not stepped when loaded."""
    found = {}
    for patched in (False, True):
        run, where = accelerated("LoRA", engine, patched), str(folder / str(patched))
        run.losses(1)
        run.accelerator.save_state(where)
        again = accelerated("LoRA", engine, patched)
        again.accelerator.load_state(where)
        found[patched] = len(run.optimizer.state), len(again.optimizer.state)
    return found


def test_accelerate_loads_shards_of_fsdp1_only_into_states_that_are_there(tmp_path):
    """With peftkern or without."""
    engine = "FSDP1 SHARDED_STATE_DICT"
    for found in in_ranks(forgotten, 2, tmp_path / "run", engine, tmp_path):
        saved, _ = found[False]  # of the parameters that this rank has a part of
        assert 0 < saved <= 2 * LAYERS
        assert found == dict.fromkeys((False, True), (saved, 0))


class Killed(TrainerCallback):
    """All ranks are killed, as a node that goes away, before a step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == SAVED + 1:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def trained(rank: int, engine: str, method: str, folder: Path, kill: bool, resume: bool) -> list:
    callbacks = [AdaLoraCallback() if method == "AdaLoRA" else PeftKernCallback()]
    callbacks += [Killed()] if kill else []
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": END}
    trainer = trainers.trainer(MODELS[method](), folder, callbacks, **saving)
    if engine == "FSDP2":
        told_that_it_is_fsdp(trainer.accelerator.state, "FULL_STATE_DICT")
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=resume or None)
    steps = END - (SAVED if resume else 0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [losses, outcome(steps * LAYERS)]


@pytest.mark.parametrize("case", written_by(TRAINER))
def test_a_run_that_is_killed_resumes(tmp_path, case):
    """Between two steps, from its last checkpoint, with the losses of one that nobody disturbed."""
    how = case.engine, case.method
    whole = in_ranks(trained, 2, tmp_path / "a", *how, tmp_path / "whole", False, False)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_ranks(trained, 2, tmp_path / "b", *how, tmp_path / "killed", True, False)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = in_ranks(trained, 2, tmp_path / "c", *how, tmp_path / "killed", False, True)
    assert resumed == whole
    last = f"checkpoint-{END}"
    assert file_of(tmp_path / "killed" / last) == file_of(tmp_path / "whole" / last)


def best_of_shards(rank: int, folder: Path) -> list[str]:
    """Train past the best step, which early stopping ends with; what the first process has then."""
    best = BestAt(SAVED, keep=lambda model: None)
    callbacks = [best, AdaLoraCallback(), EarlyStoppingCallback(early_stopping_patience=2)]
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3 * END}
    trainer = trainers.trainer(MODELS["AdaLoRA"](), folder, callbacks, **{**saving, **BEST})
    told_that_it_is_fsdp(trainer.accelerator.state, "FULL_STATE_DICT")
    trainer.is_fsdp_enabled = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="(?!AdaLoRA resumes)")
        trainer.train()
    assert trainer.state.global_step == SAVED + 2 and trainer.state.best_global_step == SAVED
    tensors, record = collect(find_tuner(trainer.model), SAVED)
    saved = read_state(folder / f"checkpoint-{SAVED}")
    assert saved.schedule == record["schedule"]
    kept = {f"{path}.kept": torch.tensor(mask) for path, mask in saved.kept.items()}
    averages = {
        f"{key}.{average}": tensor
        for average, held in saved.averages.items()
        for key, tensor in held.items()
    }
    held = {**saved.triplets, **averages, **kept, "scores": saved.scores}
    assert held.keys() == tensors.keys()
    return [name for name, tensor in held.items() if not torch.equal(tensor, tensors[name])]


def test_shards_hold_the_best_model_when_training_ends(tmp_path):
    """With its masks and importance, not those of the last step."""
    assert in_ranks(best_of_shards, 2, tmp_path / "run", tmp_path / "model") == [[], []]


def adapters(rank: int, folder: Path) -> None:
    """What each engine saves of the same weights, after a step's forward and backward pass."""
    for engine in ("DDP", "FSDP2"):
        model = lora_llama()
        fill_adapters(model)
        peftkern.patch(model)
        wrapped = in_layers(model) if engine == "FSDP2" else DistributedDataParallel(model)
        wrapped(**share(0)).loss.backward()
        whole = get_model_state_dict(model, options=options(True))
        model.save_pretrained(folder / f"{engine}-{rank}", state_dict=whole)


def test_adapter_files_are_the_same_from_every_engine_and_rank(tmp_path):
    in_ranks(adapters, 2, tmp_path / "run", tmp_path)
    model = lora_llama()
    fill_adapters(model)
    model.save_pretrained(tmp_path / "unpatched")
    files = {path.name: file_of(path) for path in tmp_path.iterdir() if path.name != "run"}
    assert len(files) == 5 and len(set(files.values())) == 1
