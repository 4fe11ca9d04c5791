"""DyLoRA: the formula at every rank, rows that stay put, and one run against many."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from paths import STUDIES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear
from peftkern.methods.dylora import DyLoRALinear, sample_rank, set_rank

sys.path.append(str(STUDIES))
import dylora_ranks


def layer_with_update(nf4: bool = False, r: int = 4, **options) -> DyLoRALinear:
    base = nn.Linear(64, 24)
    layer = DyLoRALinear(NF4Linear.from_linear(base) if nf4 else base, r=r, **options)
    for column in layer.lora_B:
        nn.init.normal_(column, std=0.1)
    return layer


def transcription(layer: DyLoRALinear, x: Tensor, b: int) -> Tensor:
    """The paper's formula in float64."""
    base = layer.base
    weight = peftkern.dequantize_nf4(base.nf4) if hasattr(base, "nf4") else base.weight
    A = torch.stack(list(layer.lora_A)).double()[:b]
    B = torch.stack(list(layer.lora_B), dim=1).double()[:, :b]
    y = x.double() @ weight.double().T + base.bias.double()
    scaling = layer.lora_alpha / (b if layer.scale_by_rank else layer.r)
    return y + scaling * (x.double() @ A.T) @ B.T


@pytest.mark.parametrize("scale_by_rank", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_every_rank_computes_the_formula_with_gradients(nf4, b, scale_by_rank):
    layer = layer_with_update(nf4, scale_by_rank=scale_by_rank)
    set_rank(layer, b)
    x = torch.randn(7, 64, requires_grad=True)
    wanted = transcription(layer, x, b)
    y = layer(x)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    leaves = [x, *list(layer.lora_A)[:b], *list(layer.lora_B)[:b]]
    dy = torch.randn(7, 24)
    mine = torch.autograd.grad(y, leaves, dy)
    theirs = torch.autograd.grad(wanted, leaves, dy.double())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_last_only", [False, True])
def test_rows_that_a_step_does_not_use_stay_bit_identical_under_adam(train_last_only):
    layer = layer_with_update()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> None:
        layer(torch.randn(5, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # momentum for every row
        step()
    set_rank(layer, 2, train_last_only=train_last_only)
    before = copy.deepcopy(layer)
    for _ in range(3):
        step()
    for old, new in ((before.lora_A, layer.lora_A), (before.lora_B, layer.lora_B)):
        stays = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
        assert stays == [train_last_only, False, True, True]


class RanksSeen(TorchDispatchMode):
    """The ranks that peftkern's ops are called with: r of lora_A [r, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "peftkern":
            place = [argument.name for argument in func._schema.arguments].index("lora_A")
            self.ranks.append(args[place].shape[0])
        return func(*args, **(kwargs or {}))


def test_cost_falls_with_the_rank():
    """The kernels, forward and backward, see no more than the ranks in use."""
    layer = layer_with_update(r=16)
    for b in (1, 4, 16):
        set_rank(layer, b)
        with RanksSeen() as seen:
            layer(torch.randn(32, 64)).sum().backward()
        assert seen.ranks == [b, b]


def test_sampling_sets_all_layers_and_obeys_its_generator():
    model = nn.Sequential(layer_with_update(r=6), DyLoRALinear(nn.Linear(24, 8), r=3))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [[sample_rank(model, generator=g) for _ in range(60)] for g in generators]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {1, 2, 3, 4, 5, 6}
    assert (model[0].rank, model[1].rank) == (drawn[1][-1], min(3, drawn[1][-1]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_rank(use_reentrant):
    layer = layer_with_update()
    set_rank(layer, 2)
    x = torch.randn(5, 64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), [x, layer.lora_A[1]])
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(layer.lora_A[1].grad, plain[1])
    assert layer.lora_A[2].grad is None


@pytest.mark.parametrize(("nf4", "kind"), [(False, LoRALinear), (True, NF4LoRALinear)])
def test_truncate_and_merge_keep_the_function(nf4, kind):
    layer = layer_with_update(nf4)
    set_rank(layer, 3)
    x = torch.randn(5, 64)
    cut = layer.truncate()
    assert type(cut) is kind
    assert torch.equal(cut(x), layer(x))
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_one_run_gives_a_usable_model_at_every_rank():
    """The distance to the planted update of dylora_ranks.py: against a run for each rank,
    and against the best that a rank can do (Eckart-Young)."""
    fit, sampling, values = dylora_ranks.fit, dylora_ranks.sampling, dylora_ranks.VALUES
    one, last, cut = (fit(800, p) for p in (sampling(), sampling(True), lambda layer: None))
    for i, rank in enumerate((1, 2, 3)):
        least = values[rank:].norm().item()
        assert fit(200, lambda layer, rank=rank: set_rank(layer, rank))[i] < 1.03 * least
        assert one[i] < 1.05 * least
        assert last[i] < 1.2 * least
        assert cut[i] > 1.3 * least  # LoRA cut to its first ranks is no such model
    assert max(one[3], last[3]) < 0.1 * values.norm()


def test_the_papers_scaling_leaves_a_distance():
    """What the module's docstring says of lora_alpha / b."""
    distances = dylora_ranks.fit(1200, dylora_ranks.sampling(), scale_by_rank=True)
    for rank, found in zip(dylora_ranks.RANKS, distances, strict=True):
        assert found > 1.1 * dylora_ranks.VALUES[rank:].norm().item()


def test_state_dict_and_wrong_arguments():
    layer, other = layer_with_update(), layer_with_update()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), other(x))
    for rank in (0, 5, 1.5):
        with pytest.raises(
            ValueError, match="rank: expected an integer of at least 1 and at most 4"
        ):
            set_rank(layer, rank)
    with pytest.raises(ValueError, match="model: expected at least one DyLoRALinear"):
        sample_rank(nn.Linear(2, 2))
