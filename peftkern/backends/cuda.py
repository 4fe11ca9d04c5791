"""The "cuda" back end: ops on CUDA C++ kernels, where they need what Triton does not give.

One function per op with the op's signature, and the predicates that say why a call cannot run here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkern.backends import native, native_cuda
from peftkern.backends.reference import unrepresentable

JACOBI_SWEEPS = 20  # 6 to 9 are usual


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
    """Reason against nf4_lora_linear_forward: one kernel takes few rows, another more of them.

    By count the second beats dequantising and cuBLAS up to somewhere between 235 and 436 rows;
    while that is not measured, dispatch prefers Triton.
    """
    *_, blocksize, _, shape, lora_A, lora_B, _, _, keep, _ = args
    if x.dtype not in native_cuda.LINEAR_DTYPES:
        return f"the dtype is {x.dtype}"
    N, K = shape
    if not (0 < N <= native_cuda.LINEAR_SIZE and 0 < K <= native_cuda.LINEAR_SIZE):
        return f"the weight is {N} x {K}, not 1 to {native_cuda.LINEAR_SIZE} each"
    rows, unit = x.numel() // K, native_cuda.PREFILL_UNIT
    few = rows <= native_cuda.LINEAR_ROWS
    if rows > native_cuda.PREFILL_ROWS:
        return f"there are more than {native_cuda.PREFILL_ROWS} rows"
    if few and (blocksize < native_cuda.LINEAR_BLOCK or K % blocksize):
        return f"blocks of {blocksize} are below {native_cuda.LINEAR_BLOCK} or cross rows of {K}"
    if not few and (blocksize < unit or K % unit):
        return f"rows of {K} are not a multiple of {unit}, or blocks of {blocksize} below it"
    if not native_cuda.begins_at(packed, 8):
        return "the packed weight does not begin at a multiple of 8 bytes"
    most = native_cuda.LINEAR_RANK if few else native_cuda.PREFILL_RANK
    if lora_A is not None and (reason := _against_adapters(lora_A, lora_B, most)):
        return reason
    if keep is not None:
        return "dropout is left to other back ends"
    return native_cuda.unserved(x.device) if few else native_cuda.unserved_sm90a(x.device)


def _against_adapters(lora_A: Tensor, lora_B: Tensor, most: int) -> str | None:
    """Reason against factors, whose rank is at most `most`."""
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in native_cuda.DTYPE_CODES:
            return f"the dtype of {name} is {factor.dtype}"
    r = lora_A.shape[0]
    if not 1 <= r <= most:
        return f"the rank is {r}, not 1 to {most}"
    return None


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


def supports_low_rank_svd(lora_B: list[Tensor], lora_A: list[Tensor], *args: object) -> str | None:
    """Reason against low_rank_svd: float64 factors deserve better than a float64 Gram matrix."""
    device = lora_B[0].device
    for tensor in (*lora_B, *lora_A):
        if tensor.dtype not in native_cuda.DTYPE_CODES:
            return f"the dtype is {tensor.dtype}"
        if tensor.device != device:
            return f"tensors are on {device} and {tensor.device}"
    r = max(A.shape[0] for A in lora_A)
    if r > native_cuda.JACOBI_RANK:
        return f"the rank is {r}, more than {native_cuda.JACOBI_RANK}"
    return native_cuda.unserved(device)


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The steps of csrc/include/peftkern/low_rank_svd.h, one rank after the other, in float64.

    Cholesky and Jacobi are kernels, the products are torch's: up to seven launches for each pair.
    "accurate" takes the Gram matrix of every factor twice: the device alone knows which of them
    need it, and nothing waits for its answer.
    """
    device = lora_B[0].device
    sides = lora_B, [A.mT for A in lora_A]  # [length, r] each
    k = [min(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    lengths = [[factor.shape[0] for factor in side] for side in sides]
    numels = [[m * width * vectors for m, width in zip(side, k, strict=True)] for side in lengths]
    S, U, Vh = (
        torch.empty(sum(sizes), dtype=torch.float32, device=device) for sizes in (k, *numels)
    )
    S_parts, U_parts, Vh_parts = (
        flat.split(sizes) for flat, sizes in zip((S, U, Vh), (k, *numels), strict=True)
    )
    rank, info = (torch.zeros(len(k), dtype=torch.int64, device=device) for _ in range(2))
    members: dict[int, list[int]] = {}
    for i, A in enumerate(lora_A):
        if A.shape[0]:
            members.setdefault(A.shape[0], []).append(i)
    for where in members.values():
        factors = [side[i] for side in sides for i in where]
        bits = torch.tensor([scaling[i] for i in where], dtype=torch.float64, device="cpu")
        numbers = [*bits.view(torch.int64).tolist(), *(k[i] for i in where), *where]
        factor, most, at = native.address_table([], device, numbers).chunk(3)
        factor = factor.view(torch.float64)
        sigma, combined, rank_r, info_r = _decompose(factors, factor, most, mode == "accurate")
        rank[at], info[at] = rank_r, info_r
        for number, i in enumerate(where):
            S_parts[i].copy_(sigma[number, : k[i]])
            if not vectors:
                continue
            left, right = (side[number, :, : k[i]] for side in combined)
            U_parts[i].view(lengths[0][i], k[i]).copy_(lora_B[i].double() @ left)
            Vh_parts[i].view(k[i], lengths[1][i]).copy_(right.mT @ lora_A[i].double())
    return U, S, Vh, rank, info


def _decompose(
    factors: list[Tensor], scaling: Tensor, widths: Tensor, accurate: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """SVDs of the pairs of one rank: `factors` are all B [m, r], then all A^T [n, r].

    Returns: sigma [L, r], zero from the rank on; the matrices [L, r, r] that make U of B and V of
    A^T; rank, at most `widths`, and info.
    """
    count, r = len(scaling), factors[0].shape[1]
    gram = _grams(factors)
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[:, None, None], gram, 0.0)
    root, inverse, norms = native_cuda.gram_roots(gram)
    if accurate:
        root_of_Q, inverse_of_Q, norms_of_Q = native_cuda.gram_roots(_grams(factors, inverse))
        root = (root_of_Q * norms_of_Q[:, None, :]) @ root
        inverse = inverse @ inverse_of_Q
    bad = ~(finite[:count] & finite[count:] & scaling.isfinite())
    weights = norms[:count] * norms[count:]  # of column l of B times row l of A
    scale = weights.amax(1)
    weights = torch.where((scale > 0)[:, None], weights / scale[:, None], 0.0)
    weights = torch.where(bad[:, None], 0.0, weights * scaling.sign()[:, None])
    cores = (root[:count] * weights[:, None, :]) @ root[count:].mT
    sigma, left, right, more = native_cuda.jacobi_svd(cores, JACOBI_SWEEPS, True)
    floor = r * 2.0**-52 * weights.abs().sum(1)  # what lies below are rounding errors
    rank = torch.minimum((sigma > floor[:, None]).sum(1), widths)
    kept = torch.arange(r, device=sigma.device) < rank[:, None]
    sigma = torch.where(kept, sigma * (scale * scaling.abs())[:, None], 0.0)
    outside = unrepresentable(sigma, kept, torch.float32)
    sigma = torch.where(bad[:, None], math.nan, sigma)
    unit = torch.where(kept, 1.0, 0.0)[:, None, :]
    unit = torch.where(bad[:, None, None], math.nan, unit)
    combined = inverse[:count] @ left * unit, inverse[count:] @ right * unit
    info = torch.where(bad, -1, torch.where(outside & (more == 0), -2, more))
    return sigma, combined, rank, info


def _grams(factors: list[Tensor], inverse: Tensor | None = None) -> Tensor:
    """Gram matrices [2 L, r, r] of the factors, or of factors[i] @ inverse[i]."""
    r = factors[0].shape[1]
    grams = torch.empty(len(factors), r, r, dtype=torch.float64, device=factors[0].device)
    for i, factor in enumerate(factors):
        columns = factor.double()
        if inverse is not None:
            columns = columns @ inverse[i]
        torch.mm(columns.mT, columns, out=grams[i])
    return grams


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
