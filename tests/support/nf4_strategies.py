"""Valid NF4 weights of any shape and content, drawn by hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from nf4_weights import DTYPES

from peftkern.formats.nf4 import BLOCKSIZES, NF4Weight, dynamic_map

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def weights(draw: st.DrawFn) -> NF4Weight:
    """A valid weight of any content: bytes, absmax and tables are drawn, not quantized."""
    shape, blocksize = draw(shapes), draw(st.sampled_from(BLOCKSIZES))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    numel = math.prod(shape)
    nblocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
    common = {"shape": shape, "blocksize": blocksize, "dtype": draw(st.sampled_from(DTYPES))}
    if not draw(st.booleans()):
        return NF4Weight(packed, torch.randn(nblocks), **common)
    return NF4Weight(
        packed,
        torch.randint(0, 256, (nblocks,), dtype=torch.uint8),
        **common,
        nested_absmax=torch.rand(-(-nblocks // 256)),
        nested_code=torch.tensor(dynamic_map()),
        nested_offset=torch.randn(()),
        nested_blocksize=256,
    )
