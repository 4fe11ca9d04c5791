"""The oracle's own steps: dropout, and weights larger than a chunk.

What its results are held to, tests/functional has: gradcheck in float64, which the reference
serves, and PEFT's golden data on every back end.
"""

from __future__ import annotations

import pytest
import torch
from nf4_weights import random_weight
from tolerances import NF4_MAX_HALF_GAP

from peftkern.backends import reference

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_torch_bit_for_bit(dtype):
    x = torch.randn(33, 65).to(dtype)
    for p in (0.1, 0.5, 1.0):
        torch.manual_seed(3)
        expected = torch.nn.functional.dropout(x.float(), p)
        torch.manual_seed(3)
        keep = torch.empty_like(x, dtype=torch.float32).bernoulli_(1 - p).bool()
        assert torch.equal(reference.dropped(x, keep, p, torch.float32), expected)


@pytest.mark.parametrize("shape", [(2, 1 << 20), (3, 699_983)], ids=str)
def test_chunks_join_without_a_seam(shape):
    """Weights larger than one chunk give what their blocks give one by one."""
    weight = random_weight(shape).view(-1)
    packed, absmax = reference.nf4_quantize(weight, 4096)
    last = weight.numel() // 4096 * 4096
    tail_packed, tail_absmax = reference.nf4_quantize(weight[last - 4096 :], 4096)
    assert torch.equal(packed[(last - 4096) // 2 :], tail_packed)
    assert torch.equal(absmax[-len(tail_absmax) :], tail_absmax)
    whole = reference.nf4_dequantize([packed, absmax], [0, 4096, 0, weight.numel()], F32)
    assert (whole - weight).abs().max() <= NF4_MAX_HALF_GAP * absmax.max()
    layout = [0, 4096, 0, weight.numel() - last + 4096]
    part = reference.nf4_dequantize([tail_packed, tail_absmax], layout, F32)
    assert torch.equal(whole[last - 4096 :], part)
