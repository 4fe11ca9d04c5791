"""Device functions shared by the Triton kernels: products, dropout's mask, 4-bit decoding.

Every function here is inlined into the kernels that call it. FORMAT is the row of a weight's format
in `peftkern.formats.table`, from which come the code values, how a block's scale is stored, and
which nibble of a byte is the first: no kernel knows more of a format than that number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from peftkern.formats.table import FORMATS
from peftkern.kernels.interpreter import dot, narrow

PHILOX_ROUNDS = tl.constexpr(7)
SCALES = tl.constexpr(tuple(row.scales for row in FORMATS))
LOW_FIRST = tl.constexpr(tuple(row.low_first for row in FORMATS))
E4M3_SHIFT = tl.constexpr(2.0**120)  # of the exponent, from float32's bias to e4m3's


@triton.jit
def dot_factor(x, factor, coarse, fine, PRECISION: tl.constexpr):
    """Accumulate x @ factor into (coarse, fine), for a tile of activations and one of a factor.

    A bfloat16 x meets a float32 factor as the sum of three bfloat16 ones, whose 24 bits are all of
    its own: three exact products on the tensor cores and no float32 copy of x. A float16 x is exact
    in tf32 and meets two pieces of 11 bits, where tf32x3 would cut x, too. The smaller pieces have
    a sum to themselves, so that `join_sums` can drop it where an Inf made it NaN.
    """
    if x.dtype == tl.bfloat16 and factor.dtype == tl.float32:
        high = narrow(factor, tl.bfloat16)
        rest = factor - high.to(tl.float32)
        middle = narrow(rest, tl.bfloat16)
        low = narrow(rest - middle.to(tl.float32), tl.bfloat16)
        coarse += dot(x, high, PRECISION)
        fine += dot(x, middle, PRECISION)
        fine += dot(x, low, PRECISION)
    elif x.dtype == tl.float16 and factor.dtype == tl.float32 and PRECISION == "tf32x3":
        x = x.to(tl.float32)
        high = (factor.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
        coarse += dot(x, high, "tf32")
        fine += dot(x, factor - high, "tf32")
    elif x.dtype == factor.dtype:
        coarse += dot(x, factor, PRECISION)
    else:
        coarse += dot(x.to(tl.float32), factor.to(tl.float32), PRECISION)
    return coarse, fine


@triton.jit
def as_factor(s, factor_dtype: tl.constexpr, dtype: tl.constexpr):
    """Round S or dS, in float32, to bfloat16 where factor and activations are, as eager torch does.

    Its product with either is then one exact product on the tensor cores, where float32 takes three
    and a float32 copy. float16 keeps float32: it has not the range.
    """
    if factor_dtype == tl.bfloat16 and dtype == tl.bfloat16:
        return narrow(s, tl.bfloat16)
    else:
        return s


@triton.jit
def dot_update(s, factor, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply S by a factor as exactly as a result in dtype can show.

    The 11 bits of one tf32 product are beyond bfloat16's 8, not beyond float16's 11.
    """
    s = as_factor(s, factor.dtype, dtype)
    if s.dtype == factor.dtype and s.dtype == tl.bfloat16:
        return dot(s, factor, PRECISION)
    elif dtype == tl.bfloat16 and PRECISION == "tf32x3":
        return dot(s, factor.to(tl.float32), "tf32")
    else:
        return dot(s, factor.to(tl.float32), PRECISION)


@triton.jit
def join_sums(coarse, fine):
    """Return coarse + fine, or coarse alone where the smaller pieces met an Inf."""
    return coarse + tl.where(tl.abs(fine) < float("inf"), fine, 0.0)


@triton.jit
def keep_mask(seed, rows, first_column, threshold, BLOCK_K: tl.constexpr):
    """Draw dropout's mask of a tile, [rows, first_column + BLOCK_K columns], True for kept.

    Element (row, column) has the 16 bits number column % 8 of Philox4x32-7 with the seed as its
    key and (column // 8, row, 0, 0) as its counter, and is kept if they are below the threshold.
    `dropout.philox_keep` draws the same.
    """
    group = first_column // 8 + tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros_like(rows)[:, None] + tl.zeros_like(group)[None, :]
    words = tl.philox(seed, group[None, :] + zero, rows[:, None] + zero, zero, zero, PHILOX_ROUNDS)
    quads = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    halves = tl.join(quads & 0xFFFF, quads >> 16)
    return tl.reshape(halves, (rows.shape[0], BLOCK_K)).to(tl.int32) < threshold


def _prmt_program(code: Sequence[float], dtype: torch.dtype) -> str:
    """Return PTX that turns 4 bytes ($4) into values of high ($0, $1) and low nibbles ($2, $3).

    code: the sixteen values, which are rounded to dtype, of 16 bits.

    A value of 16 bits has two byte planes. `prmt` looks four codes up at once in the eight entries
    of a plane that two registers hold; bit 3 of each code, spread over a byte by prmt's sign mode,
    picks the lower or the upper eight; four more interleave the planes. 21 operations, 8 weights.
    """
    bits = torch.tensor(code).to(dtype).view(torch.int16).tolist()
    planes = {
        name: [value >> shift & 255 for value in bits] for name, shift in (("l", 0), ("h", 8))
    }
    lines = [".reg .b32 index, index2, moved, upper, upper2, first, second, l, h, l2, h2;"]
    for name, plane in planes.items():
        for i in range(4):
            word = int.from_bytes(bytes(plane[4 * i : 4 * i + 4]), "little")
            lines += [f".reg .b32 {name}t{i};", f"mov.b32 {name}t{i}, {word:#010x};"]
    lines += [
        "and.b32 index, $4, 0x77777777;",
        "shl.b32 moved, $4, 4;",
        "prmt.b32 upper, $4, moved, 0x9d8c;",
        "prmt.b32 upper2, $4, moved, 0xbfae;",
        "shr.u32 index2, index, 16;",
    ]
    for half in ("", "2"):
        for name in planes:
            lines += [
                f"prmt.b32 first, {name}t0, {name}t1, index{half};",
                f"prmt.b32 second, {name}t2, {name}t3, index{half};",
                f"lop3.b32 {name}{half}, first, second, upper{half}, 0xd8;",
            ]
    for i, half in enumerate(("", "2")):
        lines += [
            f"prmt.b32 ${i}, l{half}, h{half}, 0x7351;",
            f"prmt.b32 ${i + 2}, l{half}, h{half}, 0x6240;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


PRMT_BFLOAT16 = tl.constexpr(tuple(_prmt_program(row.code, torch.bfloat16) for row in FORMATS))
PRMT_FLOAT16 = tl.constexpr(tuple(_prmt_program(row.code, torch.float16) for row in FORMATS))


def _shuffle_program() -> str:
    """Return PTX that turns 4 bytes ($8) into float32 values of high ($0 to $3) and low nibbles.

    Each lane keeps one of the sixteen values, from the table at $9, and a shuffle in halves of a
    warp reads the lane that the low four bits of its index name: one operation and one shift for a
    weight, where a load would have its own layout and an address of 64 bits.
    """
    lines = [
        ".reg .b32 lane, value, index;",
        ".reg .b64 address;",
        "mov.u32 lane, %laneid;",
        "and.b32 lane, lane, 15;",
        "mad.wide.u32 address, lane, 4, $9;",
        "ld.global.nc.b32 value, [address];",
    ]
    for byte in range(4):
        for output, shift in ((byte, 8 * byte + 4), (byte + 4, 8 * byte)):
            lines += [
                f"shr.u32 index, $8, {shift};",
                f"shfl.sync.idx.b32 ${output}, value, index, 0x101f, 0xffffffff;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


SHUFFLE = tl.constexpr(_shuffle_program())


@triton.jit
def _nibble_values(packed, table_ptr, dtype: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Look up the code values of the high and the low nibbles of bytes, in dtype.

    PTX: in registers, by NVIDIA's permutations and shuffles. Otherwise from the table of sixteen.
    """
    if not PTX:
        high = tl.load(table_ptr + (packed >> 4).to(tl.int32))
        low = tl.load(table_ptr + (packed & 15).to(tl.int32))
        return narrow(high, dtype), narrow(low, dtype)
    elif dtype == tl.float32:
        address = table_ptr.to(tl.int64)
        return tl.inline_asm_elementwise(
            SHUFFLE,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,l,l,l,l",
            [packed, address],
            (tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            PRMT_BFLOAT16[FORMAT],
            "=r,=r,=r,=r,r",
            [packed],
            (tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            PRMT_FLOAT16[FORMAT],
            "=r,=r,=r,=r,r",
            [packed],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def nf4_codes(
    packed, zero, table_ptr, dtype: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr
):
    """Decode the even and the odd values of bytes but for their scale: code - zero, in dtype.

    dtype: float32 of a format that has zeros, which need not be integers.
    """
    high, low = _nibble_values(packed, table_ptr, dtype, FORMAT, PTX)
    if SCALES[FORMAT] == "scale_zero":
        high = high - zero
        low = low - zero
    if LOW_FIRST[FORMAT]:
        return low, high
    else:
        return high, low


@triton.jit
def nf4_values(packed, scale, zero, table_ptr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Decode the even and the odd values of bytes, (code - zero) * scale, in float32."""
    even, odd = nf4_codes(packed, zero, table_ptr, tl.float32, FORMAT, PTX)
    return even * scale, odd * scale


@triton.jit
def _e8m0(stored):
    """Return 2^(stored - 127), NaN of 255: float32 has that exponent, but for the least."""
    bits = stored.to(tl.int32) << 23
    bits = tl.where(stored == 0, 0x00400000, tl.where(stored == 255, 0x7FC00000, bits))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(stored):
    """Return the value of float8_e4m3fn's bits, NaN of 127 and 255.

    Exponent and fraction stand in float32's places, where they are too small by a power of two;
    a subnormal is one there, too, and the product is exact. No target's own conversion is needed.
    """
    bits = stored.to(tl.uint32)
    bits = ((bits & 127) << 20) | ((bits & 128) << 24)
    value = bits.to(tl.float32, bitcast=True) * E4M3_SHIFT
    return tl.where((stored & 127) == 127, float("nan"), value)


@triton.jit
def nf4_shared(aux_ptr, offset_ptr, FORMAT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr):
    """Load what all blocks of a weight share: the nested offset, or the tensor's scale."""
    if NESTED_BLOCKSIZE:
        return tl.load(offset_ptr)
    elif SCALES[FORMAT] == "e4m3":
        return tl.load(aux_ptr)
    else:
        return 0.0


@triton.jit
def _nf4_scale(weight, block, mask, FORMAT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr):
    """Load the float32 scale of some blocks, and their zero (0.0 of a format without zeros).

    Nested absmax (NESTED_BLOCKSIZE is not 0) is a product and a sum, each rounded: the launch has
    to forbid fused multiply-adds (`enable_fp_fusion=False`) where bits are promised.
    """
    _, scale_ptr, aux_ptr, code2_ptr, shared = weight
    stored = tl.load(scale_ptr + block, mask=mask, other=0)
    if NESTED_BLOCKSIZE:
        nested = tl.load(aux_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(code2_ptr + stored.to(tl.int32)) * nested + shared, 0.0
    elif SCALES[FORMAT] == "e8m0":
        return _e8m0(stored), 0.0
    elif SCALES[FORMAT] == "e4m3":
        return _e4m3(stored) * shared, 0.0
    elif SCALES[FORMAT] == "scale_zero":
        return stored, tl.load(aux_ptr + block, mask=mask, other=0.0)
    else:
        return stored, 0.0


@triton.jit
def _spread(of_blocks, SIZE: tl.constexpr):
    """Repeat values of blocks [rows, blocks] for each byte of theirs, [rows, SIZE]."""
    rows: tl.constexpr = of_blocks.shape[0]
    blocks: tl.constexpr = of_blocks.shape[1]
    values = tl.broadcast_to(of_blocks[:, :, None], (rows, blocks, SIZE // blocks))
    return tl.reshape(values, (rows, SIZE))


@triton.jit
def nf4_tile(
    weight,
    byte,
    byte_mask,
    block,
    block_mask,
    FORMAT: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Load packed codes at some bytes [rows, size], and scale and zero of the block of each row.

    Of BLOCKS blocks from that one on, if a row has more than one: each byte then has its own. Both
    broadcast to [rows, size]. weight: pointers to packed codes, block scales as stored, what these
    need (nested absmax's own absmax, the tensor's scale, or zeros) and the code of nested absmax;
    last the number that `nf4_shared` has read.
    """
    packed = tl.load(weight[0] + byte, mask=byte_mask, other=0)
    if BLOCKS > 1:
        several = block[:, None] + tl.arange(0, BLOCKS)[None, :]
        scale, zero = _nf4_scale(weight, several, block_mask[:, None], FORMAT, NESTED_BLOCKSIZE)
        if SCALES[FORMAT] == "scale_zero":
            zero = _spread(zero, byte.shape[1])
        return packed, _spread(scale, byte.shape[1]), zero
    else:
        scale, zero = _nf4_scale(weight, block, block_mask, FORMAT, NESTED_BLOCKSIZE)
        if SCALES[FORMAT] == "scale_zero":
            zero = zero[:, None]
        return packed, scale[:, None], zero


@triton.jit
def nf4_rows(
    weight,
    table_ptr,
    place,
    inside,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PTX: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Decode SIZE values from each place on in float32: whole bytes of a block, or whole blocks."""
    byte = place[:, None] // 2 + tl.arange(0, SIZE // 2)[None, :]
    packed, scale, zero = nf4_tile(
        weight,
        byte,
        inside[:, None],
        place // BLOCKSIZE,
        inside,
        FORMAT,
        NESTED_BLOCKSIZE,
        SIZE // BLOCKSIZE,
    )
    even, odd = nf4_values(packed, scale, zero, table_ptr, FORMAT, PTX)
    return tl.reshape(tl.join(even, odd), (place.shape[0], SIZE))


@triton.jit
def nf4_weight(
    weight,
    table_ptr,
    base,
    first_n,
    first_k,
    N,
    K,
    stride_n,
    stride_k,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    INNER: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Decode a tile [BLOCK_K, BLOCK_N] of a flat packed stack in float32.

    INNER: which of the two is contiguous, "n" or "k", where blocks end with rows, so that a row of
    the tile is in one or has whole ones. "" decodes value by value, from wherever in a byte: NF4's
    and FP4's blocks alone need not end with rows.
    """
    n = first_n + tl.arange(0, BLOCK_N)
    k = first_k + tl.arange(0, BLOCK_K)
    if INNER == "k":
        place = base + n.to(tl.int64) * stride_n + first_k
        w = nf4_rows(
            weight,
            table_ptr,
            place,
            n < N,
            FORMAT,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            PTX,
            BLOCK_K,
        )
        return tl.trans(w)
    elif INNER == "n":
        place = base + k.to(tl.int64) * stride_k + first_n
        return nf4_rows(
            weight,
            table_ptr,
            place,
            k < K,
            FORMAT,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            PTX,
            BLOCK_N,
        )
    else:
        tl.static_assert(SCALES[FORMAT] == "absmax" and not LOW_FIRST[FORMAT])
        place = base + n.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
        inside = (n < N)[None, :] & (k < K)[:, None]
        block = place // BLOCKSIZE
        packed = tl.load(weight[0] + place // 2, mask=inside, other=0)
        scale, _ = _nf4_scale(weight, block, inside, FORMAT, NESTED_BLOCKSIZE)
        code = tl.where(place % 2 == 0, packed >> 4, packed & 15)
        return tl.load(table_ptr + code.to(tl.int32)) * scale
