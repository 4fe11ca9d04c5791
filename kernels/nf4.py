"""4-bit weights on a GPU: quantize to NF4, and dequantize every format in one pass.

Dequantizing 14336x4096 to bf16 reads 29.4 MB of codes and 0.9 MB of absmax and writes 117 MB. Both
kernels walk the flat weight in tiles of [quantization blocks, values of a block], because blocks
ignore row ends; offsets are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.formats.nf4 import ABSMAX_FLOOR, nf4_midpoints
from peftkern.formats.table import stored
from peftkern.kernels.configs import Problem, ceil_div
from peftkern.kernels.interpreter import narrow
from peftkern.kernels.launch import Plan, code_table, config_for, launch, planned, traits
from peftkern.kernels.primitives import nf4_shared, nf4_tile, nf4_values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOOR = tl.constexpr(ABSMAX_FLOOR)
MIDPOINTS = tl.constexpr(nf4_midpoints())


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    scale_ptr,
    aux_ptr,
    code2_ptr,
    offset_ptr,
    table_ptr,
    out_ptr,
    numel: tl.int64,
    nbytes: tl.int64,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PTX: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute cast((table[code[i]] - zero[b]) * scale[b]), b = i // BLOCKSIZE, of a tile."""
    start = tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS)
    row_start = start + tl.arange(0, ROWS) * COLUMNS
    byte = row_start[:, None] + tl.arange(0, COLUMNS)[None, :]
    block = 2 * row_start // BLOCKSIZE
    shared = nf4_shared(aux_ptr, offset_ptr, FORMAT, NESTED_BLOCKSIZE)
    weight = (packed_ptr, scale_ptr, aux_ptr, code2_ptr, shared)
    # The mask compares bytes, of which 16 divide the number: one of elements would split the load.
    inside = byte < nbytes
    packed, scale, zero = nf4_tile(
        weight, byte, inside, block, 2 * row_start < numel, FORMAT, NESTED_BLOCKSIZE, 1
    )
    even, odd = nf4_values(packed, scale, zero, table_ptr, FORMAT, PTX)
    index = 2 * row_start[:, None] + tl.arange(0, 2 * COLUMNS)[None, :]
    values = tl.reshape(tl.join(even, odd), (ROWS, 2 * COLUMNS))
    values = narrow(values, out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, values, mask=index < numel)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nf4_quantize_kernel(
    x_ptr, packed_ptr, absmax_ptr, numel: tl.int64, ROWS: tl.constexpr, BLOCKSIZE: tl.constexpr
):
    """Compute absmax of each block; a code counts the midpoints that a scaled value exceeds."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(x_ptr + index, mask=index < numel, other=0.0).to(tl.float32)
    absmax = tl.reduce(tl.abs(x), 1, _nan_max)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < numel)
    floor = tl.cast(FLOOR, tl.float32)  # subnormal: Triton takes the literal for a float64
    scaled = x * tl.div_rn(1.0, _nan_max(absmax, floor))[:, None]
    code = tl.zeros_like(scaled).to(tl.int32)
    for i in tl.static_range(15):
        code += tl.where(scaled <= MIDPOINTS[i], 0, 1)  # NaN counts every one
    code = tl.where(index < numel, code, 7)  # the pad of an odd tail
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, (high * 16 + low).to(tl.uint8), mask=byte < (numel + 1) // 2)


def refusal_quantize(weight: Tensor) -> str | None:
    return None if weight.dtype in DTYPES else f"the dtype is {weight.dtype}"


def refusal_dequantize(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"the dtype is {dtype}"


def refusal_dequantize_out(out: Tensor) -> str | None:
    return refusal_dequantize(out.dtype)


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    flat = weight.contiguous().view(-1)
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(ceil_div(numel, blocksize), dtype=torch.float32, device=flat.device)
    if numel == 0:
        return packed, absmax
    plan = _quantize_plan(flat.device, numel, blocksize, 8 * flat.element_size())
    launch(plan, flat, flat, packed, absmax)
    return packed, absmax


@planned
def _quantize_plan(device: torch.device, numel: int, blocksize: int, bits: int) -> Plan:
    config = config_for(Problem("nf4_quantize", 1, numel, blocksize, 1, bits), device)
    rows = max(1, config.block_n // blocksize)
    grid = (ceil_div(ceil_div(numel, blocksize), rows),)
    constants = {"ROWS": rows, "BLOCKSIZE": blocksize, **config.launch()}
    return Plan(_nf4_quantize_kernel, grid, (numel,), **constants)


def nf4_dequantize(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(tuple(layout[3:]), dtype=dtype, device=w[0].device)
    nf4_dequantize_out(w, layout, out)
    return out


def nf4_dequantize_out(w: list[Tensor], layout: list[int], out: Tensor) -> None:
    if not out.is_contiguous():
        out.copy_(nf4_dequantize(w, layout, out.dtype).view(out.shape))
        return
    weight = stored(w, layout)
    if out.numel():
        plan = _dequantize_plan(out.device, out.numel(), *layout[:3], 8 * out.element_size())
        launch(plan, out, *weight.pointers, code_table(out.device, layout[0]), out)


@planned
def _dequantize_plan(
    device: torch.device, numel: int, form: int, blocksize: int, nested_blocksize: int, bits: int
) -> Plan:
    config = config_for(Problem("nf4_dequantize", 1, numel, blocksize, 1, bits), device)
    columns, nbytes = min(blocksize // 2, config.block_n), (numel + 1) // 2
    return Plan(
        _nf4_dequantize_kernel,
        (ceil_div(nbytes, config.block_n),),
        (numel, nbytes),
        FORMAT=form,
        BLOCKSIZE=blocksize,
        NESTED_BLOCKSIZE=nested_blocksize,
        PTX=traits(device).ptx,
        COLUMNS=columns,
        ROWS=config.block_n // columns,
        enable_fp_fusion=False,  # absmax is a product and a sum, each rounded
        **config.launch(),
    )
