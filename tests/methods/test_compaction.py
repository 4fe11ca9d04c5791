"""Triplets that leave parameters, gradients and optimizer states: the others train on as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from peftkern.methods.compaction import (
    check_states,
    forget_misfits_,
    grow_triplets_,
    shrink_triplets_,
)

R, K, N = 5, 12, 9
KEEP = torch.tensor([True, False, True, False, True])


def triplets() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((R, 1), (R, K), (N, R))]


def take_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    """Gradients of the same step for whole and for compacted parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p, shape in zip(params, ((R, 1), (R, K), (N, R)), strict=True):
        grad = torch.randn(shape, generator=generator)
        if p.shape != shape:
            grad = grad[:, KEEP] if shape == (N, R) else grad[KEEP]
        p.grad = grad
    optimizer.step()


ELEMENTWISE = {
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adagrad": {},
    "NAdam": {},
    "Rprop": {},
    "ASGD": {},
    "Adamax": {},
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_stays_trains_on_bit_for_bit(name: str):
    params = triplets()
    optimizer = getattr(torch.optim, name)(params, lr=0.01, **ELEMENTWISE[name])
    for seed in range(3):
        take_step(optimizer, params, seed)
    twins, other = copy.deepcopy((params, optimizer))
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
    known = list(map(id, twins))
    check_states(other, [twins])
    shrink_triplets_(*twins, KEEP, other)
    assert [tuple(p.shape) for p in twins] == [(3, 1), (3, K), (N, 3)]
    assert [p.grad.shape for p in twins] == [p.shape for p in twins]
    for seed in range(3, 6):
        take_step(optimizer, params, seed)
        take_step(other, twins, seed)
    E, A, B = params
    for whole, small in zip((E[KEEP], A[KEEP], B[:, KEEP]), twins, strict=True):
        assert torch.equal(whole, small)
    assert list(map(id, other.param_groups[0]["params"])) == known


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Adafactor(params, lr=0.01),
        lambda params: Adafactor(params, lr=0.01, relative_step=False, scale_parameter=False),
    ],
    ids=["torch", "transformers"],
)
def test_factors_shrink_with_what_they_are_of(make):
    params = triplets()
    optimizer = make(params)
    take_step(optimizer, params, 0)
    before = {id(p): dict(state) for p, state in optimizer.state.items()}
    check_states(optimizer, [params])
    shrink_triplets_(*params, KEEP, optimizer)
    rows, columns = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))[
        "exp_avg_sq_row" in optimizer.state[params[1]]
    ]
    _, A, B = params
    held, was = optimizer.state[A], before[id(A)]
    assert torch.equal(held[rows], was[rows][KEEP]) and torch.equal(held[columns], was[columns])
    held, was = optimizer.state[B], before[id(B)]
    assert torch.equal(held[rows], was[rows])
    assert torch.equal(held[columns].flatten(), was[columns].flatten()[KEEP])
    take_step(optimizer, params, 1)


def test_a_graph_of_the_last_step_may_be_alive():
    """Its nodes know the old shapes, and the parameter would go on with them."""
    _, A, _ = params = triplets()
    loss = A.square().sum()
    loss.backward()
    shrink_triplets_(*params, KEEP)
    A.grad = None
    A.square().sum().backward()
    assert torch.equal(A.grad, 2 * A) and loss.grad_fn is not None


def test_states_that_cannot_shrink_are_named_before_anything_has():
    params = triplets()
    optimizer = torch.optim.AdamW(params)
    take_step(optimizer, params, 0)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"exp_avg is Tensor \[7\] for a parameter \[5, 12\], in"):
        check_states(optimizer, [params])
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps"):
        check_states(torch.optim.LBFGS(params), [params])
    check_states(None, [params])
    optimizer.state[params[1]]["exp_avg"] = torch.zeros_like(params[1])
    optimizer.state[params[1]]["beta_history"] = [0.9, {"warm": None}]
    check_states(optimizer, [params])
    optimizer.state[params[1]]["preconditioners"] = [torch.zeros(5, 5), torch.zeros(12, 12)]
    with pytest.raises(ValueError, match=r"optimizer: preconditioners is a list.* of AdamW"):
        check_states(optimizer, [params])


def test_triplets_grow_back_as_zeros():
    _, A, B = params = triplets()
    wanted = [p.detach().clone() for p in params]
    A.grad = torch.ones_like(A)
    shrink_triplets_(*params, KEEP)
    grow_triplets_(*params, KEEP)
    for parameter, whole, dim in zip(params, wanted, (0, 0, 1), strict=True):
        mask = KEEP.view([-1 if d == dim else 1 for d in range(whole.dim())])
        assert torch.equal(parameter, whole * mask)
    assert torch.equal(A.grad, KEEP[:, None].expand_as(A).float()) and B.grad is None


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda params: torch.optim.Adafactor(params, lr=0.01),
        lambda params: Adafactor(params, lr=0.01, relative_step=False, scale_parameter=False),
    ],
    ids=["AdamW", "Adafactor", "transformers"],
)
def test_states_of_another_number_of_triplets_are_forgotten(make, kept: int):
    """As after loading what was saved before a compaction: a fused step would leave the memory."""
    params = triplets()
    optimizer = make(params)
    take_step(optimizer, params, 0)
    held = dict(optimizer.state)
    assert forget_misfits_(optimizer, [params]) == 0 and dict(optimizer.state) == held
    whole = [p.detach().clone() for p in params]
    shrink_triplets_(*params, torch.arange(5) < kept, optimizer)
    assert forget_misfits_(optimizer, [params]) == 0
    for parameter, value in zip(params, whole, strict=True):
        parameter.grad = None
        parameter.data = value
    assert forget_misfits_(optimizer, [params]) == 3 and not optimizer.state
    take_step(optimizer, params, 1)
