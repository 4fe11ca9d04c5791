"""What LoRA-FA and LoRA-Pro share as optimizers: the steps of a plain transcription, states that
resume, groups, loss scaling, 16 bits, layers that keep to themselves."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from method_models import (
    ALPHA,
    RANK,
    HostCopies,
    K,
    N,
    PlainAdamW,
    backward,
    batches,
    fill_,
    our_net,
    peft_net,
    plain_lora_fa,
    plain_lora_pro,
    relative_difference,
    train,
    twins,
)
from tolerances import METHODS_RTOL, METHODS_STEPS_RTOL
from torch import Tensor, nn

from peftkern.layers import LoRALinear
from peftkern.methods import (
    LoRAFAOptimizer,
    LoRAProAdamW,
    lora_fa_gradients,
    lora_pro_gradients,
    pairs,
)
from peftkern.methods.pairs import AdapterPair, find_pairs, scalings

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SCALING = ALPHA / RANK
RTOL = METHODS_RTOL[F64]
OPTIMIZERS = {
    "LoRA-FA": (LoRAFAOptimizer, {}),
    "LoRA-Pro": (LoRAProAdamW, {}),
    "full moments": (LoRAProAdamW, {"full_moments": True}),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request) -> partial:
    """One of them, with a learning rate under which a few steps show."""
    cls, options = OPTIMIZERS[request.param]
    return partial(cls, lr=1e-2, **options)


def corrected(
    cls: type, pair: AdapterPair | nn.Module, scaling: float = SCALING
) -> list[tuple[Tensor, Tensor]]:
    """The factors that one of them trains, with the gradients that it gives them."""
    A, B = pair.lora_A, pair.lora_B
    if cls is LoRAFAOptimizer:
        return [(B, plain_lora_fa(A.detach(), B.grad, scaling))]
    gradients = plain_lora_pro(A.detach(), B.detach(), A.grad, B.grad, scaling)
    return list(zip((A, B), gradients, strict=True))


@pytest.mark.parametrize("kind", ["ours", "nf4", "peft"])
@pytest.mark.parametrize(
    ("cls", "decay"), [(LoRAFAOptimizer, 0.0), (LoRAFAOptimizer, 0.1), (LoRAProAdamW, 0.1)]
)
def test_steps_equal_a_plain_transcription(cls, decay, kind):
    model = peft_net() if kind == "peft" else our_net(nf4=kind == "nf4")
    if cls is LoRAProAdamW:
        fill_(model)  # of a zero lora_B the transcription has no inverse
    ours, plain = twins(model)
    optimizer = cls(ours, lr=1e-2, weight_decay=decay)
    by_hand: dict[Tensor, PlainAdamW] = {}
    for batch in batches(12):
        train(ours, optimizer, [batch])
        plain.zero_grad()
        backward(plain, batch)
        for pair in find_pairs(plain):
            for p, gradient in corrected(cls, pair):
                by_hand.setdefault(p, PlainAdamW(p, weight_decay=decay)).step(gradient)
    rtol = RTOL if cls is LoRAFAOptimizer else METHODS_STEPS_RTOL
    assert relative_difference(ours.parameters(), plain.parameters()) < rtol
    if cls is LoRAFAOptimizer:
        for a, b in zip(find_pairs(ours), find_pairs(plain), strict=True):
            assert torch.equal(a.lora_A, b.lora_A)


@pytest.mark.parametrize("cls", [LoRAFAOptimizer, LoRAProAdamW])
def test_factors_and_scaling_are_read_at_every_step(cls):
    model = our_net()
    fill_(model)
    optimizer = cls(model, lr=1e-2, betas=(0.0, 0.0))
    first, second = batches(2)
    train(model, optimizer, [first])
    with torch.no_grad():
        model.up.lora_A.mul_(3.0)
    model.up.scaling, model.down.scaling = torch.tensor(2.5, dtype=F64), 0.25
    backward(model, second)
    expected = [
        pair
        for layer, scaling in ((model.up, 2.5), (model.down, 0.25))
        for pair in corrected(cls, layer, scaling)
    ]
    optimizer.step()
    got = [optimizer.state[p]["exp_avg"] for p, _ in expected]
    rtol = RTOL if cls is LoRAFAOptimizer else METHODS_STEPS_RTOL
    assert relative_difference(got, [gradient for _, gradient in expected]) < rtol


def test_resume_from_a_state_dict_and_copies(make):
    data = batches(8)
    straight, resumed = twins(our_net())
    train(straight, make(straight), data)
    half = make(resumed)
    train(resumed, half, data[:4])
    states = pickle.loads(pickle.dumps((resumed.state_dict(), half.state_dict())))
    again = our_net()
    again.load_state_dict(states[0])
    third = make(again, lr=0.5)  # the state brings its own
    third.load_state_dict(states[1])
    copied = copy.deepcopy((again, third))
    for model, optimizer in ((again, third), copied, (resumed, half)):
        train(model, optimizer, data[4:])
        for p, q in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(p, q)


def test_grad_scaler_unscales_and_skips(make):
    model, plain = twins(our_net(F32))
    optimizer, reference = make(model), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for i, (x, target) in enumerate(batches(4, F32)):
        inputs = torch.full_like(x, math.inf) if i == 1 else x
        scaler.scale((model(inputs) - target).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if i != 1:
            train(plain, reference, [(x, target)])
    assert scaler.get_scale() == 2.0**9
    assert relative_difference(model.parameters(), plain.parameters()) < METHODS_RTOL[F32]
    if make.func is LoRAProAdamW:  # a power of two takes nothing away
        assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_bfloat16_factors(make):
    model = our_net(BF16)
    optimizer = make(model)
    losses = train(model, optimizer, batches(1, BF16) * 20)
    assert losses[-1] < (1.0 if make.func is LoRAFAOptimizer else 0.95) * losses[0]
    assert all(p.dtype is BF16 and p.isfinite().all() for p in model.parameters())
    assert optimizer.state[model.up.lora_B]["exp_avg"].dtype is BF16


def test_steps_are_counted_in_float32_whatever_the_default(make):
    """bfloat16 counts to 256."""
    model = our_net(F32)
    torch.set_default_dtype(BF16)
    try:
        optimizer = make(model)
        backward(model, batches(1, F32)[0])
        optimizer.step()
    finally:
        torch.set_default_dtype(F32)
    assert optimizer.state[model.up.lora_B]["step"].dtype is F32


def test_closure_groups_and_other_parameters(make):
    (batch,) = batches(1)
    model, plain = twins(our_net())
    for net in (model, plain):
        net.down.bias.requires_grad_(True)
    fill_(model)
    plain.load_state_dict(model.state_dict())
    names = ("lora_B",) if make.func is LoRAFAOptimizer else ("lora_A", "lora_B")
    up, down = ([layer.get_parameter(n) for n in names] for layer in (model.up, model.down))
    own = {"lr": 0.16, "weight_decay": 0.5}
    optimizer = make(model, [{"params": [*down, model.down.bias]}, {"params": up, **own}])
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, batch)

    assert optimizer.step(closure).item() == backward(plain, batch).item()
    gradient = model.up.lora_B.grad.clone()
    assert relative_difference([gradient], [plain.up.lora_B.grad]) < RTOL  # .grad is left alone
    PlainAdamW(plain.down.bias).step(plain.down.bias.grad)
    assert relative_difference([model.down.bias], [plain.down.bias]) < RTOL
    if not make.keywords.get("full_moments"):
        step = (model.up.lora_B - (1 - 0.16 * 0.5) * before["up.lora_B"]).abs().max().item()
        assert step == pytest.approx(0.16, rel=1e-6)


def test_a_layer_without_a_gradient_stays(make):
    model = our_net()
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    backward(model, batches(1)[0])
    model.up.lora_A.grad = model.up.lora_B.grad = None
    optimizer.step()
    assert torch.equal(model.up.lora_B, before["up.lora_B"])
    assert not torch.equal(model.down.lora_B, before["down.lora_B"])


@pytest.mark.parametrize(
    ("cls", "options"), [*OPTIMIZERS.values(), (LoRAFAOptimizer, {"peft_parity": True})]
)
def test_a_scaling_of_zero_is_named(cls, options):
    model = our_net()
    optimizer = cls(model, **options)
    model.down.scaling = 0.0
    backward(model, batches(1)[0])
    with pytest.raises(ValueError, match="scaling of layer down: expected a number other than 0"):
        optimizer.step()


def test_a_shared_factor_is_refused():
    """LoRA-FA trains lora_B alone: a lora_A may be shared."""
    shared = nn.ModuleList(LoRALinear(8, 8, r=2) for _ in range(2))
    shared[1].lora_A = shared[0].lora_A
    with pytest.raises(ValueError, match="0 and 1 share a factor"):
        LoRAProAdamW(shared)
    LoRAFAOptimizer(shared)
    shared[1].lora_B = shared[0].lora_B
    with pytest.raises(ValueError, match="0 and 1 share a factor"):
        LoRAFAOptimizer(shared)


def drawn(layers: int) -> tuple[list[Tensor], ...]:
    """A, B and gradients of both, of equal shapes: the layers share every product."""
    shapes = (RANK, K), (N, RANK), (RANK, K), (N, RANK)
    return tuple([torch.randn(*shape, dtype=F64) for _ in range(layers)] for shape in shapes)


def both_gradients(A, B, gA, gB, scaling) -> tuple[list[Tensor], ...]:
    return lora_fa_gradients(gB, A, scaling), *lora_pro_gradients(A, B, gA, gB, scaling)


def test_what_is_not_finite_stays_in_its_layer():
    A, B, gA, gB = drawn(4)
    expected = both_gradients(A, B, gA, gB, [SCALING] * 4)
    gA[1], gB[1] = torch.full_like(gA[1], math.nan), torch.full_like(gB[1], math.nan)
    A[2] = A[2].clone()
    A[2][0, 0] = math.inf
    for got, wanted in zip(both_gradients(A, B, gA, gB, [SCALING] * 4), expected, strict=True):
        assert all(torch.equal(got[i], wanted[i]) for i in (0, 3))
        assert not any(torch.isfinite(got[i]).all() for i in (1, 2))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_of_a_group_are_all_there(monkeypatch, count):
    """Some layers at a time, as of large models, give what all at once give."""
    A, B, gA, gB = drawn(5)
    scaling = [1.0, 2.0, 3.0, 4.0, 5.0]
    wanted = both_gradients(A, B, gA, gB, scaling)
    monkeypatch.setattr(pairs, "_CHUNK", count * 2 * (RANK * K + N * RANK))
    assert max(len(part) for part in pairs.chunks(A, B, gA, gB)) == count
    for mine, theirs in zip(both_gradients(A, B, gA, gB, scaling), wanted, strict=True):
        assert relative_difference(mine, theirs) < RTOL


def test_nothing_is_copied_from_the_host():
    """Which would make it wait for a GPU at each step."""
    with HostCopies() as copies:
        like, tensor = torch.empty(1, device="cuda"), torch.ones((), device="cuda")
        scalings([1.5, 1.5, 2.0], like)
        scalings([1.5, tensor], like)
    assert copies.count == 0
    with HostCopies() as copies:
        torch.tensor([1.5, 2.0], device="cuda")
    assert copies.count == 1
    got = scalings([1.5, 1.5, 2.0], torch.empty(1))
    assert got.view(-1).tolist() == [1.5, 1.5, 2.0] and got.shape == (3, 1, 1)
    assert scalings([1.5, torch.tensor(2.0)], torch.empty(1)).view(-1).tolist() == [1.5, 2.0]
