"""Parameters whose `data` is replaced between a forward and its backward pass, as in torch.

Torch's own layers save views of their parameters, and so read the values of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftkern
from peftkern.functional.dora import dora_linear
from peftkern.functional.grouped_linear import grouped_lora_linear
from peftkern.functional.rosa import SparseMask, rosa_linear

T, K, N, R, E = 6, 64, 12, 3, 2
Case = tuple[Callable[[Tensor], Tensor], list[Tensor]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def lora() -> Case:
    W, A, B = torch.randn(N, K), leaf(R, K), leaf(N, R)
    return lambda x: peftkern.lora_linear(x, W, A, B, scaling=2.0, dropout_p=0.3), [W, A, B]


def nf4_lora() -> Case:
    w, A, B = peftkern.quantize_nf4(torch.randn(N, K)), leaf(R, K), leaf(N, R)
    return lambda x: peftkern.nf4_lora_linear(x, w, A, B, scaling=2.0), [A, B]


def dora() -> Case:
    W, A, B, m = torch.randn(N, K), leaf(R, K), leaf(N, R), leaf(N)
    return lambda x: dora_linear(x, W, A, B, m, scaling=2.0), [W, A, B, m]


def rosa() -> Case:
    W, A, B, values = torch.randn(N, K), leaf(R, K), leaf(N, R), leaf(3)
    mask = SparseMask.from_indices(torch.tensor([0, 1, 5]), torch.tensor([3, 7, 0]), (N, K))
    options = {"mask": mask, "values": values, "scaling": 2.0}
    return lambda x: rosa_linear(x, W, A, B, **options), [W, A, B, values]


def grouped() -> Case:
    W, A, B = torch.randn(E, N, K), leaf(E, R, K), leaf(E, N, R)
    offsets = torch.tensor([2, T], dtype=torch.int32)
    return lambda x: grouped_lora_linear(x, W, offsets, A, B, scaling=2.0), [W, A, B]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", [lora, nf4_lora, dora, rosa, grouped])
def test_backward_reads_what_forward_read(case: Callable[[], Case], autocast: bool) -> None:
    call, parameters = case()
    x, dy = leaf(T, K), torch.randn(T, N)
    wanted = [x, *(p for p in parameters if p.requires_grad)]
    grads = []
    for replace in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = call(x)
        if replace:
            for parameter in parameters:
                parameter.data = parameter.data * 2
        grads.append(torch.autograd.grad(y, wanted, dy.to(y.dtype)))
    assert all(map(torch.equal, *grads))


def test_backward_reads_a_replaced_input_anew() -> None:
    """As torch does, whose product saves its input itself."""
    W, A, B, x = torch.randn(N, K), leaf(R, K), leaf(N, R), leaf(T, K)
    dy = torch.randn(T, N)
    y = peftkern.lora_linear(x, W, A, B, scaling=2.0)
    twin = F.linear(x, W) + 2.0 * F.linear(F.linear(x, A), B)
    x.data = torch.randn(T, K)
    torch.testing.assert_close(
        torch.autograd.grad(y, (A, B), dy), torch.autograd.grad(twin, (A, B), dy)
    )
