"""Tensors of GPTQ, AWQ and HQQ, packed and decoded as those libraries do, against `BlockWeight`s.

The oracles are their own formulas: GPT-QModel 7.7 `BaseQuantLinear.dequantize_weight`, AutoAWQ
`WQLinear_GEMM.from_linear` and its unpacking, HQQ 0.2.8 `BitPack` and `Quantizer.dequantize`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftkern.backends.reference.nf4 import nf4_dequantize
from peftkern.formats import int4_layouts
from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.int4_layouts import Packing, from_awq, from_gptq, from_hqq, from_int8

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def value(w: BlockWeight, dtype: torch.dtype) -> Tensor:
    return nf4_dequantize(list(w.tensors), list(w.layout), dtype)


def drawn(N: int, K: int, group: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Codes [K, N], zero points and scales [K / group, N]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (K, N), dtype=torch.int32, generator=generator)
    zeros = torch.randint(16, (K // group, N), dtype=torch.int32, generator=generator)
    scales = torch.rand(K // group, N, generator=generator) * 0.02 + 1e-3
    return codes, zeros, scales.to(dtype)


def along_rows(codes: Tensor) -> Tensor:
    """Pack 8 rows to an int32, as GPTQ does with K."""
    words = codes.view(-1, 8, codes.shape[1]).long()
    shifts = 4 * torch.arange(8).view(1, 8, 1)
    return (words << shifts).sum(1).to(torch.uint32).view(torch.int32)


def along_columns(codes: Tensor, order: list[int]) -> Tensor:
    """Pack 8 columns to an int32: nibble i has column order[i]."""
    words = codes.view(codes.shape[0], -1, 8)[..., order].long()
    return (words << (4 * torch.arange(8))).sum(2).to(torch.uint32).view(torch.int32)


def by_groups(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """What both decode: scales[g_idx] * (weight - zeros[g_idx]), [K, N]."""
    g_idx = torch.arange(len(codes)) // group
    return scales[g_idx] * (codes - zeros[g_idx])


@settings(max_examples=25, deadline=None)
@given(
    N=st.sampled_from([8, 24, 40]),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128, 512]),
    dtype=st.sampled_from(DTYPES),
    less_one=st.booleans(),
)
def test_gptq(N: int, groups: int, group: int, dtype: torch.dtype, less_one: bool) -> None:
    K = groups * group
    codes, zeros, scales = drawn(N, K, group, dtype)
    stored = (zeros - 1) & 15 if less_one else zeros
    qzeros = along_columns(stored, list(range(8)))
    g_idx = torch.arange(K, dtype=torch.int32) // group
    given = (along_rows(codes), qzeros, scales, g_idx)
    w = from_gptq(*given, zeros_less_one=less_one)
    assert w.format == "int4" and w.shape == (N, K) and w.dtype is dtype
    assert torch.equal(value(w, dtype), by_groups(codes, zeros, scales, group).T)


@settings(max_examples=25, deadline=None)
@given(
    N=st.sampled_from([8, 24, 40]),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_awq(N: int, groups: int, group: int, dtype: torch.dtype) -> None:
    K = groups * group
    codes, zeros, scales = drawn(N, K, group, dtype)
    w = from_awq(along_columns(codes, AWQ_ORDER), along_columns(zeros, AWQ_ORDER), scales)
    assert w.shape == (N, K) and w.dtype is dtype
    assert torch.equal(value(w, dtype), by_groups(codes, zeros, scales, group).T)


def test_awq_is_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, zeros, scales = drawn(40, 64, 32, torch.float16)
    given = (along_columns(codes, AWQ_ORDER), along_columns(zeros, AWQ_ORDER), scales)
    whole = from_awq(*given)
    monkeypatch.setattr("peftkern.formats.int4_layouts._TOGETHER", 1)
    assert torch.equal(from_awq(*given).packed, whole.packed)


def hqq(N: int, K: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_q, scale and zero as HQQ has them, and the weight that it decodes."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (N * K // group, group), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(len(codes), 1, generator=generator) * 0.02 + 1e-3).to(dtype)
    zero = (torch.rand(len(codes), 1, generator=generator) * 15).to(dtype)
    half = len(codes) // 2
    W_q = (codes[:half] << 4) | codes[half:]  # BitPack.pack_4bit_u8
    unpacked = torch.cat([(W_q & 0b11110000) >> 4, W_q & 0b00001111]).to(dtype)
    return W_q, scale, zero, ((unpacked - zero) * scale).reshape(N, K)


@pytest.mark.parametrize("group", [32, 64, 192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hqq(group: int, dtype: torch.dtype) -> None:
    """Its difference is rounded to its own dtype, too: in 16 bits that is all there is between."""
    N, K = 6, 192
    W_q, scale, zero, decoded = hqq(N, K, group, dtype)
    w = from_hqq(W_q, scale, zero, shape=(N, K), group_size=group, dtype=dtype)
    ours = value(w, dtype)
    if dtype is torch.float32:
        assert torch.equal(ours, decoded)
        return
    half_ulp = torch.finfo(dtype).eps / 2
    bound = (15 * half_ulp * scale.float()).repeat_interleave(group, 1).view(N, K)
    bound = bound + half_ulp * decoded.float().abs() * 2
    assert ((ours.float() - decoded.float()).abs() <= bound).all()


def test_int4_in_eight_bits() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(6, 4)
    scale, zero = torch.rand(6, 2), torch.randint(-8, 8, (6, 2), dtype=torch.int8)
    w = from_int8(codes, scale, zero, dtype=torch.float32)
    difference = (codes - zero.repeat_interleave(32, 1)).float()
    assert torch.equal(value(w, torch.float32), difference * scale.repeat_interleave(32, 1))


GPTQ = (*(t for t in (torch.zeros(8, 8, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32))),)
REFUSED = [
    (lambda: from_gptq(*GPTQ, torch.ones(2, 8), zeros_less_one=True, bits=3), "bits: expected 4"),
    (
        lambda: from_gptq(*GPTQ, torch.ones(2, 8), torch.randperm(64) // 32, zeros_less_one=True),
        r"g_idx: expected rows in the order of their groups, got act-order \(desc_act\)",
    ),
    (
        lambda: from_gptq(GPTQ[0].long(), GPTQ[1], torch.ones(2, 8), zeros_less_one=True),
        "qweight: expected torch.int32 of 2 dimensions, got torch.int64",
    ),
    (
        lambda: from_gptq(*GPTQ, torch.ones(2, 9), zeros_less_one=True),
        r"scales: expected floats \[2, 8\], got torch.float32 \[2, 9\]",
    ),
    (
        lambda: from_gptq(GPTQ[0], GPTQ[1].repeat(2, 1), torch.ones(4, 8), zeros_less_one=True),
        "group_size: expected a multiple of 32, got 16",
    ),
    (
        lambda: from_awq(torch.zeros(64, 1, dtype=torch.int32), GPTQ[1][:, :0], torch.ones(2, 0)),
        r"qzeros: expected \[K / group, N / 8\] for K 64 and N 8, got \[2, 0\]",
    ),
]
HQQ = {"shape": (4, 64), "group_size": 64, "dtype": torch.float16}
ONE = torch.ones(4, 1)
REFUSED += [
    (
        lambda: from_hqq(torch.zeros(2, 64, dtype=torch.uint8), ONE, ONE, **HQQ, axis=0),
        "axis: expected groups along rows, axis 1, got 0",
    ),
    (
        lambda: from_hqq(ONE, ONE, ONE, **HQQ, packing="3bit_32"),
        "packing: expected '4bit_u8', got '3bit_32'",
    ),
    (
        lambda: from_hqq(torch.zeros(3, 64, dtype=torch.uint8), ONE, ONE, **HQQ),
        r"W_q: expected \[2, 64\] for rows of whole groups of 64, got \[3, 64\]",
    ),
    (
        lambda: from_hqq(torch.zeros(2, 64, dtype=torch.uint8), ONE, ONE[0], **HQQ),
        r"scale, zero: expected one for each of 4 groups, got \[4, 1\] and \[1\]",
    ),
    (
        lambda: from_int8(torch.full((4, 64), 8, dtype=torch.int8), ONE, ONE, dtype=torch.float16),
        "qdata: expected values from -8 to 7, got 8 to 8",
    ),
]


@pytest.mark.parametrize(("read", "complaint"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_has_no_row_in_the_table_is_named(read, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read()


def stored(kind: str) -> tuple[Packing, Tensor]:
    """A library's tensor of 24 x 96 codes, of every bit pattern that it may have."""
    generator = torch.Generator().manual_seed(2)
    words = torch.iinfo(torch.int32)
    shapes = {"gptq": (12, 24), "awq": (96, 3)}
    if kind in shapes:
        drawn = torch.randint(words.min, words.max, shapes[kind], generator=generator)
        return getattr(int4_layouts, kind.upper()), drawn.int()
    if kind == "hqq":
        return int4_layouts.HQQ, torch.randint(256, (36, 32), generator=generator).byte()
    return int4_layouts.INT8, torch.randint(-8, 8, (24, 96), generator=generator).to(torch.int8)


@pytest.mark.parametrize("kind", ["gptq", "awq", "hqq", "int8"])
def test_a_librarys_tensor_is_made_again_bit_for_bit(kind, monkeypatch) -> None:
    packing, tensor = stored(kind)
    packed = packing.pack(tensor)
    assert packed.dtype is torch.uint8 and packed.shape == (24 * 96 // 2,)
    for together in (1 << 22, 1):
        monkeypatch.setattr("peftkern.formats.int4_layouts._TOGETHER", together)
        again = packing.unpack(packed, tuple(tensor.shape))
        assert again.dtype is tensor.dtype and again.is_contiguous() and torch.equal(again, tensor)
