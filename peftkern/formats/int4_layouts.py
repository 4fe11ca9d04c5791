"""Group-wise 4-bit integers as other libraries store them, repacked to the row `int4` of the table.

Each function gives a `BlockWeight` of the same codes, scales and zero points: nothing is rounded.
Codes are moved in one pass; beside the result there is a tensor of its size at most. A group that
is larger than any block of the table becomes several blocks of one scale.

    GPTQ                 int32 [K / 8, N], 8 values of a column from the lowest nibble on; zero
                         points int32 [K / group, N / 8] likewise, in version 1 stored less one
    AWQ, "gemm"          int32 [K, N / 8], of 8 columns those 0 2 4 6 1 3 5 7; zero points so, too
    HQQ, 4bit_u8, axis 1 uint8 [G / 2, group], group i in the high nibbles, i + G / 2 in the low
                         ones; zero points are floats

Sources: AutoGPTQ's and GPT-QModel's `qlinear` (Frantar et al. 2022, arXiv:2210.17323), AutoAWQ's
`WQLinear_GEMM` (Lin et al. 2023, arXiv:2306.00978), HQQ's `BitPack` and `Quantizer.dequantize`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.formats.table import INT4

__all__ = ["from_awq", "from_gptq", "from_hqq", "from_int8"]
_CODES = 8  # in an int32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of columns, from the lowest nibble on
_TOGETHER = 1 << 22  # codes that are unpacked at once


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zeros_less_one: bool,
    bits: int = 4,
) -> BlockWeight:
    """Repack a weight of GPTQ.

    W[n, k] = scales[g, n] * (q[k, n] - zero[g, n]), g = k // group

    Args:
        qweight: int32 [K / 8, N]; qzeros: int32 [K / group, N / 8]; scales: [K / group, N].
        g_idx: [K], the group of each row, if it is stored.
        zeros_less_one: whether zero points are stored less one, modulo 16: version 1 of the format
            (`checkpoint_format` "gptq", and all files without one), not version 2.
    Raises: ValueError naming what has no row in the table: other bits, act-order.
    """
    _check_bits(bits)
    _check("qweight", qweight, torch.int32, 2)
    K, N = qweight.shape[0] * _CODES, qweight.shape[1]
    group = _check_groups(qzeros, scales, K, N)
    if g_idx is not None:
        in_order = torch.arange(K, device=g_idx.device, dtype=g_idx.dtype) // group
        if g_idx.shape != (K,) or not torch.equal(g_idx, in_order):
            raise ArgumentError(
                "g_idx: expected rows in the order of their groups, got act-order (desc_act)"
            )
    packed = GPTQ.pack(qweight)
    zero = _nibbles(qzeros, tuple(range(_CODES)))
    if zeros_less_one:
        zero = (zero + 1) & 15
    return _weight(packed, scales.t(), zero.t(), (N, K), group, scales.dtype)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int = 4) -> BlockWeight:
    """Repack a weight of AWQ, version "gemm".

    W[n, k] = scales[g, n] * (q[k, n] - zero[g, n]), g = k // group

    Args: qweight int32 [K, N / 8]; qzeros int32 [K / group, N / 8]; scales [K / group, N].
    Raises: ValueError naming what has no row in the table.
    """
    _check_bits(bits)
    _check("qweight", qweight, torch.int32, 2)
    K, N = qweight.shape[0], qweight.shape[1] * _CODES
    group = _check_groups(qzeros, scales, K, N)
    packed = AWQ.pack(qweight)
    zero = _nibbles(qzeros, _AWQ_ORDER)
    return _weight(packed, scales.t(), zero.t(), (N, K), group, scales.dtype)


def from_hqq(
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    shape: tuple[int, int],
    group_size: int | None,
    dtype: torch.dtype,
    packing: str = "4bit_u8",
    axis: int = 1,
) -> BlockWeight:
    """Repack a weight of HQQ.

    W.view(-1, group)[g] = (q[g] - zero[g]) * scale[g]

    In float32; HQQ rounds the difference to its compute dtype, too, which a zero point that is no
    integer lets one see.

    Args: W_q uint8 [G / 2, group] for G groups; scale, zero [G, 1]; shape (N, K); dtype, that HQQ
        computes in.
    Raises: ValueError naming what has no row in the table.
    """
    if packing != "4bit_u8":
        raise ArgumentError(f"packing: expected '4bit_u8', got {packing!r}")
    if axis != 1:
        raise ArgumentError(f"axis: expected groups along rows, axis 1, got {axis}")
    N, K = shape
    group = group_size or K
    _check("W_q", W_q, torch.uint8, 2)
    groups = N * K // group
    if group * groups != N * K or K % group or W_q.shape != (groups // 2, group) or groups % 2:
        raise ArgumentError(
            f"W_q: expected {[groups // 2, group]} for rows of whole groups of {group}, got "
            f"{list(W_q.shape)} for a weight {[N, K]}"
        )
    if scale.numel() != groups or zero.numel() != groups:
        raise ArgumentError(
            f"scale, zero: expected one for each of {groups} groups, got {list(scale.shape)} and "
            f"{list(zero.shape)}"
        )
    packed = HQQ.pack(W_q)
    scale, zero = (t.reshape(N, K // group) for t in (scale, zero))
    return _weight(packed, scale, zero, (N, K), group, dtype)


def from_int8(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, *, dtype: torch.dtype
) -> BlockWeight:
    """Pack a weight of torchao whose codes of 4 bits are kept in 8, at twice the size.

    W[n, k] = (q[n, k] - zero[n, g]) * scale[n, g], g = k // group

    Args: qdata int8 [N, K] of values from -8 to 7; scale, zero_point [N, K / group]; dtype, that it
        is decoded to.
    Raises: ValueError naming what has no row in the table.
    """
    _check("qdata", qdata, torch.int8, 2)
    N, K = qdata.shape
    groups = scale.shape[-1] if scale.dim() == 2 else 0
    if not groups or K % groups or scale.shape != (N, groups) or zero_point.shape != scale.shape:
        raise ArgumentError(
            f"scale: expected [N, K / group] for a weight {[N, K]}, got {list(scale.shape)}"
        )
    packed = INT8.pack(qdata)
    return _weight(packed, scale, zero_point.float() + 8, (N, K), K // groups, dtype)


def _weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    shape: tuple[int, int],
    group: int,
    dtype: torch.dtype,
) -> BlockWeight:
    """Make the value of codes in order and of a scale and zero point [N, K / group] for each group.

    Raises: ValueError naming a group that is no multiple of a block.
    """
    blocksize = next((b for b in reversed(INT4.blocksizes) if group % b == 0), None)
    if blocksize is None:
        raise ArgumentError(f"group_size: expected a multiple of {INT4.blocksizes[0]}, got {group}")
    repeat = group // blocksize
    scale, zero = (t.float().repeat_interleave(repeat, dim=1).view(-1) for t in (scale, zero))
    return BlockWeight(INT4.name, packed, scale, shape, dtype, blocksize, zero=zero)


class Packing(NamedTuple):
    """Codes of a library's tensor.

    pack(tensor): packed bytes of a `BlockWeight`, flat. unpack(packed, shape): that tensor again,
    bit for bit, from its shape.
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, tuple[int, ...]], Tensor]


def _pack_gptq(qweight: Tensor) -> Tensor:
    return qweight.t().contiguous().view(torch.uint8).view(-1)  # low nibbles are even rows


def _unpack_gptq(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return packed.view(torch.int32).view(shape[::-1]).t().contiguous()


def _pack_awq(qweight: Tensor) -> Tensor:
    K, words = qweight.shape
    packed = torch.empty(words * _CODES, K // 2, dtype=torch.uint8, device=qweight.device)
    step = max(1, _TOGETHER // max(K * _CODES, 1))
    for first in range(0, words, step):
        codes = _nibbles(qweight[:, first : first + step], _AWQ_ORDER).t()
        packed[first * _CODES : (first + step) * _CODES] = _pairs(codes)
    return packed.view(-1)


def _unpack_awq(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    K, words = shape
    rows = packed.view(words, _CODES, K // 2)
    found = torch.empty(K, words, dtype=torch.int32, device=packed.device)
    step = max(1, _TOGETHER // max(K * _CODES, 1))
    for first in range(0, words, step):
        codes = _codes(rows[first : first + step, _AWQ_ORDER]).permute(2, 0, 1)
        found[:, first : first + step] = _pairs(codes).contiguous().view(torch.int32).squeeze(-1)
    return found


def _pack_hqq(W_q: Tensor) -> Tensor:
    half, group = W_q.shape
    packed = torch.empty(2, half, group // 2, dtype=torch.uint8, device=W_q.device)
    for part, codes in zip(packed, (W_q >> 4, W_q & 15), strict=True):
        part.copy_(_pairs(codes))
    return packed.view(-1)


def _unpack_hqq(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    high, low = packed.view(2, shape[0], shape[1] // 2)
    return (_codes(high) << 4) | _codes(low)


def _pack_int8(qdata: Tensor) -> Tensor:
    codes = (qdata + 8).view(torch.uint8)
    if codes.numel() and codes.amax() > 15:  # which would reach into its neighbor's bits
        raise ArgumentError(
            f"qdata: expected values from -8 to 7, got {int(qdata.min())} to {int(qdata.max())}"
        )
    return _pairs(codes).view(-1)


def _unpack_int8(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _codes(packed.view(*shape[:-1], shape[-1] // 2)).view(torch.int8) - 8


GPTQ = Packing(_pack_gptq, _unpack_gptq)
AWQ = Packing(_pack_awq, _unpack_awq)
HQQ = Packing(_pack_hqq, _unpack_hqq)
INT8 = Packing(_pack_int8, _unpack_int8)


def _pairs(codes: Tensor) -> Tensor:
    """Pack codes [..., 2 n] to bytes [..., n], the even ones low."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _codes(octets: Tensor) -> Tensor:
    """Unpack bytes [..., n] to codes [..., 2 n], the low ones first."""
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def _nibbles(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Unpack int32 [M, n] to uint8 [M, 8 n]: nibble i of a word is column `order[i]` of its 8."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, _CODES // 2)
    codes = torch.stack([octets & 15, octets >> 4], dim=-1).view(*words.shape, _CODES)
    place = torch.tensor(order, device=words.device).argsort()
    return codes[..., place].reshape(words.shape[0], -1)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype is not dtype or tensor.dim() != dims:
        came = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
        raise ArgumentError(f"{name}: expected {dtype} of {dims} dimensions, got {came}")


def _check_bits(bits: int) -> None:
    if bits != 4:
        raise ArgumentError(f"bits: expected 4, got {bits}")


def _check_groups(qzeros: Tensor, scales: Tensor, K: int, N: int) -> int:
    """Check zero points and scales of groups along K; return the size of a group."""
    _check("qzeros", qzeros, torch.int32, 2)
    groups = qzeros.shape[0]
    if not groups or K % groups or N % _CODES or qzeros.shape[1] * _CODES != N:
        raise ArgumentError(
            f"qzeros: expected [K / group, N / {_CODES}] for K {K} and N {N}, got "
            f"{list(qzeros.shape)}"
        )
    if scales.shape != (groups, N) or not scales.is_floating_point():
        raise ArgumentError(
            f"scales: expected floats {[groups, N]}, got {scales.dtype} {list(scales.shape)}"
        )
    return K // groups
