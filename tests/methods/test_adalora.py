"""AdaLoRA for plain torch: schedule, SVDLinear, RankAllocator, compaction."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from grids import thinned
from tolerances import COMPACTED_RTOL, GRADCHECK, assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear, SVDLinear
from peftkern.methods.adalora import BudgetSchedule, RankAllocator
from peftkern.methods.compaction import shrink_triplets_

SCHEDULE = {"target_r": 2, "total_step": 30, "tinit": 3, "tfinal": 8, "deltaT": 2}


class Net(nn.Module):
    """Three SVDLinear layers, one of them over NF4, with different shapes and ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = SVDLinear(nn.Linear(24, 40, dtype=dtype), r=4)
        self.second = SVDLinear(NF4Linear(40, 64, dtype=dtype), r=6, lora_alpha=0)
        self.third = SVDLinear(nn.Linear(64, 10, bias=False, dtype=dtype), r=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def ready(lr: float = 0.01, **options) -> tuple[Net, torch.optim.AdamW, RankAllocator]:
    net = Net()
    return net, torch.optim.AdamW(parameters(net), lr=lr), RankAllocator(net, **options)


def parameters(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def train(net: Net, optimizer, allocator, steps: range, orthogonal: float = 0.1) -> list[float]:
    """A regression on random data that depends on the step alone."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 24, generator=generator)
        loss = F.mse_loss(net(x), torch.sin(x @ torch.ones(24, 10) * 0.2))
        if orthogonal:
            loss = loss + orthogonal * allocator.orthogonality_loss()
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_schedule_is_pefts() -> None:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    for total, tinit, tfinal, deltaT, init, target in [
        (30, 3, 8, 2, 13, 6),
        (1000, 100, 300, 10, 1152, 384),
        (50, 0, 0, 1, 7, 7),
        (77, 5, 13, 3, 64, 0),
    ]:
        config = AdaLoraConfig(total_step=total, tinit=tinit, tfinal=tfinal, deltaT=deltaT)
        theirs = Theirs(nn.Module(), config, "default")
        theirs.init_bgt, theirs.target_bgt = init, target
        ours = BudgetSchedule(init, target, total, tinit, tfinal, deltaT)
        for step in range(total + 3):
            assert ours(step) == theirs.budget_schedule(step)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"tinit": 20}, "tinit"), ({"deltaT": 0}, "deltaT"), ({"target_budget": -1}, "target_budget")],
)
def test_schedule_names_a_wrong_argument(change: dict, complaint: str) -> None:
    settings = {"init_budget": 8, "target_budget": 4, "total_step": 20, **change}
    with pytest.raises(ValueError, match=complaint):
        BudgetSchedule(**settings)


@pytest.mark.parametrize(
    ("dtypes", "kind"),
    thinned(
        [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2],
        ["dense", "nf4"],
        diagonals=2,
    ),
)
def test_svd_linear_against_float64(every_backend: str, kind: str, dtypes) -> None:
    dtype, adapter_dtype = (getattr(torch, name) for name in dtypes)
    linear = nn.Linear(70, 45, dtype=dtype)
    base = NF4Linear.from_linear(linear) if kind == "nf4" else linear
    layer = SVDLinear(base, r=5, lora_alpha=7, adapter_dtype=adapter_dtype)
    nn.init.normal_(layer.lora_E)
    nn.init.normal_(layer.lora_B)
    weight = base.to_linear().weight if kind == "nf4" else linear.weight
    x, dy = torch.randn(9, 70, dtype=dtype), torch.randn(9, 45, dtype=dtype)

    def eager(x: Tensor, dy: Tensor, wide: torch.dtype | None) -> tuple[Tensor, ...]:
        cast = (lambda t: t.detach().to(wide)) if wide else (lambda t: t.detach().clone())
        x, *leaves = (
            cast(t).requires_grad_() for t in (x, layer.lora_A, layer.lora_E, layer.lora_B)
        )
        A, E, B = leaves
        update = (x.to(A.dtype) @ (A * E).T @ B.T) * layer.lora_alpha / (5 + 1e-5)
        y = F.linear(x, cast(weight), cast(linear.bias)) + update
        y = y.to(x.dtype)
        return y.detach(), *torch.autograd.grad(y, (x, A, E, B), cast(dy))

    x.requires_grad_()
    y = layer(x)
    got = y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_E, layer.lora_B), dy)
    assert_as_accurate_as_torch(got, eager(x, dy, None), eager(x, dy, torch.float64))


def test_svd_linear_gradcheck() -> None:
    layer = SVDLinear(nn.Linear(6, 5).double(), r=3, adapter_dtype=torch.float64)
    nn.init.normal_(layer.lora_E)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        parameters = {"lora_A": A, "lora_E": E, "lora_B": B}
        return torch.func.functional_call(layer, parameters, (x,))

    inputs = (x, layer.lora_A, layer.lora_E, layer.lora_B)
    torch.autograd.gradcheck(function, inputs, **GRADCHECK)


def test_svd_linear_starts_at_its_base_and_merges() -> None:
    for base in (nn.Linear(20, 30), NF4Linear(20, 30, bias=False)):
        layer = SVDLinear(base, r=4, lora_dropout=0.5).eval()
        x = torch.randn(5, 20)
        assert torch.equal(layer(x), base(x))
        nn.init.normal_(layer.lora_E)
        torch.testing.assert_close(layer.merge()(x), layer(x))
        assert not base.weight.requires_grad
        trained = {n for n, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_E", "lora_B"}


@pytest.mark.parametrize("ties", ["exact", "peft"])
def test_allocator_follows_the_budget(backend: str, ties: str) -> None:
    net, optimizer, allocator = ready(**SCHEDULE, ties=ties)
    seen = []
    for step in range(1, 31):
        train(net, optimizer, allocator, range(step, step + 1))
        budget, draw = allocator.schedule(step)
        alive = sum(int((layer.lora_E != 0).sum()) for layer in allocator.layers.values())
        if draw or step >= 22:
            assert alive == sum(map(sum, allocator.rank_pattern().values())) == budget
            seen.append(budget)
        else:
            assert alive == 13
    assert seen[0] > seen[-1] == 6
    assert allocator.importance is None  # its memory is free


def test_allocator_resumes(backend: str) -> None:
    """State through torch.save, at steps before, in and after the allocation."""
    whole, optimizer, allocator = ready(**SCHEDULE)
    checkpoints, losses = {}, []
    for step in range(1, 31):
        if step in (2, 10, 22, 26):
            checkpoints[step] = io.BytesIO()
            states = [one.state_dict() for one in (whole, optimizer, allocator)]
            torch.save(states, checkpoints[step])
        losses += train(whole, optimizer, allocator, range(step, step + 1))
    for step, file in checkpoints.items():
        resumed = ready(lr=0.5, target_r=1, total_step=99)
        file.seek(0)
        for target, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            target.load_state_dict(state)
        assert train(*resumed, range(step, 31)) == losses[step - 1 :]


def test_allocator_complains() -> None:
    net = Net()
    with pytest.raises(ValueError, match="SVDLinear"):
        RankAllocator(nn.Linear(3, 3), **SCHEDULE)
    with pytest.raises(ValueError, match="ties"):
        RankAllocator(net, **SCHEDULE, ties="none")
    allocator = RankAllocator(net, **SCHEDULE)
    with pytest.raises(ValueError, match="before zero_grad"):
        allocator.update_and_allocate(1)
    with pytest.raises(ValueError, match="nothing was scored"):
        allocator.update_and_allocate(22)
    with pytest.raises(ValueError, match="none was drawn"):
        allocator.update_and_allocate(23)
    net(torch.randn(2, 24)).sum().backward()
    net.second.lora_B.grad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite in second;"):
        allocator.update_and_allocate(1)
    net.second.lora_B.grad[3, 2] = 0.0
    allocator.update_and_allocate(2)
    other = RankAllocator(Net().first, **{**SCHEDULE, "target_r": 1})
    with pytest.raises(ValueError, match="first"):
        allocator.load_state_dict({**other.state_dict(), "shapes": {"first": []}})


def test_an_unused_layer_loses_its_rank_instead_of_failing(backend: str) -> None:
    net = Net()
    net.unused = SVDLinear(nn.Linear(8, 8), r=4)
    allocator = RankAllocator(net, **{**SCHEDULE, "target_r": 3})
    train(net, torch.optim.AdamW(parameters(net), lr=0.01), allocator, range(1, 31), orthogonal=0)
    assert sum(allocator.rank_pattern()["unused"]) == 0


@pytest.mark.parametrize("at", [12, 22, 27])
def test_compaction_changes_nothing_but_the_size(backend: str, at: int) -> None:
    """Before the mask is final only if no triplet would revive: the twin's masks are watched."""
    net = Net()
    groups = [
        {"params": [net.first.lora_A, net.second.lora_A, net.third.lora_A], "lr": 0.01},
        {"params": [p for n, p in net.named_parameters() if "lora_E" in n or "lora_B" in n]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    allocator = RankAllocator(net, **SCHEDULE)
    train(net, optimizer, allocator, range(1, at + 1), orthogonal=0)
    twin, twin_optimizer, twin_allocator = copy.deepcopy((net, optimizer, allocator))
    ranks = twin_allocator.compact_(twin_optimizer)
    assert ranks == {name: sum(kept) for name, kept in allocator.rank_pattern().items()}
    assert sum(ranks.values()) < 13
    for parameter, state in twin_optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    x = torch.randn(7, 24)
    torch.testing.assert_close(twin(x), net(x))
    if at >= 22:
        steps = range(at + 1, at + 12)
        wanted = train(net, optimizer, allocator, steps, orthogonal=0)
        got = train(twin, twin_optimizer, twin_allocator, steps, orthogonal=0)
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(wanted), rtol=COMPACTED_RTOL, atol=0
        )
    else:
        train(twin, twin_optimizer, twin_allocator, range(at + 1, 31))
        assert sum(map(sum, twin_allocator.rank_pattern().values())) == 6
    saved = {k: v.clone() for k, v in twin.state_dict().items()}
    fresh = Net()
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(x), twin(x))


def test_compaction_to_nothing(backend: str) -> None:
    layer = SVDLinear(nn.Linear(6, 5), r=3)
    nn.init.normal_(layer.lora_E)
    layer.lora_A.grad = torch.ones(3, 6)
    shrink_triplets_(layer.lora_E, layer.lora_A, layer.lora_B, torch.zeros(3, dtype=torch.bool))
    x = torch.randn(4, 6, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.base(x))
    y.sum().backward()
    assert layer.lora_A.shape == layer.lora_A.grad.shape == (0, 6)
    assert layer.lora_B.grad.shape == (5, 0)
    with pytest.raises(ValueError, match="keep"):
        shrink_triplets_(layer.lora_E, layer.lora_A, layer.lora_B, torch.zeros(2))


def test_compaction_saves_memory() -> None:
    net, optimizer, allocator = ready(**SCHEDULE)
    train(net, optimizer, allocator, range(1, 31))

    def held() -> int:
        tensors = [*parameters(net)]
        tensors += [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    before = held()
    allocator.compact_(optimizer)
    assert held() < 0.7 * before  # 6 of 13 triplets, of different lengths
    assert peftkern.methods.adalora.RankAllocator is RankAllocator
