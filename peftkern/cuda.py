"""The "cuda" back end: ops on CUDA C++ kernels, where they need what Triton does not give.

One function per op with the op's signature, and the predicates that say why a call cannot run here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native_cuda


def supports_quantize(weight: Tensor, *args: object) -> str | None:
    """Reason against nf4_quantize."""
    if weight.dtype not in native_cuda.DTYPE_CODES:
        return f"the dtype is {weight.dtype}"
    return native_cuda.unserved(weight.device)


def supports_dequantize(packed: Tensor, *args: object) -> str | None:
    """Reason against nf4_dequantize and nf4_dequantize_out: the dtype asked for, or the device."""
    dtype = args[-1].dtype if isinstance(args[-1], Tensor) else args[-1]
    if dtype not in native_cuda.DTYPE_CODES:
        return f"the dtype is {dtype}"
    return native_cuda.unserved(packed.device)


def supports_nf4_forward(x: Tensor, packed: Tensor, *args: object) -> str | None:
    """Reason against nf4_lora_linear_forward: few rows, blocks that end where rows end."""
    *_, blocksize, _, shape, lora_A, lora_B, _, _, keep, _ = args
    if x.dtype not in native_cuda.LINEAR_DTYPES:
        return f"the dtype is {x.dtype}"
    N, K = shape
    if not (0 < N <= native_cuda.LINEAR_SIZE and 0 < K <= native_cuda.LINEAR_SIZE):
        return f"the weight is {N} x {K}, not 1 to {native_cuda.LINEAR_SIZE} each"
    if x.numel() // K > native_cuda.LINEAR_ROWS:
        return _supports_prefill(x, packed, K, blocksize, lora_A, lora_B, keep)
    if blocksize < native_cuda.LINEAR_BLOCK or K % blocksize:
        return f"blocks of {blocksize} are below {native_cuda.LINEAR_BLOCK} or cross rows of {K}"
    if not native_cuda.begins_at(packed, 8):
        return "the packed weight does not begin at a multiple of 8 bytes"
    if lora_A is not None:
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            if factor.dtype not in native_cuda.DTYPE_CODES:
                return f"the dtype of {name} is {factor.dtype}"
        if not 1 <= len(lora_A) <= native_cuda.LINEAR_RANK:
            return f"the rank is {len(lora_A)}, not 1 to {native_cuda.LINEAR_RANK}"
    if keep is not None:
        return "dropout is left to other back ends"
    return native_cuda.unserved(x.device)


def _supports_prefill(
    x: Tensor,
    packed: Tensor,
    K: int,
    blocksize: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    keep: Tensor | None,
) -> str | None:
    """Reason against nf4_lora_linear_forward of more rows than decoding has.

    By count it beats dequantising and cuBLAS up to somewhere between 235 and 436 rows; while that
    is not measured, dispatch prefers Triton.
    """
    if x.numel() // K > native_cuda.PREFILL_ROWS:
        return f"there are more than {native_cuda.PREFILL_ROWS} rows"
    unit = native_cuda.PREFILL_UNIT
    if K % unit or blocksize < unit:
        return f"rows of {K} are not a multiple of {unit}, or blocks of {blocksize} below it"
    if not native_cuda.begins_at(packed, 8):
        return "the packed weight does not begin at a multiple of 8 bytes"
    if lora_A is not None:
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            if factor.dtype not in native_cuda.DTYPE_CODES:
                return f"the dtype of {name} is {factor.dtype}"
        if not 1 <= len(lora_A) <= native_cuda.PREFILL_RANK:
            return f"the rank is {len(lora_A)}, not 1 to {native_cuda.PREFILL_RANK}"
    if keep is not None:
        return "dropout is left to other back ends"
    return native_cuda.unserved_sm90a(x.device)


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return native_cuda.nf4_quantize(weight.contiguous(), blocksize)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    native_cuda.nf4_dequantize((*tensors, blocksize, nested_blocksize), out)
    return out


def nf4_dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    dense = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    native_cuda.nf4_dequantize((*tensors, blocksize, nested_blocksize), dense)
    if dense is not out:
        out.copy_(dense)


def nf4_lora_linear_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, K = shape
    pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
    rows = _aligned(x.reshape(x.numel() // K, K))
    y, S = native_cuda.nf4_lora_linear_forward(
        rows,
        (*pieces, blocksize, nested_blocksize),
        None if lora_A is None else _aligned(lora_A),
        None if lora_B is None else lora_B.contiguous(),
        None if bias is None else bias.contiguous(),
        scaling,
        N,
        prefill=len(rows) > native_cuda.LINEAR_ROWS,
    )
    S = x.new_empty(0, dtype=torch.float32) if S is None else S.view(*x.shape[:-1], S.shape[1])
    return y.view(*x.shape[:-1], N), S


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous from a multiple of 16 bytes on, as the kernels load it; copied if it is not."""
    tensor = tensor.contiguous()
    return tensor if native_cuda.begins_at(tensor, 16) else tensor.clone()
