"""RoSA's layer against its formula, and masks from gradients against sorting."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import BF16, F32
from peak_memory import LargestTensor
from rosa_cases import formula, random_mask
from tolerances import AUTOCAST_RTOL, ROSA_OVERLAP, errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.layers import NF4Linear
from peftkern.methods.rosa import RoSALinear, RoSAScheduler, density_report
from peftkern.methods.top_gradients import TopGradients


def drawn_layer(linear: nn.Linear, **options) -> RoSALinear:
    layer = RoSALinear(linear, r=4, **options)
    layer.set_mask(random_mask((layer.out_features, layer.in_features), layer.nnz))
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.normal_(layer.values, std=0.1)
    return layer


def test_x_is_saved_once_and_nothing_of_the_size_of_the_weight():
    N, K, T = 96, 128, 20
    layer = drawn_layer(nn.Linear(K, N), density=0.05)
    sizes = LargestTensor()
    saved = []
    x = torch.randn(T, K, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, sizes:
        y = layer(x)
    with sizes:
        y.square().sum().backward()
    of_x = {t.data_ptr() for t in saved if t.numel() == T * K}
    assert of_x == {x.data_ptr()}
    assert layer.values.grad is not None and x.grad is not None
    assert 0 < sizes.numel < N * K


@pytest.mark.parametrize("nf4", [False, True])
def test_layer_computes_the_formula_and_merges(nf4):
    linear = nn.Linear(64, 24)
    base = NF4Linear.from_linear(linear) if nf4 else linear
    layer, x = RoSALinear(base, r=4, density=0.1), torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), base(x))  # starts at nothing
    layer.set_mask(random_mask((24, 64), layer.nnz))
    torch.testing.assert_close(layer(x), base(x))  # the values too
    nn.init.normal_(layer.values), nn.init.normal_(layer.lora_B)
    weight = peftkern.dequantize_nf4(base.nf4) if nf4 else linear.weight
    o = (layer.lora_A, layer.lora_B, layer.values, base.bias)
    wanted = formula(x.double(), weight.double(), *(t.double() for t in o), layer.mask, 4.0)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.merge()(x).double(), wanted, rtol=1e-4, atol=1e-4)


def gradients(layer, x: Tensor, run=None) -> list[Tensor]:
    torch.manual_seed(2)
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (layer if run is None else run)(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def test_layer_compiles_in_one_graph_and_is_checkpointed():
    """What its function does, tests/backends/test_ops.py has."""
    layer, x = drawn_layer(nn.Linear(48, 24), density=0.1, lora_dropout=0.3), torch.randn(5, 48)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = gradients(layer, x)
    for run in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        got = gradients(layer, x, run)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("nf4", [False, True])
def test_autocast(nf4):
    linear = nn.Linear(64, 24)
    base = NF4Linear.from_linear(linear) if nf4 else linear
    layer, x = drawn_layer(base, density=0.1), torch.randn(5, 64)
    wanted = gradients(layer, x)
    with torch.autocast("cpu", BF16):
        got = gradients(layer, x)
    assert got[0].dtype is BF16 and layer.values.grad.dtype is F32
    for a, b in zip(got, wanted, strict=True):
        assert errors(a, b)[1] <= AUTOCAST_RTOL


def test_bf16_model_with_float32_values():
    layer = drawn_layer(nn.Linear(64, 24, dtype=BF16), density=0.1)
    assert layer.values.dtype is F32
    assert gradients(layer, torch.randn(5, 64, dtype=BF16))[0].dtype is BF16
    layer.bfloat16()  # the whole model cast: values too
    x = torch.randn(5, 64, dtype=BF16)
    y, _, _, _, values = gradients(layer, x)
    wanted = (2 * y.double()).T @ x.double()
    assert errors(values, wanted.view(-1)[layer.mask.flat()])[1] <= AUTOCAST_RTOL


def test_state_dict_round_trip():
    layer, x = drawn_layer(nn.Linear(48, 24), nnz=50), torch.randn(5, 48)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = RoSALinear(nn.Linear(48, 24), r=4, nnz=50)
    fresh.load_state_dict(torch.load(buffer))
    assert fresh.drawn and torch.equal(fresh(x), layer(x))
    for a, b in zip(gradients(fresh, x), gradients(layer, x), strict=True):
        assert torch.equal(a, b)
    undrawn = RoSALinear(nn.Linear(48, 24), r=4, nnz=50)
    fresh.load_state_dict(undrawn.state_dict())
    assert not fresh.drawn
    assert copy.deepcopy(layer).mask.nnz == 50


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: s["col"].fill_(48), "columns: expected indices from 0 to 47"),
        (lambda s: s["crow"].__setitem__(3, 99), "crow: expected 25 numbers"),
        (lambda s: s["col"].zero_(), "every place once|ascend"),
        (lambda s: s.update(col=torch.zeros(49, dtype=torch.int32)), "size mismatch"),
        (lambda s: s.pop("crow"), "Missing key"),
    ],
)
def test_a_damaged_state_dict_is_refused(damage, says):
    layer = drawn_layer(nn.Linear(48, 24), nnz=50)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    damage(state)
    with pytest.raises(RuntimeError, match=says):
        layer.load_state_dict(state)
    for name in ("crow", "row", "order"):  # what was there goes on working
        assert getattr(layer, name) is not None
    assert torch.equal(layer.crow, before["crow"])
    layer(torch.randn(2, 48))


def test_layer_refuses():
    linear = nn.Linear(6, 4)
    for options, says in [
        ({"density": 0.0}, r"density: expected a share in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density"),
        ({"nnz": 25}, "nnz: expected an integer of at least 1 and at most 24, got 25"),
        ({"nnz": 0}, "nnz"),
        ({"nnz": 3, "density": 0.1}, "got both"),
    ]:
        with pytest.raises(ValueError, match=says):
            RoSALinear(linear, **options)
    layer = drawn_layer(linear, nnz=3)
    with pytest.raises(ValueError, match="has one already"):
        layer.set_mask(random_mask((4, 6), 3))
    layer.reset_mask()
    assert not layer.drawn and layer.values.abs().sum() == 0
    with pytest.raises(ValueError, match=r"mask: expected 3 places in \[4, 6\]"):
        layer.set_mask(random_mask((4, 6), 2))
    with pytest.raises(ValueError, match="mask: expected 3 places"):
        layer.set_mask(random_mask((6, 4), 3))


# ---- masks from gradients


@given(N=st.integers(1, 60), K=st.integers(1, 60), T=st.integers(1, 9), share=st.floats(0, 1))
def test_one_pass_finds_exactly_the_largest(N, K, T, share):
    generator = torch.Generator().manual_seed(N * 61 + K)
    dy, x = (torch.randn(T, n, generator=generator) for n in (N, K))
    nnz = max(1, int(share * N * K))
    top = TopGradients((N, K), nnz, 2)
    top.add(dy, x)
    dense = (dy.T @ x).abs().view(-1)
    smallest_in = dense[top.mask(nnz).flat()].min()
    rest = dense.clone()
    rest[top.mask(nnz).flat()] = 0
    # Blocks of rows and the whole product are summed in other orders: equal up to rounding.
    assert rest.max() <= smallest_in * (1 + 1e-5)


PLANTED = (64, 96), 128, 120, 8  # sizes of the weight, rows, its entries, passes


def planted() -> Tensor:
    shape, _, nnz, _ = PLANTED
    return random_mask(shape, nnz).to_dense(torch.randn(nnz).sign() * (0.5 + torch.rand(nnz)))


@pytest.mark.parametrize("power", [1, 2])
def test_several_passes_keep_what_a_dense_sum_keeps(power):
    """Gradients of a planted sparse update under noise, against the sum over the whole of dW."""
    (N, K), T, nnz, passes, S = *PLANTED, planted()
    dense = torch.zeros(N, K)
    tops = {multiple: TopGradients((N, K), multiple * nnz, power) for multiple in (1, 4)}
    for _ in range(passes):
        x = torch.randn(T, K)
        dy = (x @ S.T + 2 * torch.randn(T, N)) / T
        dense += (dy.T @ x).abs() ** power
        for top in tops.values():
            top.add(dy, x)
    wanted = set(dense.view(-1).topk(nnz).indices.tolist())
    shares = {m: len(wanted & set(t.mask(nnz).flat().tolist())) / nnz for m, t in tops.items()}
    assert shares[4] >= ROSA_OVERLAP
    assert shares[1] < shares[4]  # what the candidates are for: the planted problem is not trivial
    exact = dense.view(-1)[tops[4].index]
    assert (tops[4].score <= exact * (1 + 1e-5)).all()  # sums since an entry came in


def test_collecting_holds_no_dense_gradient():
    N, K, T = 256, 320, 16
    model = nn.Sequential(RoSALinear(nn.Linear(K, N), density=0.01))
    RoSAScheduler(model, 3, collect_steps=3)
    sizes = LargestTensor()
    for _ in range(2):
        with sizes:
            model(torch.randn(T, K)).square().sum().backward()
    top = model[0].collected
    assert len(top.index) == 4 * model[0].nnz
    assert N * K / 16 < sizes.numel < N * K / 4
    assert all(p.grad is None for p in model[0].base.parameters())


@pytest.mark.parametrize("checkpointed", [None, True, False])
@pytest.mark.parametrize("nf4", [False, True])
def test_warm_up_then_the_mask_of_the_last_step(nf4, checkpointed):
    """The scheduler's mask is the top of the last warm-up step's dW, computed here in full."""
    torch.manual_seed(3)
    linear = nn.Linear(64, 32)
    base = NF4Linear.from_linear(linear) if nf4 else linear
    model = nn.Sequential(RoSALinear(base, r=2, nnz=40))
    layer = model[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = RoSAScheduler(model, 3)
    wanted, target = None, torch.randn(16, 32)
    for step in range(1, 7):
        x = torch.randn(16, 64, requires_grad=True)
        y = model(x) if checkpointed is None else checkpoint(model, x, use_reentrant=checkpointed)
        (y - target).square().mean().backward()
        if step == 3:
            dy = 2 * (y - target).detach() / y.numel()
            wanted = (dy.T @ x).abs().view(-1).topk(40).indices.sort().values
        assert (layer.values.grad is None) == (step <= 3)
        assert (layer.collected is not None) == (step == 3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert layer.drawn == (step >= 3)
        assert (layer.values in optimizer.state) == (step > 3)
        if step == 3:
            assert torch.equal(layer.mask.flat(), wanted)
            assert layer.values.abs().sum() == 0
    assert (layer.values != 0).all()


def test_learns_a_planted_low_rank_and_sparse_update():
    """Fits both parts; LoRA of the same rank keeps the sparse one as its loss."""
    torch.manual_seed(0)
    N = K = 32
    linear = nn.Linear(K, N, bias=False)
    planted = random_mask((N, K), 20)
    S = planted.to_dense(torch.full((20,), 2.0))
    W = linear.weight.detach() + S + torch.randn(N, 1) @ torch.randn(1, K) / 4

    def train(nnz: int, warm_up: int) -> tuple[float, RoSALinear]:
        torch.manual_seed(1)
        model = nn.Sequential(RoSALinear(copy.deepcopy(linear), r=1, lora_alpha=1, nnz=nnz))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0)
        schedule = RoSAScheduler(model, warm_up, collect_steps=min(10, warm_up))
        for _ in range(400):
            x = torch.randn(64, K)
            loss = (model(x) - x @ W.T).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.item(), model[0]

    rosa, layer = train(20, 60)
    lora, _ = train(20, 1000)  # never draws its mask
    found = set(layer.mask.flat().tolist()) & set(planted.flat().tolist())
    assert len(found) >= 18
    assert rosa < 0.1 * lora


def test_scheduler_state_and_report():
    def make() -> tuple[nn.Module, RoSAScheduler]:
        torch.manual_seed(5)
        model = nn.Sequential(
            RoSALinear(nn.Linear(12, 8), nnz=9), RoSALinear(nn.Linear(8, 6), nnz=4)
        )
        return model, RoSAScheduler(model, 4, collect_steps=3, importance="absolute")

    def step(model, schedule, seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randn(5, 12)).square().sum().backward()
        schedule.step()

    model, schedule = make()
    for seed in range(3):
        step(model, schedule, seed)
    other, resumed = make()
    buffer = io.BytesIO()
    torch.save((model.state_dict(), schedule.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for pair in ((model, schedule), (other, resumed)):
        step(*pair, 3)
    for a, b in zip(model, other, strict=True):
        assert torch.equal(a.mask.flat(), b.mask.flat())
    report = density_report(model)
    assert report["0"].nnz == 9 and report["0"].density == 9 / 96 and report["1"].drawn
    assert all(layer.collected is None for layer in model)


def test_scheduler_refuses():
    model = nn.Sequential(RoSALinear(nn.Linear(12, 8), nnz=9))
    for options, says in [
        ({"warmup_steps": 0}, "warmup_steps: expected an integer of at least 1, got 0"),
        (
            {"warmup_steps": 3, "collect_steps": 4},
            "collect_steps: expected an integer of at least 1 and at most 3, got 4",
        ),
        ({"warmup_steps": 3, "candidates": 0}, "candidates"),
        ({"warmup_steps": 3, "importance": "cubed"}, "importance"),
    ]:
        with pytest.raises(ValueError, match=says):
            RoSAScheduler(model, **options)
    with pytest.raises(ValueError, match="model: expected at least one RoSALinear"):
        RoSAScheduler(nn.Linear(2, 2), 1)
    schedule = RoSAScheduler(model, 1)
    with pytest.raises(ValueError, match="0: mask: 9 places are wanted, gradients of 0"):
        schedule.step()
    assert not model[0].drawn


def test_collecting_under_autocast_is_not_rounded():
    dy, x = torch.randn(7, 24), torch.randn(7, 32)
    tops = [TopGradients((24, 32), 50, 1) for _ in range(2)]
    tops[0].add(dy, x)
    with torch.autocast("cpu", BF16):
        tops[1].add(dy, x)
    assert torch.equal(tops[0].score, tops[1].score) and torch.equal(tops[0].index, tops[1].index)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_count_as_nothing(wrong):
    """Where too few others are left, the pass is lost."""
    dy, x = torch.randn(3, 4), torch.randn(3, 6)
    dy[2, 1] = wrong
    for entries, kept in ((5, 5), (20, 18)):
        top = TopGradients((4, 6), entries, 1)
        top.add(dy, x)
        assert (top.index // 6 != 1).all() and len(top.index) == kept
        assert top.score.isfinite().all()
        assert [top.take_lost() for _ in range(2)] == 2 * [kept < entries]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_pass_that_is_not_finite_leaves_what_was_there(wrong):
    top = TopGradients((4, 6), 24, 2)
    dy, x = torch.randn(3, 4), torch.randn(3, 6)
    top.add(dy, x)
    before = top.score.clone()
    dy[0, 2] = wrong
    top.add(dy, x)
    rows = before.view(4, 6).clone()
    rows[[0, 1, 3]] *= 2
    torch.testing.assert_close(top.score.view(4, 6), rows)
    assert not top.take_lost()
    top.add(torch.full_like(dy, wrong), x)
    assert top.take_lost() and not top.take_lost()
    torch.testing.assert_close(top.score.view(4, 6), rows)


@pytest.mark.parametrize("lost", ["last", "first"])
def test_warm_up_lasts_longer_by_the_steps_that_were_lost(lost):
    """As GradScaler skips them: no error in mid-training, and no mask of nothing."""
    torch.manual_seed(4)
    model = nn.Sequential(RoSALinear(nn.Linear(12, 8), nnz=9), RoSALinear(nn.Linear(8, 6), nnz=4))
    schedule = RoSAScheduler(model, 3, collect_steps=2)
    bad = 3 if lost == "last" else 2
    for step in range(1, 5):
        assert schedule.last_step < 3 or not model[0].drawn
        y = model(torch.randn(5, 12)).square().sum()
        (y * float("nan") if step == bad else y).backward()
        schedule.step()
        if step == bad:
            state = copy.deepcopy(schedule.state_dict())
            schedule = RoSAScheduler(model, 3, collect_steps=2)
            schedule.load_state_dict(state)
    assert schedule.lost_steps == 1
    for layer in model:
        assert layer.drawn and layer.collected is None
    # A step without any pass, after a lost one, is no error either.
    model = nn.Sequential(RoSALinear(nn.Linear(12, 8), nnz=9))
    schedule = RoSAScheduler(model, 1)
    (model(torch.randn(5, 12)).sum() * float("inf")).backward()
    schedule.step(), schedule.step()
    assert not model[0].drawn and schedule.lost_steps == 2
    model(torch.randn(5, 12)).sum().backward()
    schedule.step(), schedule.step()
    assert model[0].drawn


@pytest.mark.parametrize(("importance", "power"), [("squared", 2), ("absolute", 1)])
@pytest.mark.parametrize("candidates", [1, 3])
def test_scheduler_collects_what_it_was_asked_to(importance, power, candidates):
    model = nn.Sequential(RoSALinear(nn.Linear(12, 8), nnz=9))
    RoSAScheduler(model, 1, candidates=candidates, importance=importance)
    x = torch.randn(5, 12)
    y = model(x)
    y.square().sum().backward()
    top = model[0].collected
    dense = (2 * y.detach().T @ x).abs().view(-1) ** power
    wanted = dense.topk(9 * candidates).values.sort().values
    torch.testing.assert_close(top.score.sort().values, wanted)


def test_passes_that_add_up_to_one_step_keep_their_candidates():
    """With gradient accumulation one step has many passes, which nnz entries alone would lose."""
    (N, K), T, nnz, passes, S = *PLANTED, planted()
    linear = nn.Linear(K, N, bias=False)
    model = nn.Sequential(RoSALinear(linear, r=2, nnz=nnz))
    schedule, dense = RoSAScheduler(model, 1), torch.zeros(N, K)
    for _ in range(passes):
        x = torch.randn(T, K)
        y = model(x)
        dy = y.detach() - x @ (linear.weight + S).T + 2 * torch.randn(T, N)
        y.backward(dy / T)
        dense += ((dy / T).T @ x).square()
    schedule.step()
    wanted = set(dense.view(-1).topk(nnz).indices.tolist())
    assert len(wanted & set(model[0].mask.flat().tolist())) / nnz >= ROSA_OVERLAP
