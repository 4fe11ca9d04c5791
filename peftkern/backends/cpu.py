"""The "cpu" back end: every op on C++ kernels and, for dense products, on torch's own GEMM.

One function per op with the op's signature, and the predicates that say why a call cannot run here.
Sums over the rank and over rows are float32. No float32 copy of a whole activation is made, except
of float16 ones, because the NF4 kernels take float32 or bfloat16.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends import native
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.reference import unrepresentable

# Up to which Jacobi on many cores at once beats LAPACK on one after the other: 224 cores of rank 16
# in 3.0 ms against 6.1, of rank 64 in 187 against 81 (one thread, Xeon with AMX, November 2026).
JACOBI_RANK = 32
JACOBI_SWEEPS = 30  # 6 to 12 are usual


def supports_device(tensor: Tensor, *args: object) -> str | None:
    """Reason against ops that take any tensor of a CPU."""
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device}"
    return native.cpu_module()[1]


def supports_dense(dense: Tensor, *args: object) -> str | None:
    """Reason against ops whose first tensor is dense (a weight, x, dy): also its dtype."""
    if dense.dtype not in native.DTYPE_CODES:
        return f"the dtype is {dense.dtype}"
    return supports_device(dense)


def supports_dequantize(packed: Tensor, *args: object) -> str | None:
    """Reason against nf4_dequantize: also the dtype asked for."""
    dtype = args[-1].dtype if isinstance(args[-1], Tensor) else args[-1]
    if dtype not in native.DTYPE_CODES:
        return f"the dtype is {dtype}"
    return supports_device(packed)


def supports_nf4_forward(x: Tensor, *args: object) -> str | None:
    """Reason against nf4_lora_linear_forward."""
    return _supports_nf4(x, args[7])


def supports_nf4_backward(dy: Tensor, *args: object) -> str | None:
    """Reason against nf4_lora_linear_backward."""
    return _supports_nf4(dy, args[9])


def _supports_nf4(activations: Tensor, shape: list[int]) -> str | None:
    if 0 in shape:
        return "the weight is empty"
    return supports_dense(activations)


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return native.nf4_quantize(weight.contiguous(), blocksize)


def nf4_quantize_absmax(
    absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    return native.nf4_quantize_absmax(absmax.contiguous(), offset, code.contiguous(), blocksize)


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
    out = torch.empty(shape, dtype=dtype, device="cpu")
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    native.nf4_dequantize((*tensors, blocksize, nested_blocksize), out, fresh=True)
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
    dense = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device="cpu")
    native.nf4_dequantize((*tensors, blocksize, nested_blocksize), dense, fresh=dense is not out)
    if dense is not out:
        out.copy_(dense)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    rows = _rows(x, K)
    keep = _mask(keep, rows.shape[0], K, dropout_p)
    S = native.lora_shrink(rows, _float32(lora_A), keep, keep_scale(keep, dropout_p))
    y = F.linear(rows, weight, bias)
    native.lora_expand_(y, S, _float32(lora_B.t()), scaling)
    return y.view(*x.shape[:-1], N), S.view(*x.shape[:-1], S.shape[1])


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(dy, lora_B.shape[0])
    keep = _mask(keep, rows.shape[0], lora_A.shape[1], dropout_p)
    dx = dy.new_empty(0)
    dS, dA, dB, dbias = _adapter_gradients(
        rows, x, S, lora_A, lora_B, scaling, keep, dropout_p, needs
    )
    if needs[0]:
        dx = rows @ weight
        native.lora_expand_(dx, dS, _float32(lora_A), keep_scale(keep, dropout_p), keep)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dA, dB, dbias


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
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    pieces = (*tensors, blocksize, nested_blocksize)
    rows = _rows(x, K)
    keep = _mask(keep, rows.shape[0], K, dropout_p)
    if x.dtype is torch.float16:
        rows = rows.float()
    y, S = native.nf4_linear_forward(
        rows,
        pieces,
        N,
        None if lora_A is None else _float32(lora_A),
        None if lora_B is None else _float32(lora_B),
        scaling,
        keep,
        keep_scale(keep, dropout_p),
        None if bias is None else _float32(bias),
    )
    if x.dtype is torch.float16:
        y = y.half()
    if x.dim() == 2:
        return y, S
    return y.view(*x.shape[:-1], N), S if lora_A is None else S.view(*x.shape[:-1], S.shape[1])


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
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
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = shape
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    pieces = (*tensors, blocksize, nested_blocksize)
    rows = _rows(dy, N)
    keep = _mask(keep, rows.shape[0], K, dropout_p)
    dx = dy.new_empty(0)
    dS, dA, dB, dbias = _adapter_gradients(
        rows, x, S, lora_A, lora_B, scaling, keep, dropout_p, needs
    )
    if needs[0]:
        s = a = None
        if dS is not None and keep is None:
            s, a = dS, _float32(lora_A)
        dense = rows.float() if dy.dtype is torch.float16 else rows
        dx = native.nf4_linear_backward(dense, pieces, K, s, a).to(dy.dtype)
        if dS is not None and keep is not None:
            native.lora_expand_(dx, dS, _float32(lora_A), keep_scale(keep, dropout_p), keep)
        dx = dx.view(*dy.shape[:-1], K)
    return dx, dA, dB, dbias


def supports_dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *args: object) -> str | None:
    """Reason against dora_norm: float64 and integer factors."""
    return supports_dense(lora_A) or supports_dense(lora_B) or supports_dense(weight)


def supports_nf4_dora_norm(packed: Tensor, *args: object) -> str | None:
    """Reason against nf4_dora_norm."""
    dtype, lora_A, lora_B = args[7:10]
    if dtype not in native.DTYPE_CODES:
        return f"the dtype is {dtype}"
    return supports_dense(lora_A) or supports_dense(lora_B)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return native.dora_norm(weight.contiguous(), _float32(lora_A), _float32(lora_B) * scaling)


def nf4_dora_norm(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
    pieces = (*tensors, blocksize, nested_blocksize)
    return native.nf4_dora_norm(pieces, shape, dtype, _float32(lora_A), _float32(lora_B) * scaling)


def _adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """scaling * dy @ lora_B where dx or dA needs it, dA, dB and dbias."""
    need_dx, need_dA, need_dB, need_dbias = needs
    dS = None
    dA, dB, dbias = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if lora_A is not None and (need_dx or need_dA):
        dS = native.lora_shrink(dy, _float32(lora_B.t()), scale=scaling)
    if lora_A is not None and need_dA:
        rows = _rows(x, lora_A.shape[1])
        dA = native.lora_outer(dS, rows, keep_scale(keep, dropout_p), keep).to(lora_A.dtype)
    if lora_A is not None and need_dB:
        S = S.reshape(dy.shape[0], lora_B.shape[1])
        dB = native.lora_outer(S, dy, scaling).t().to(lora_B.dtype).contiguous()
    if need_dbias:
        dbias = dy.sum(0)
    return dS, dA, dB, dbias


def supports_low_rank_svd(lora_B: list[Tensor], lora_A: list[Tensor], *args: object) -> str | None:
    """Reason against low_rank_svd: float64 factors deserve better than a float64 Gram matrix."""
    for tensor in (*lora_B, *lora_A):
        if tensor.dtype not in native.DTYPE_CODES:
            return f"the dtype is {tensor.dtype}"
        if not tensor.is_cpu:
            return f"tensors are on {tensor.device}"
    return native.cpu_module()[1]


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lora_B, lora_A = ([factor.contiguous() for factor in side] for side in (lora_B, lora_A))
    k = [min(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    S_at = [0, *itertools.accumulate(k)]
    U_at, Vh_at = [0], [0]
    for i, width in enumerate(k):
        U_at.append(U_at[i] + lora_B[i].shape[0] * width)
        Vh_at.append(Vh_at[i] + lora_A[i].shape[1] * width)
    S = torch.empty(S_at[-1], dtype=torch.float32, device="cpu")
    U, Vh = (native.empty_float32(at[-1] if vectors else 0) for at in (U_at, Vh_at))
    rank, info = (torch.empty(len(k), dtype=torch.int64, device="cpu") for _ in range(2))
    members: dict[int, list[int]] = {}
    for i, A in enumerate(lora_A):
        members.setdefault(A.shape[0], []).append(i)
    for r, where in members.items():
        B, A, factors, starts, widths, U_starts, Vh_starts = (
            [column[i] for i in where] for column in (lora_B, lora_A, scaling, S_at, k, U_at, Vh_at)
        )
        cores, inverse, *rest = native.low_rank_cores(B, A, r, factors, mode == "accurate")
        widths = torch.tensor(widths, device="cpu")
        sigma, left, right, rank_r, info_r = _core_svd(cores, *rest, widths, vectors)
        rank[where], info[where] = rank_r, info_r
        columns = torch.arange(r, device="cpu")
        inside = columns < widths[:, None]
        S[(torch.tensor(starts, device="cpu")[:, None] + columns)[inside]] = sigma[inside].float()
        if vectors:
            kept = torch.where(info_r == -1, -1, rank_r)
            native.low_rank_rotate(B, A, r, inverse, left, right, kept, U, U_starts, Vh, Vh_starts)
    return U, S, Vh, rank, info


def _core_svd(
    cores: Tensor, scale: Tensor, floor: Tensor, info: Tensor, widths: Tensor, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Singular values of the updates themselves [L, r], vectors of the cores, rank and info."""
    r = cores.shape[1]
    if r <= JACOBI_RANK:
        sigma, left, right, more = native.jacobi_svd(cores, JACOBI_SWEEPS, vectors)
        info = torch.where(info < 0, info, more)
    else:
        sigma, left, right = _lapack_svd(cores, vectors)
    rank = torch.minimum((sigma > floor[:, None]).sum(1), widths)
    kept = torch.arange(r, device="cpu") < rank[:, None]
    sigma = torch.where(kept, sigma * scale[:, None], 0.0)
    outside = unrepresentable(sigma, kept, torch.float32)
    sigma[info < 0] = math.nan
    return sigma, left, right, rank, torch.where(outside & (info == 0), -2, info)


def _lapack_svd(cores: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `native.jacobi_svd` gives, for ranks where LAPACK's bidiagonal SVD is faster."""
    if not vectors:
        return torch.linalg.svdvals(cores), None, None
    left, sigma, right = torch.linalg.svd(cores)
    top = left.gather(1, left.abs().argmax(1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(left.dtype)
    return sigma, (left * sign).contiguous(), (right.mT * sign).contiguous()


def _mask(keep: Tensor | None, rows: int, columns: int, dropout_p: float) -> Tensor | None:
    """The mask row by row: it has the strides that x had, or is a seed yet."""
    if keep is None or keep.dtype is torch.bool:
        return None if keep is None else keep.contiguous()
    return philox_keep(keep, rows, columns, dropout_p)


def _float32(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _rows(x: Tensor, columns: int) -> Tensor:
    """x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()


def supports_adalora_importance(
    exp_avg_ipt: Tensor, exp_avg_unc: Tensor, params: list[Tensor], *args: object
) -> str | None:
    """Reason against adalora_importance_: the dtype of the EMAs, several of the rest."""
    if exp_avg_ipt.dtype is not torch.float32:
        return f"the EMAs are {exp_avg_ipt.dtype}"
    return _supports_list([*params, *(grad for grad in args[0] if grad is not None)])


def supports_adalora_allocate(scores: Tensor, lora_E: list[Tensor], *args: object) -> str | None:
    """Reason against adalora_allocate_."""
    if scores.dtype is not torch.float32:
        return f"scores are {scores.dtype}"
    return _supports_list(lora_E)


def supports_adalora_orthogonality_forward(
    lora_A: list[Tensor], lora_B: list[Tensor], *args: object
) -> str | None:
    """Reason against adalora_orthogonality_forward."""
    return _supports_list([*lora_A, *lora_B])


def supports_adalora_orthogonality_backward(
    dloss: Tensor, residual: Tensor, factors: Tensor, lora_A: list[Tensor], lora_B: list[Tensor]
) -> str | None:
    """Reason against adalora_orthogonality_backward."""
    return _supports_list([*lora_A, *lora_B])


def _contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _supports_list(tensors: list[Tensor]) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"tensors are {', '.join(sorted(map(str, dtypes)))}"
    if {tensor.is_cpu for tensor in tensors} != {True}:
        return f"tensors are on {tensors[0].device}"
    return supports_dense(tensors[0])


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    params, grads = _contiguous(params), _contiguous(grads)
    return native.adalora_importance_(exp_avg_ipt, exp_avg_unc, params, grads, beta1, beta2)


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    return native.adalora_allocate_(scores.contiguous(), lora_E, budget, threshold_ties)


def adalora_orthogonality_forward(
    lora_A: list[Tensor], lora_B: list[Tensor], squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = _contiguous(lora_A), _contiguous(lora_B)
    residual, norms = native.adalora_gram(lora_A, lora_B)
    n = len(norms)
    if squared:
        factors = [4 / n] * n
    else:
        norms = [math.sqrt(square) for square in norms]
        factors = [2 / (n * norm) if norm > 0 else 0.0 for norm in norms]
    return torch.tensor(math.fsum(norms) / n), residual, torch.tensor(factors)


def adalora_orthogonality_backward(
    dloss: Tensor,
    residual: Tensor,
    factors: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> list[Tensor]:
    lora_A, lora_B = _contiguous(lora_A), _contiguous(lora_B)
    scale = float(dloss)
    return native.adalora_gram_backward(
        residual, [scale * factor for factor in factors.tolist()], lora_A, lora_B
    )


def supports_rosa(first: Tensor, x: Tensor, *args: object) -> str | None:
    """Reason against rosa_sddmm (dy, x) and rosa_spmm_ (y, x)."""
    return _supports_list([first, x])


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    N, K = crow.numel() - 1, x.shape[-1]
    return native.rosa_sddmm(_rows(dy, N), _rows(x, K), crow.contiguous(), col.contiguous())


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    rows = _rows(y, crow.numel() - 1)  # a view of y unless its layout forbids
    order = None if order is None else order.contiguous()
    native.rosa_spmm_(
        rows, _rows(x, x.shape[-1]), _float32(values), crow.contiguous(), col.contiguous(), order
    )
    if not y.is_contiguous():
        y.copy_(rows.view(y.shape))
