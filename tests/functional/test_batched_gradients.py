"""Gradients of a batch of results' gradients, as vmap forms them: those of one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import peftkern
from peftkern.functional.adalora import orthogonality_loss
from peftkern.functional.dora import dora_linear
from peftkern.functional.lora_experts import ExpertLinear, lora_experts, swiglu
from peftkern.functional.rosa import SparseMask, rosa_linear

T, K, N, R, E = 5, 16, 12, 3, 4
Inputs = dict[str, Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def linear() -> Inputs:
    return {"x": leaf(T, K), "lora_A": leaf(R, K), "lora_B": leaf(N, R), "bias": leaf(N)}


def lora() -> tuple[Callable[..., Tensor], Inputs]:
    W = torch.randn(N, K)
    return lambda **t: peftkern.lora_linear(
        t.pop("x"), W, scaling=2.0, dropout_p=0.3, **t
    ), linear()


def lora_of_frozen_factor() -> tuple[Callable[..., Tensor], Inputs]:
    """Of which x is not saved, so that create_graph is refused."""
    W, inputs = torch.randn(N, K), linear()
    A = inputs.pop("lora_A").detach()
    return lambda **t: peftkern.lora_linear(t.pop("x"), W, A, scaling=2.0, **t), inputs


def nf4_lora() -> tuple[Callable[..., Tensor], Inputs]:
    w = peftkern.quantize_nf4(torch.randn(N, K))
    return lambda **t: peftkern.nf4_lora_linear(t.pop("x"), w, scaling=2.0, **t), linear()


def nf4() -> tuple[Callable[..., Tensor], Inputs]:
    w = peftkern.quantize_nf4(torch.randn(N, K))
    return lambda x: peftkern.nf4_linear(x, w), {"x": leaf(T, K)}


def dora() -> tuple[Callable[..., Tensor], Inputs]:
    W = torch.randn(N, K)
    return (
        lambda **t: dora_linear(t.pop("x"), W, scaling=2.0, **t),
        linear() | {"magnitude": leaf(N)},
    )


def rosa() -> tuple[Callable[..., Tensor], Inputs]:
    W = torch.randn(N, K)
    mask = SparseMask.from_indices(torch.tensor([0, 1, 5]), torch.tensor([3, 7, 0]), (N, K))
    values = leaf(3)
    return (
        lambda **t: rosa_linear(t.pop("x"), W, mask=mask, scaling=2.0, **t),
        linear() | {"values": values},
    )


def experts() -> tuple[Callable[..., Tensor], Inputs]:
    index = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    up, down = torch.randn(E, 2 * N, K), torch.randn(E, K, N)
    inputs = {"x": leaf(T, K), "weights": leaf(T, 2)}
    inputs |= {"A1": leaf(E, R, K), "B1": leaf(E, 2 * N, R), "A2": leaf(E, R, N)}

    def call(x: Tensor, weights: Tensor, A1: Tensor, B1: Tensor, A2: Tensor) -> Tensor:
        linears = ExpertLinear(up, A1, B1, 2.0), ExpertLinear(down, A2, torch.ones(E, K, R))
        return lora_experts(x, index, weights, *linears, gate=swiglu)

    return call, inputs


def orthogonality() -> tuple[Callable[..., Tensor], Inputs]:
    def call(A: Tensor, B: Tensor) -> Tensor:
        return orthogonality_loss([A], [B]).view(1)

    return call, {"A": leaf(R, K), "B": leaf(N, R)}


CASES = [lora, lora_of_frozen_factor, nf4_lora, nf4, dora, rosa, experts, orthogonality]


@pytest.mark.parametrize("case", CASES)
def test_a_batch_has_the_gradients_of_each(case: Callable[[], tuple]) -> None:
    call, inputs = case()
    y, leaves = call(**inputs), list(inputs.values())
    dy = torch.randn(3, *y.shape)
    got = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in dy]
    for gradient, expected in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch_has_their_shapes(case: Callable[[], tuple]) -> None:
    call, inputs = case()
    y, leaves = call(**inputs), list(inputs.values())
    dy = torch.randn(0, *y.shape)
    got = torch.func.vmap(lambda one: torch.autograd.grad(y, leaves, one, retain_graph=True))(dy)
    for gradient, leaf in zip(got, leaves, strict=True):
        assert gradient.shape == (0, *leaf.shape) and gradient.dtype is leaf.dtype


def test_a_batch_of_batches_has_them_too() -> None:
    call, inputs = lora()
    y, x = call(**inputs), inputs["x"]
    dy = torch.randn(2, 3, *y.shape)

    def gradient(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    got = torch.func.vmap(torch.func.vmap(gradient), in_dims=1, out_dims=1)(dy)
    expected = torch.stack([torch.stack([gradient(one) for one in some]) for some in dy])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("vectorize", [False, True])
def test_vectorized_hessian(vectorize: bool) -> None:
    """Under create_graph torch's operations compute what is batched."""
    x, W, A, B = torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)

    def loss(x: Tensor) -> Tensor:
        return peftkern.lora_linear(x, W, A, B, scaling=2.0).square().sum()

    got = torch.autograd.functional.hessian(loss, x, vectorize=vectorize)
    M = W + 2 * B @ A
    expected = torch.einsum("ts,kl->tksl", torch.eye(2), 2 * M.T @ M)
    torch.testing.assert_close(got, expected)
