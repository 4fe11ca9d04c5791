"""AdaLoRA in loops of one's own, through accelerate, and in 16 bits as TRL casts it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from adalora_models import adalora_llama, optimizer_of
from adalora_runs import digest, mask, take_steps
from peft_models import fallbacks, served_by_us, text_batch
from torch import nn

import peftkern
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps, prepare, set_total_step
from peftkern.methods import RankBudget

pytestmark = pytest.mark.usefixtures("one_thread")
TOTAL = 14
SCHEDULE = {"total_step": TOTAL, "tinit": 2, "tfinal": 4, "deltaT": 2}


def ready(compact=None, budget=None, **config) -> tuple:
    model = adalora_llama(**{**SCHEDULE, **config})
    optimizer = optimizer_of(model)
    options = {"compact": compact, "budget": budget}
    return model, optimizer, AdaLoraSteps(model, optimizer, TOTAL, **options)


def test_a_loop_of_one_s_own_is_pefts_documented_one():
    model, optimizer, steps = ready()
    assert peftkern.is_patched(model)
    by_hand = adalora_llama(**SCHEDULE)
    peftkern.patch(by_hand)
    expected = take_steps(by_hand, optimizer_of(by_hand), range(1, TOTAL + 1), allocation=True)
    assert take_steps(model, optimizer, range(1, TOTAL + 1)) == expected
    assert steps.step == TOTAL and sum(map(sum, mask(model).values())) == 28
    steps.close()
    take_steps(model, optimizer, range(1, 2))
    assert steps.step == TOTAL


@pytest.mark.parametrize("step", [3, 10])
def test_a_loop_goes_on_from_what_it_saved(tmp_path, step):
    model, optimizer, steps = ready()
    take_steps(model, optimizer, range(1, step + 1))
    steps.save(tmp_path)
    held = copy.deepcopy(optimizer.state_dict())
    expected = take_steps(model, optimizer, range(step + 1, TOTAL + 1))
    model, optimizer, steps = ready()
    steps.load(tmp_path)
    optimizer.load_state_dict(held)
    assert steps.step == step
    assert take_steps(model, optimizer, range(step + 1, TOTAL + 1)) == expected
    (tmp_path / "adalora_state.safetensors").unlink()
    with pytest.raises(ValueError, match="expected a folder that AdaLoraSteps"):
        steps.load(tmp_path)


@pytest.mark.parametrize("compact", [None, 4])
@pytest.mark.parametrize("budget", [None, RankBudget(cost="parameters")], ids=["ranks", "budget"])
def test_a_loop_goes_on_from_its_state_dicts(tmp_path, compact, budget):
    """Into a model of another step, too, with all its triplets or with fewer."""
    run, states = ready(compact, budget), {}
    for step in (3, 8):
        take_steps(*run[:2], range(run[2].step + 1, step + 1))
        torch.save([part.state_dict() for part in run], tmp_path / f"{step}.pt")
        states[step] = torch.load(tmp_path / f"{step}.pt", weights_only=True)
    expected = take_steps(*run[:2], range(9, TOTAL + 1))
    for first, then in ((None, 8), (3, 8), (8, 3)):
        run = ready(compact, budget)
        for step in filter(None, (first, then)):
            for part, state in zip(run, copy.deepcopy(states[step]), strict=True):
                part.load_state_dict(state)
        assert run[2].step == then and bool(mask(run[0])) == (then == 8)  # the first one is of 4
        assert take_steps(*run[:2], range(then + 1, TOTAL + 1))[8 - then :] == expected


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model, optimizer, steps = ready(target_modules=["q_proj", "v_proj"])
    take_steps(model, optimizer, range(1, 4))
    state, before = steps.state_dict(), digest(model)
    other = adalora_llama(**SCHEDULE, target_modules=["q_proj", "k_proj"])
    with pytest.raises(ValueError, match=r"layers of the model, differs in model\."):
        AdaLoraSteps(other, optimizer_of(other), TOTAL).load_state_dict(state)
    small = adalora_llama(**{**SCHEDULE, "init_r": 4}, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="q_proj had 6 triplets, in the model 4; load the model"):
        AdaLoraSteps(small, optimizer_of(small), TOTAL).load_state_dict(state)
    for wrong in ({}, None, {"record": b"{}"}):
        with pytest.raises(ValueError, match=r"expected what AdaLoraSteps\.state_dict"):
            steps.load_state_dict(wrong)
    with pytest.raises(ValueError, match="state_dict: version None, expected 1"):
        steps.load_state_dict({**state, "record": b"{}"})
    assert digest(model) == before and steps.step == 3


def test_a_step_of_no_learning_rate_counts_and_one_of_zeros_does_not():
    """Warm-up begins with the first; torch.distributed.checkpoint makes states with the second."""
    model, optimizer, steps = ready(target_modules=["q_proj"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert steps.step == 0
    take_steps(model, optimizer, range(1, 2))
    assert steps.step == 1


def test_accumulation_of_accelerate_counts_steps_of_the_optimizer():
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adalora_llama(**SCHEDULE)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        steps = AdaLoraSteps(model, optimizer, TOTAL)
        for batch in range(2 * TOTAL):
            with accelerator.accumulate(model):
                accelerator.backward(model(**text_batch(seed=batch)).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                assert steps.step == (batch + 1) // 2
                optimizer.zero_grad()
        assert sum(map(sum, mask(model).values())) == 28
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_the_schedule_is_that_of_the_training():
    with pytest.warns(UserWarning, match="total_step of the AdaLoRA config is 1000"):
        model, _, _ = ready(total_step=1000)
    config = model.peft_config["default"]
    assert config.total_step == TOTAL
    with pytest.raises(ValueError, match="tinit, tfinal: expected tinit"):
        set_total_step(model.base_model, 6, 0)
    config.rank_pattern = {"after the last mask": [True]}
    set_total_step(model.base_model, 100, TOTAL - 4)
    assert config.total_step == TOTAL
    with pytest.raises(ValueError, match="expected an AdaLoRA adapter in training"):
        prepare(nn.Linear(2, 2))


@pytest.mark.parametrize("patched", [False, True])
def test_a_loop_that_allocates_nothing_is_told_so(patched):
    """PEFT says nothing: all ranks stay init_r, which is LoRA."""
    model = adalora_llama(**SCHEDULE)
    if patched:
        peftkern.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take_steps(model, optimizer_of(model), range(1, TOTAL + 1))
    said = [str(w.message) for w in caught if "update_and_allocate" in str(w.message)]
    assert len(said) == patched and mask(model) == {}
    assert not said or said[0].startswith("AdaLoRA: 3 optimizer steps and no update_and_allocate")


def test_a_loop_that_allocates_is_told_nothing():
    model, optimizer, _ = ready()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdaLoRA: ")
        take_steps(model, optimizer, range(1, 7))
        model.eval()
        for seed in range(9):
            model(**text_batch(seed=seed))


def in_16_bits(nf4: bool) -> nn.Module:
    """All that is trained in bfloat16, as TRL casts it over a 4-bit base."""
    model = adalora_llama(torch.bfloat16, nf4, **SCHEDULE)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def test_peft_alone_cannot_take_a_wider_diagonal():
    model = in_16_bits(nf4=True)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            parameter.data = parameter.data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(**text_batch())


@pytest.mark.parametrize("nf4", [False, True])
def test_the_diagonal_is_float32_and_moves(nf4):
    model = in_16_bits(nf4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    AdaLoraSteps(model, optimizer, TOTAL)
    named = dict(model.named_parameters())
    E, A, ranknum = (
        {n: p for n, p in named.items() if group in n} for group in ("lora_E", "lora_A", "ranknum")
    )
    assert {p.dtype for p in E.values()} == {torch.float32}
    assert {p.dtype for p in A.values()} == {torch.bfloat16}
    assert {(p.dtype, p.requires_grad) for p in ranknum.values()} == {(torch.float32, False)}
    for p in E.values():
        p.data.fill_(1.0)  # beside which a step of 1e-4 is nothing in bfloat16
    assert torch.equal(torch.ones(1).bfloat16() - 1e-4, torch.ones(1).bfloat16())
    peftkern.reset_stats()
    model(**text_batch()).loss.backward()
    assert served_by_us() == 14 and fallbacks() == {}
    optimizer.step()
    assert all(p.grad is not None and not (p == 1).any() for p in E.values())


@pytest.mark.parametrize("nf4", [False, True])
def test_pefts_own_operations_take_it_too(nf4):
    """What falls back, merges or is unpatched still computes; lora_E is as wide as lora_A then."""
    model = in_16_bits(nf4)
    prepare(model)
    for n, p in model.named_parameters():
        if "lora_E" in n:
            p.data.fill_(0.5)
    expected = model(**text_batch()).loss.item()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        peftkern.reset_stats()
        assert model(**text_batch()).loss.item() == pytest.approx(expected, rel=2**-7)
        assert fallbacks() == {"global module hooks": 14}
    finally:
        handle.remove()
    if not nf4:
        merged = copy.deepcopy(model)
        merged.merge_adapter()
        assert merged(**text_batch()).loss.item() == pytest.approx(expected, rel=2**-7)
    peftkern.unpatch(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora_E" in n} == {torch.bfloat16}
    assert model(**text_batch()).loss.item() == pytest.approx(expected, rel=2**-7)
