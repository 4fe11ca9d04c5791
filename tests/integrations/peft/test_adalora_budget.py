"""Budgets of PEFT's AdaLoRA in parameters or other units, under a loop of one's own."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adalora_models import adalora_llama, optimizer_of
from adalora_runs import mask, take_steps
from peft import AdaLoraConfig, get_peft_model
from peft_models import take_small_layers
from torch import nn
from transformers import MixtralConfig

import peftkern
from peftkern.integrations.peft.adalora_budget import set_budget
from peftkern.integrations.peft.adalora_state import load_state
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.methods import RankBudget

pytestmark = pytest.mark.usefixtures("one_thread")
TOTAL, LAST = 14, 10
SCHEDULE = {"total_step": TOTAL, "tinit": 2, "tfinal": TOTAL - LAST, "deltaT": 2}
BUDGET = RankBudget(cost="parameters", min_rank={"v_proj": 1}, max_rank={"layers.0": 3})


def ready(budget: RankBudget | None = BUDGET, **options) -> tuple:
    model = adalora_llama(**SCHEDULE)
    optimizer = optimizer_of(model)
    return model, optimizer, AdaLoraSteps(model, optimizer, TOTAL, budget=budget, **options)


def ranks(model) -> dict[str, int]:
    return {name.removesuffix(".lora_E"): sum(kept) for name, kept in mask(model).items()}


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> tuple:
    """A training with limits, saved after step 5, and the states of the steps after it."""
    folder, threads = tmp_path_factory.mktemp("limited"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patches:  # as the fixtures of a test do
        take_small_layers(patches.setattr)
        torch.set_num_threads(1)
        model, optimizer, steps = ready()
        take_steps(model, optimizer, range(1, 6))
        steps.save(folder)
        held = copy.deepcopy(optimizer.state_dict())
        states = take_steps(model, optimizer, range(6, TOTAL + 1))
    torch.set_num_threads(threads)
    return model, folder, held, states


def test_the_last_mask_is_within_the_limits(limited):
    model = limited[0]
    allocator, found = model.base_model.rankallocator, ranks(model)
    limits = allocator.limits
    spent = sum(limits.cost[name] * r for name, r in found.items())
    assert limits.target_budget - max(limits.cost.values()) < spent <= limits.target_budget
    assert limits.target_budget == 2 * sum(limits.cost.values())  # of uniform rank 2
    assert all(r <= 3 for name, r in found.items() if "layers.0." in name)
    assert all(r >= 1 for name, r in found.items() if "v_proj" in name)
    assert allocator.drawn.budget == allocator.budget_schedule(LAST)[0]
    assert allocator.drawn.layer_importance().keys() == found.keys()


def test_a_training_goes_on_with_the_limits_of_its_checkpoint(limited):
    model, folder, held, expected = limited
    for budget, warned in ((BUDGET, False), (None, False), (RankBudget(cost="bytes"), True)):
        resumed, optimizer, steps = ready(budget)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.load(folder)
        said = [str(w.message) for w in caught if "budget of the checkpoint" in str(w.message)]
        assert len(said) == warned
        optimizer.load_state_dict(copy.deepcopy(held))
        if budget is not BUDGET:  # the same from here on
            assert resumed.base_model.rankallocator.limits == model.base_model.rankallocator.limits
            continue
        assert take_steps(resumed, optimizer, range(6, TOTAL + 1)) == expected
    with pytest.warns(UserWarning, match="budget of the checkpoint"):
        set_budget(resumed.base_model, RankBudget(cost="flops"))
    assert resumed.base_model.rankallocator.limits == model.base_model.rankallocator.limits
    peftkern.unpatch(resumed)
    with pytest.raises(ValueError, match=r"model: expected a patched one, for .* has a budget"):
        load_state(resumed, folder)


def test_a_budget_that_says_nothing_leaves_pefts_masks():
    model, optimizer, _ = ready(RankBudget())
    assert model.base_model.rankallocator.limits is None
    plain, plain_optimizer, _ = ready(None)
    steps = range(1, 5)
    assert take_steps(model, optimizer, steps) == take_steps(plain, plain_optimizer, steps)
    model = adalora_llama(**SCHEDULE)
    with pytest.raises(ValueError, match="budget: expected a patched model, has a RankAllocator"):
        set_budget(model.base_model, BUDGET)
    with pytest.raises(ValueError, match="total: expected at least"):
        ready(RankBudget(1, min_rank=1))


def test_a_mask_needs_importance():
    model, _, _ = ready()
    with pytest.raises(ValueError, match="importance of a step before the first mask"):
        model.base_model.update_and_allocate(LAST)


def test_what_was_compacted_early_goes_on_with_its_limits(tmp_path):
    model, optimizer, steps = ready(compact=4)
    take_steps(model, optimizer, range(1, 7))
    steps.save(tmp_path)
    held = copy.deepcopy(optimizer.state_dict())
    expected = take_steps(model, optimizer, range(7, TOTAL + 1))
    resumed, optimizer, steps = ready(compact=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*budget of the checkpoint")
        steps.load(tmp_path)
        set_budget(resumed.base_model, BUDGET)  # as the Trainer's callback does, of fewer triplets
    with pytest.warns(UserWarning, match="budget of the checkpoint"):  # with floors that are gone
        set_budget(resumed.base_model, RankBudget(cost="parameters", min_rank=2))
    optimizer.load_state_dict(held)
    assert take_steps(resumed, optimizer, range(7, TOTAL + 1)) == expected
    limits, found = resumed.base_model.rankallocator.limits, ranks(resumed)
    assert sum(limits.cost[name] * r for name, r in found.items()) <= limits.target_budget
    assert all(r >= 1 for name, r in found.items() if "v_proj" in name)


class Experts(nn.Module):
    """A router's choice of two of four experts, each a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2)
        self.attention = nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 24) for _ in range(4))

    def forward(self, x):
        x = self.attention(x)
        return sum(self.experts[i](part).square().mean() for i, part in enumerate(x.chunk(4)))


def test_experts_have_costs_floors_and_caps_of_their_own():
    targets = {"target_modules": ["attention", "0", "1", "2", "3"], "init_r": 6, "target_r": 2}
    model = get_peft_model(Experts(), AdaLoraConfig(**{**SCHEDULE, **targets}))
    optimizer = optimizer_of(model)
    budget = RankBudget(cost="flops", min_rank={"experts": 1}, max_rank={"experts.3": 2})
    AdaLoraSteps(model, optimizer, TOTAL, budget=budget)
    limits = model.base_model.rankallocator.limits
    expert = 2 * (16 + 24) * 2 / 4  # of two tokens in four
    assert limits.cost == {"attention": 64.0, **{f"experts.{i}": expert for i in range(4)}}
    for step in range(1, TOTAL + 1):
        model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks(model)
    assert all(found[f"experts.{i}"] >= 1 for i in range(4)) and found["experts.3"] <= 2
    assert sum(limits.cost[name] * r for name, r in found.items()) <= limits.target_budget
