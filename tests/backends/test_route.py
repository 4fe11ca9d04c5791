"""The sort of pairs of token and expert, bit for bit as torch's operations sort them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.backends import ops, reference
from peftkern.backends.dispatch import use_backend
from peftkern.formats.nf4 import ArgumentError


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 40),
    top=st.integers(0, 9),
    experts=st.sampled_from([1, 2, 7, 64]),
    ids=st.sampled_from([torch.int32, torch.int64]),
    weights=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_as_torch_sorts(tokens, top, experts, ids, weights, seed):
    """Ids of other ranks come last; transposed ids and weights, too."""
    torch.manual_seed(seed)
    index = torch.randint(experts + 2, (top, tokens), dtype=ids).t()
    if weights is not None:
        weights = torch.randn(top, tokens).to(weights).t()
    args = (index, weights, experts)
    for got, right in zip(ops.run("route", *args), reference.route(*args), strict=True):
        assert got.dtype is right.dtype and torch.equal(got, right)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_smallest_negative_id_is_told(backend):
    index = torch.tensor([[3, -1], [-7, 0]], dtype=torch.int32)
    with use_backend(backend), pytest.raises(ArgumentError, match="from 0 on, got -7"):
        ops.run("route", index, None, 4)
