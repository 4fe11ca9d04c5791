"""Compaction of AdaLoRA while it trains: in loops of one's own, early and with the last mask."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from adalora_models import adalora_llama, optimizer_of
from adalora_runs import digest, mask
from peft import PeftModel
from peft_models import fallbacks, logits, text_batch, tiny_llama
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

import peftkern
from peftkern.integrations.peft.adalora_compact import Compaction, compact_, watch_states
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps, prepare

pytestmark = pytest.mark.usefixtures("one_thread")
TOTAL, LAST = 8, 6  # masks at steps 2, 4 and 6
SCHEDULE = {"total_step": TOTAL, "tinit": 1, "tfinal": TOTAL - LAST, "deltaT": 2}


def ready(compact: str | int | None, make=optimizer_of, **config) -> tuple:
    model = adalora_llama(**{**SCHEDULE, **config})
    optimizer = make(model)
    return model, optimizer, AdaLoraSteps(model, optimizer, TOTAL, compact=compact)


def train(model: nn.Module, optimizer, steps: range) -> list[float]:
    """A loop that keeps the last loss, and with it the graph, until it has the next one."""
    losses = []
    for step in steps:
        loss = model(**text_batch(seed=step)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sizes(model: nn.Module) -> int:
    """Triplets that there are."""
    return sum(len(p) for n, p in model.named_parameters() if "lora_E" in n)


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for held in optimizer.state.values() for v in held.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor) and t.dim() and len(t) != 256)


def test_the_last_mask_compacts_and_changes_no_output():
    model, optimizer, _ = ready("final", orth_reg_weight=0.0)
    twin, other, _ = ready(None, orth_reg_weight=0.0)
    got, wanted = (train(m, o, range(1, LAST)) for m, o in ((model, optimizer), (twin, other)))
    assert got == wanted and sizes(model) == 14 * 6
    held = bytes_of(optimizer)
    got, wanted = (
        train(m, o, range(LAST, LAST + 1)) for m, o in ((model, optimizer), (twin, other))
    )
    assert sizes(model) == 28 and sizes(twin) == 14 * 6 and mask(model) == mask(twin)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)
    assert 0 in [len(p) for n, p in model.named_parameters() if "lora_E" in n]
    assert bytes_of(optimizer) < 0.5 * held
    peftkern.reset_stats()
    train(model.train(), optimizer, range(LAST + 1, TOTAL + 1))
    assert fallbacks() == {}
    assert sizes(model) == 28 and all(p.isfinite().all() for p in model.parameters())


OPTIMIZERS = {
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01, min_8bit_size=1),
    "AdEMAMix8bit": lambda p: bnb.optim.AdEMAMix8bit(p, lr=0.01, min_8bit_size=1),
    "PagedAdamW32bit": lambda p: bnb.optim.PagedAdamW32bit(p, lr=0.01),
    "Lion8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.001, min_8bit_size=1),
}


@pytest.mark.parametrize(
    "name",
    ["AdamW8bit", "PagedAdamW32bit"]
    + [pytest.param(name, marks=pytest.mark.long) for name in ("AdEMAMix8bit", "Lion8bit")],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_of_bitsandbytes_shrink_and_go_on(name: str):
    """Beside a twin that is not compacted: 8 bits differ by half a code where blocks are cut."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])

    model, optimizer, _ = ready("final", make, orth_reg_weight=0.0)
    twin, other, _ = ready(None, make, orth_reg_weight=0.0)
    assert train(model, optimizer, range(1, LAST)) == train(twin, other, range(1, LAST))
    held = bytes_of(optimizer)
    train(model, optimizer, range(LAST, LAST + 1)), train(twin, other, range(LAST, LAST + 1))
    assert sizes(model) == 28 and bytes_of(optimizer) < 0.5 * held
    kept = {n: torch.tensor(k) for n, k in mask(twin).items()}
    compared = 0
    named = dict(twin.named_parameters())
    for path, p in model.named_parameters():
        if "lora_" not in path or not p.numel():
            continue
        of = kept[path.removeprefix("base_model.model.").rsplit(".", 2)[0] + ".lora_E"]
        for got, wanted in zip(
            values(optimizer.state[p]), values(other.state[named[path]]), strict=True
        ):
            wanted = wanted.index_select(-1 if "lora_B" in path else -2, of.nonzero().flatten())
            bound = wanted.abs().max() * (0.02 if "8bit" in name else 0)
            torch.testing.assert_close(got, wanted, rtol=0.0, atol=float(bound))
            compared += 1
    assert compared > 20
    losses = train(model, optimizer, range(LAST + 1, TOTAL + 1))
    torch.testing.assert_close(
        losses, train(twin, other, range(LAST + 1, TOTAL + 1)), rtol=2e-3, atol=0
    )


def values(state: dict) -> list[Tensor]:
    """The states as numbers."""
    found = []
    for key in ("state1", "state2"):
        if key in state:
            value = state[key]
            if value.dtype is torch.uint8:
                absmax, qmap = (state[key.replace("state", what)] for what in ("absmax", "qmap"))
                flat = value.flatten(-2)
                scales = absmax.repeat_interleave(256, -1)[..., : flat.shape[-1]]
                value = (qmap[flat.long()] * scales).view(value.shape)
            found.append(value)
    return found


@pytest.mark.parametrize(("compact", "step"), [(3, 5), (3, LAST), ("final", LAST + 1)])
def test_a_compacted_training_goes_on_from_what_it_saved(tmp_path: Path, compact, step: int):
    model, optimizer, steps = ready(compact)
    train(model, optimizer, range(1, step + 1))
    assert sizes(model) == (31 if step < LAST else 28)  # with the mask of step 4, or the last
    steps.save(tmp_path)
    held = copy.deepcopy(optimizer.state_dict())
    losses = train(model, optimizer, range(step + 1, TOTAL + 1))
    fresh, optimizer, steps = ready(compact)
    steps.load(tmp_path)
    optimizer.load_state_dict(held)
    assert train(fresh, optimizer, range(step + 1, TOTAL + 1)) == losses
    assert digest(fresh) == digest(model) and sizes(model) == 28


def test_early_compaction_saves_what_unpatched_peft_loads(tmp_path: Path):
    """Between masks and after the last one; rank_pattern counts all init_r triplets."""
    model, optimizer, steps = ready(1)
    for upto in (4, TOTAL):
        train(model.train(), optimizer, range(steps.step + 1, upto + 1))
        assert {len(kept) for kept in mask(model).values()} == {6}
        ranks = {len(p) for n, p in model.named_parameters() if "lora_E" in n}
        assert sizes(model) == sum(map(sum, mask(model).values())) and len(ranks) > 2
        folder = tmp_path / str(upto)
        model.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(tiny_llama(), str(folder))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
        exported = peftkern.export_lora(model, folder / "lora")
        assert sum(exported.values()) == sizes(model)
        loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / "lora"))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
        if upto == 4:  # a mask may have pruned more than compaction has taken away since
            tuner = model.base_model
            pattern = tuner.rankallocator.mask_to_budget(tuner.model, 20)
            saved = copy.deepcopy(model)
            saved.peft_config["default"].rank_pattern = pattern
            saved.save_pretrained(str(folder / "more"))
            loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / "more"))
            torch.testing.assert_close(logits(loaded), logits(saved), rtol=1e-5, atol=1e-6)


def test_accelerate_s_optimizer_shrinks():
    try:
        accelerator = Accelerator(cpu=True)
        model = adalora_llama(**SCHEDULE)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        AdaLoraSteps(model, optimizer, TOTAL)
        train(model, optimizer, range(1, TOTAL + 1))
        assert sizes(model) == 28
        for p, held in optimizer.state.items():
            assert held["exp_avg"].shape == p.shape
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_what_cannot_shrink_is_said_and_trains_on():
    model, optimizer, _ = ready("final")
    train(model, optimizer, range(1, LAST))
    some = next(p for n, p in model.named_parameters() if "lora_A" in n)
    optimizer.state[some]["history"] = torch.zeros(3)
    with pytest.warns(UserWarning, match=r"AdaLoRA keeps what .*: optimizer: history is Tensor"):
        train(model, optimizer, range(LAST, LAST + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdaLoRA")
        train(model, optimizer, range(LAST + 1, TOTAL + 1))
    assert sizes(model) == 14 * 6 and sum(map(sum, mask(model).values())) == 28


@pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated")
def test_fsdp1_keeps_its_flat_parameter_though_nothing_is_sharded():
    """As in one process, where each parameter is a whole view of the flat one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adalora_llama(**SCHEDULE)
        prepare(model)
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        fsdp = FullyShardedDataParallel(
            model, sharding_strategy=ShardingStrategy.NO_SHARD, **options
        )
        optimizer = optimizer_of(fsdp)
        AdaLoraSteps(fsdp, optimizer, TOTAL)
        with pytest.warns(UserWarning, match="AdaLoRA keeps what .*: FSDP holds the parameters"):
            train(fsdp, optimizer, range(1, TOTAL + 1))
        assert sizes(fsdp) == 14 * 6 and sum(map(sum, mask(model).values())) == 28
    finally:
        dist.destroy_process_group()


def test_parameters_that_deepspeed_holds_are_no_empty_layers():
    model = adalora_llama(**SCHEDULE)
    prepare(model)
    optimizer = optimizer_of(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.new_empty(0)  # as its third stage leaves them
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    set_hf_deepspeed_config(config)
    try:
        watch_states(model.base_model, optimizer)
        assert not optimizer._optimizer_step_pre_hooks
    finally:
        unset_hf_deepspeed_config()


def test_what_has_revived_is_not_dropped():
    model, optimizer, _ = ready(None)
    with pytest.raises(ValueError, match="nothing is pruned yet"):
        compact_(model, optimizer)
    train(model, optimizer, range(1, 4))  # one step after a mask
    before = digest(model)
    with pytest.raises(ValueError, match="have come back since"):
        compact_(model, optimizer)
    assert digest(model) == before


@pytest.mark.parametrize("compact", ["last", 0, -3, 2.5, True])
def test_moments_that_are_none(compact):
    with pytest.raises(ValueError, match='compact: expected "final", a step or None, got'):
        Compaction(compact)


def test_peft_goes_on_after_unpatch(tmp_path: Path):
    """It has init_r triplets again, masks and saves them; an optimizer's states start anew."""
    model, optimizer, _ = ready("final", orth_reg_weight=0.0)
    train(model, optimizer, range(1, LAST + 1))
    assert sizes(model) == 28
    wanted = logits(model)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    set_hf_deepspeed_config(config)
    try:
        with pytest.raises(ValueError, match="model: DeepSpeed holds the parameters"):
            peftkern.unpatch(model)
    finally:
        unset_hf_deepspeed_config()
    layers = [m for m in model.modules() if hasattr(m, "lora_E")]
    assert len(layers) == 14 and all(map(peftkern.is_patched, layers))  # all is as it was
    peftkern.unpatch(model)
    assert sizes(model) == 14 * 6
    torch.testing.assert_close(logits(model.train()), wanted, rtol=1e-5, atol=1e-6)
    model.train()(**text_batch(seed=9)).loss.backward()
    with pytest.warns(UserWarning, match="of another number of triplets: they start anew"):
        optimizer.step()
    model.base_model.update_and_allocate(LAST + 1)
    optimizer.zero_grad()
    alive = sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)
    assert 0 < alive <= 28
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-6)
