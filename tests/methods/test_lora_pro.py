"""LoRA-Pro: the closed form against its definition, the optimizer, and a planted regression."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from method_models import (
    ALPHA,
    RANK,
    Count,
    K,
    N,
    backward,
    batches,
    fill_,
    our_net,
    peft_net,
    plain_lora_pro,
    relative_difference,
    train,
    twins,
)
from paths import STUDIES
from tolerances import METHODS_RTOL, METHODS_STEPS_RTOL, errors
from torch import Tensor

from peftkern.methods import LoRAProAdamW, lora_pro_gradients, lora_pro_hook
from peftkern.methods.pairs import find_pairs

F64 = torch.float64
SCALING = ALPHA / RANK
RTOL, STEPS_RTOL = METHODS_RTOL[F64], METHODS_STEPS_RTOL


def case(seed: int = 0, s: float = SCALING, n: int = N, k: int = K, r: int = RANK):
    generator = torch.Generator().manual_seed(seed)
    A, B, g = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((r, k), (n, r), (n, k))
    )
    return A, B, g, s * B.T @ g, s * g @ A.T


def projection(basis: Tensor) -> Tensor:
    """On the columns of a matrix."""
    return basis @ torch.linalg.pinv(basis)


def equivalent(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float) -> Tensor:
    return s * (gB @ A + B @ gA)


def nearest(A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    """g - (I - P_B) g (I - P_A)"""
    n, k = g.shape
    left, right = torch.eye(n) - projection(B), torch.eye(k) - projection(A.T)
    return g - left @ g @ right


@pytest.mark.parametrize("s", [SCALING, 0.1, -2.0])
def test_equivalent_gradient_is_the_projection(s):
    A, B, g, gA, gB = case(s=s)
    (got_A,), (got_B,) = lora_pro_gradients([A], [B], [gA], [gB], [s])
    assert relative_difference([equivalent(A, B, got_A, got_B, s)], [nearest(A, B, g)]) < RTOL
    assert relative_difference((got_A, got_B), plain_lora_pro(A, B, gA, gB, s)) < RTOL


def test_the_chosen_X_is_nearest_to_the_factors_own_gradients():
    A, B, _, gA, gB = case()
    (got_A,), (got_B,) = lora_pro_gradients([A], [B], [gA], [gB], [SCALING])

    def distance(X: Tensor) -> Tensor:
        return (got_A + X @ A - gA).square().sum() + (got_B - B @ X - gB).square().sum()

    gradient = torch.func.grad(distance)(torch.zeros(RANK, RANK, dtype=F64))
    assert gradient.abs().max() < RTOL * (gA @ A.T).abs().max()


def test_zero_and_dependent_factors():
    A, B, g, *_ = case()
    zero, dependent = torch.zeros_like(B), B.clone()
    dependent[:, 1] = dependent[:, 0] - dependent[:, 2]
    for b in (zero, dependent):
        gA, gB = SCALING * b.T @ g, SCALING * g @ A.T
        (got_A,), (got_B,) = lora_pro_gradients([A], [b], [gA], [gB], [SCALING])
        moved = equivalent(A, b, got_A, got_B, SCALING)
        assert torch.allclose(moved, nearest(A, b, g), rtol=0, atol=RTOL * g.abs().max())
        if b is zero:
            assert torch.equal(got_A, torch.zeros_like(A))
            expected = gB @ torch.linalg.inv(A @ A.T) / SCALING**2
            assert relative_difference([got_B], [expected]) < RTOL


def test_hundreds_of_layers_take_one_eigenvalue_call():
    layers = 300
    cases = [
        case(i, s=0.5 + i % 7, n=(20, 12, 48)[i % 3], k=(16, 40)[i % 2]) for i in range(layers)
    ]
    scaling = [0.5 + i % 7 for i in range(layers)]
    A, B, _, gA, gB = zip(*cases, strict=True)
    with Count() as count:
        got_A, got_B = lora_pro_gradients(A, B, gA, gB, scaling)
    assert count.calls["_linalg_eigh"] == 1
    assert not {"linalg_eig", "_linalg_svd", "linalg_pinv", "linalg_inv_ex"} & set(count.calls)
    assert count.calls["bmm"] <= 6 * 10 + 16  # shapes times products, and the r x r ones
    for i in range(0, layers, 37):
        expected = plain_lora_pro(*cases[i][:2], *cases[i][3:], scaling[i])
        # Factors of a condition number of some hundred lose as many digits in either formula.
        condition = torch.linalg.cond(A[i]) ** 2 * torch.linalg.cond(B[i]) ** 2
        assert relative_difference((got_A[i], got_B[i]), expected) < RTOL * condition


def test_many_ranks_and_dtypes():
    cases = [case(i, r=r) for i, r in enumerate((1, 3, RANK, 8))]
    for dtype in (torch.float32, torch.bfloat16):
        rounded = [[t.to(dtype) for t in c] for c in cases]
        A, B, _, gA, gB = zip(*rounded, strict=True)
        got = lora_pro_gradients(A, B, gA, gB, [SCALING] * len(cases))
        oracle = lora_pro_gradients(
            *([t.double() for t in column] for column in (A, B, gA, gB)), [SCALING] * len(cases)
        )
        for ours, exact in zip((*got[0], *got[1]), (*oracle[0], *oracle[1]), strict=True):
            assert ours.dtype is dtype
            assert errors(ours, exact)[1] < torch.finfo(dtype).eps


def test_full_moments_equal_a_plain_transcription():
    model = our_net()
    fill_(model)
    ours, plain = twins(model)
    optimizer = LoRAProAdamW(ours, lr=1e-2, weight_decay=0.1, full_moments=True)
    pairs = find_pairs(plain)
    moments = [[0.0, 0.0] for _ in pairs]
    for t, batch in enumerate(batches(10), start=1):
        train(ours, optimizer, [batch])
        plain.zero_grad()
        backward(plain, batch)
        for pair, state in zip(pairs, moments, strict=True):
            A, B = pair.lora_A.detach(), pair.lora_B.detach()
            gA, gB = plain_lora_pro(A, B, pair.lora_A.grad, pair.lora_B.grad, SCALING)
            g = SCALING * (gB @ A + B @ gA)
            state[0] = 0.9 * state[0] + 0.1 * g
            state[1] = 0.999 * state[1] + 0.001 * g * g
            d = state[0] / (1 - 0.9**t) / ((state[1] / (1 - 0.999**t)).sqrt() + 1e-8)
            dA, dB = plain_lora_pro(A, B, SCALING * B.T @ d, SCALING * d @ A.T, SCALING)
            A.mul_(1 - 1e-3).sub_(1e-2 * dA)
            B.mul_(1 - 1e-3).sub_(1e-2 * dB)
    assert relative_difference(ours.parameters(), plain.parameters()) < STEPS_RTOL
    elements = [optimizer.state[p.lora_B]["exp_avg"].shape for p in find_pairs(ours)]
    assert elements == [ours.up.weight.shape, ours.down.weight.shape]


@pytest.mark.parametrize("full_moments", [False, True])
@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_the_first_step_from_zero_leaves_lora_A(kind, full_moments):
    model = peft_net() if kind == "peft" else our_net()
    pairs = find_pairs(model)
    before = [pair.lora_A.detach().clone() for pair in pairs]
    optimizer = LoRAProAdamW(model, lr=1e-2, full_moments=full_moments)
    losses = train(model, optimizer, batches(1) * 30)
    assert losses[-1] < 0.95 * losses[0]
    if not full_moments:  # the state is that of AdamW
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trained)
    again = peft_net() if kind == "peft" else our_net()
    train(again, LoRAProAdamW(again, lr=1e-2, full_moments=full_moments), batches(1))
    for pair, A in zip(find_pairs(again), before, strict=True):
        assert torch.equal(pair.lora_A, A) and pair.lora_B.abs().max() > 0


def test_half_of_a_pair_and_lists_that_do_not_fit_are_errors():
    model = our_net()
    optimizer = LoRAProAdamW(model)
    backward(model, batches(1)[0])
    model.up.lora_A.grad = None
    with pytest.raises(ValueError, match=r"^up: lora_A has no gradient"):
        optimizer.step()
    model.up.lora_B.grad = None  # not used at all: nothing to do
    optimizer.step()
    A, B, _, gA, gB = case()
    for lists, says in (
        (([A], [B], [gB], [gA], [1.0]), r"grad_A, grad_B of layer 0: expected \[4, 24\]"),
        (([A], [B[:, :1]], [gA], [gB], [1.0]), "lora_A, lora_B of layer 0"),
        (([A], [B], [gA], [gB], [0]), "scaling of layer 0: expected a number other than 0"),
        (([A], [B], [gA], [], [1.0]), "expected one of each .* 0 of grad_B"),
    ):
        with pytest.raises(ValueError, match=says):
            lora_pro_gradients(*lists)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("planted_regression")


def curve_distance(curves, name: str, full: str) -> float:
    """The mean over all steps of how far the losses are apart, as a factor, in logarithms."""
    pairs = zip(curves[name].losses, curves[full].losses, strict=True)
    differences = [abs(math.log(a / b)) for a, b in pairs]
    return sum(differences) / len(differences)


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_descent_follows_full_fine_tuning(planted, seed):
    """At every step after the first; LoRA's own gradients lead elsewhere."""
    curves, update = planted.train("sgd", planted.LR["sgd"], 40, seed)
    apart = planted.distances(curves, update)
    assert all(a < b / 5 for a, b in zip(apart["LoRA-Pro"][5:], apart["LoRA"][5:], strict=True))
    ours, theirs = (curve_distance(curves, n, planted.FULL) for n in ("LoRA-Pro", "LoRA"))
    assert ours < theirs / 5
    assert curves["LoRA-Pro"].losses[-1] < 0.8 * curves["LoRA-Pro"].losses[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_full_moments_are_nearer_to_full_fine_tuning_than_lora(planted, seed):
    name = "LoRA-Pro, full moments"
    curves, update = planted.train("adamw", planted.LR["adamw"], 60, seed)
    apart = planted.distances(curves, update)
    # From zero lora_B alone can move: the first step of both is about as far off.
    assert all(a < b for a, b in zip(apart[name][2:], apart["LoRA"][2:], strict=True))
    ours, theirs = (curve_distance(curves, n, planted.FULL) for n in (name, "LoRA"))
    assert ours < theirs


def test_hook_serves_any_optimizer():
    model, plain = twins(our_net())
    for net in (model, plain):
        torch.manual_seed(5)
        fill_(net)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.register_step_pre_hook(lora_pro_hook(model))
    (batch,) = batches(1)
    backward(model, batch)
    optimizer.step()
    backward(plain, batch)
    for pair, moved in zip(find_pairs(plain), find_pairs(model), strict=True):
        A, B = pair.lora_A.detach(), pair.lora_B.detach()
        gA, gB = plain_lora_pro(A, B, pair.lora_A.grad, pair.lora_B.grad, SCALING)
        expected = (A - 0.1 * gA, B - 0.1 * gB)
        assert relative_difference((moved.lora_A, moved.lora_B), expected) < STEPS_RTOL


@pytest.mark.parametrize("full_moments", [False, True])
def test_moments_of_the_other_kind_are_refused(full_moments):
    model = our_net()
    optimizer = LoRAProAdamW(model, full_moments=full_moments)
    train(model, optimizer, batches(1))
    other = LoRAProAdamW(model, full_moments=not full_moments)
    says = f"expected full_moments={not full_moments} as .*, got {full_moments}"
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
