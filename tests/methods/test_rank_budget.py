"""Budgets in other units than ranks: what a triplet costs, floors, caps, and a whole training."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn
from transformers import MixtralConfig

from peftkern.layers import SVDLinear
from peftkern.methods import RankBudget, RankLimits
from peftkern.methods.adalora import RankAllocator

SIZES = {
    "layers.0.q_proj": (16, 16),
    "layers.0.experts.0.up": (16, 40),
    "layers.0.experts.1.up": (16, 40),
    "layers.1.q_proj": (16, 16),
}


def triplets(r: int = 4, dtype: torch.dtype = torch.float32) -> dict:
    sizes = {name: ((r, 1), (r, n), (m, r)) for name, (n, m) in SIZES.items()}
    return {name: tuple(torch.ones(s, dtype=dtype) for s in three) for name, three in sizes.items()}


def test_what_a_triplet_costs():
    def cost(of, dtype=torch.float32, model=None) -> list[float]:
        limits = RankBudget(cost=of).limits(triplets(dtype=dtype), 2, model)
        assert limits.target_budget == 2 * sum(limits.cost.values())
        assert limits.init_budget == 4 * sum(limits.cost.values())
        return list(limits.cost.values())

    assert cost("rank") == [1, 1, 1, 1]
    assert cost("parameters") == [32, 56, 56, 32]
    assert cost("bytes", torch.bfloat16) == [64, 112, 112, 64]
    assert cost("flops") == [64, 112, 112, 64]
    mixture = nn.Module()
    mixture.config = MixtralConfig(num_local_experts=8, num_experts_per_tok=2)
    assert cost("flops", model=mixture) == [64, 28, 28, 64]
    assert cost({"q_proj": 0.5, "experts.0": 2, "experts": 3}) == [0.5, 2, 3, 0.5]
    assert cost(len) == [len(name) for name in SIZES]


def test_floors_and_caps_by_name():
    budget = RankBudget(9, min_rank={"experts": 1}, max_rank={"layers.0.q_proj": 2, "experts": 9})
    limits = budget.limits(triplets(), target_r=1)
    assert list(limits.min_rank.values()) == [0, 1, 1, 0]
    assert list(limits.max_rank.values()) == [2, 9, 9, None]
    assert (limits.init_budget, limits.target_budget) == (14, 9)
    two = limits.of(["layers.0.q_proj", "layers.0.experts.0.up"])
    assert two == {"cost": [1, 1], "r_min": [0, 1], "r_max": [2, 9]}
    assert limits.of(["layers.1.q_proj"])["r_max"][0] > 10**6
    assert budget.limits(triplets(r=2), target_r=1) == limits  # after triplets were dropped
    assert RankBudget().is_plain and not budget.is_plain
    state = json.loads(json.dumps(limits.state_dict()))
    assert RankLimits.from_state(state, list(SIZES)) == limits
    for wrong in ({}, {**state, "cost": 1}, {**state, "cost": {"other": 1.0}}, {"a": 1}):
        with pytest.raises(ValueError, match="limits: expected cost, min_rank and max_rank"):
            RankLimits.from_state(wrong, list(SIZES))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"cost": "time"}, "cost: expected one of rank, .*got 'time'"),
        ({"cost": 3}, "cost: expected a string, a mapping or a function, got a int"),
        ({"cost": {"q_proj": 1}}, "cost: expected one for every layer, none fits layers.0.experts"),
        ({"cost": lambda name: -1}, "cost of layers.0.q_proj: expected a positive number, got -1"),
        ({"total": 0}, "total: expected a positive number, got 0"),
        ({"total": 3, "min_rank": 1}, "total: expected at least 4, the cost of min_rank, got 3"),
        ({"min_rank": -1}, "min_rank: expected a number of triplets, got -1"),
        ({"min_rank": None}, "min_rank: expected a number of triplets, got None"),
        ({"max_rank": {"q_proj": 1.5}}, "max_rank: expected a number of triplets, got 1.5"),
        ({"min_rank": {"v_proj": 1}}, "min_rank: no layer has 'v_proj' in its name"),
        ({"min_rank": 5}, r"min_rank, max_rank: expected .* min\(max_rank, 4\), layers.0.q_proj"),
        ({"min_rank": 3, "max_rank": {"experts.1": 2}}, "layers.0.experts.1.up has 3 and 2"),
    ],
)
def test_what_makes_no_sense_is_named(given, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        RankBudget(**given).limits(triplets(), 2)


class Mixture(nn.Module):
    """Two experts of different width, each for half of the rows, and a layer before them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = SVDLinear(nn.Linear(8, 12), r=4)
        self.experts = nn.ModuleList(SVDLinear(nn.Linear(12, n), r=4) for n in (6, 30))

    def forward(self, x):
        one, other = torch.tanh(self.first(x)).chunk(2)
        return self.experts[0](one).square().mean() + self.experts[1](other).square().mean()


SCHEDULE = {"target_r": 2, "total_step": 16, "tinit": 2, "tfinal": 4, "deltaT": 3}
LIMITED = RankBudget(
    100, "parameters", min_rank={"experts": 1}, max_rank={"first": 2, "experts.0": 3}
)
MEASURED = RankBudget(None, {"first": 0.011, "experts.0": 0.017, "experts.1": 0.031}, min_rank=1)


def ready(budget: RankBudget | None) -> tuple:
    net = Mixture()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    return net, optimizer, RankAllocator(net, **SCHEDULE, budget=budget)


def train(net, optimizer, allocator, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        loss = net(x) + 0.1 * allocator.orthogonality_loss()
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("budget", [LIMITED, MEASURED])
def test_a_training_stays_within_its_limits_and_resumes(budget):
    run, losses, seen, checkpoint = ready(budget), [], [], io.BytesIO()
    limits = run[2].limits
    assert run[2].layer_importance() == {}
    for step in range(1, 17):
        losses += train(*run, range(step, step + 1))
        if step == 6:
            torch.save([one.state_dict() for one in run], checkpoint)
        allowed, drawn = run[2].schedule(step)
        if drawn or step >= 12:
            ranks = {name: sum(kept) for name, kept in run[2].rank_pattern().items()}
            spent = sum(limits.cost[name] * r for name, r in ranks.items())
            assert spent <= allowed * (1 + 1e-9)
            most = limits.of(list(ranks))["r_max"]
            assert all(limits.min_rank[n] <= r for n, r in ranks.items())
            assert all(r <= cap for r, cap in zip(ranks.values(), most, strict=True))
            assert all((run[0].get_submodule(n).lora_E != 0).sum() == r for n, r in ranks.items())
            seen.append(allowed)
    assert seen == sorted(seen, reverse=True) and seen[-1] == limits.target_budget
    left = limits.target_budget - spent  # a triplet of the dearest layer may not have fitted
    assert left < max(limits.cost.values())
    assert run[2].layer_importance().keys() == ranks.keys()
    resumed = ready(None)
    checkpoint.seek(0)
    for one, state in zip(resumed, torch.load(checkpoint, weights_only=True), strict=True):
        one.load_state_dict(state)
    assert resumed[2].limits == limits
    assert train(*resumed, range(7, 17)) == losses[6:]
    assert resumed[2].rank_pattern() == run[2].rank_pattern()
    assert sum(run[2].compact_(run[1]).values()) == sum(ranks.values())
    assert train(*run, range(17, 18))[0] > 0


def test_a_budget_that_says_nothing_is_the_usual_one():
    plain, same = ready(None), ready(RankBudget())
    unit = ready(RankBudget(cost=lambda name: 1.0))
    assert same[2].limits is None and unit[2].limits is not None
    losses = [train(*run, range(1, 17)) for run in (plain, same, unit)]
    assert losses[0] == losses[1] == losses[2]
