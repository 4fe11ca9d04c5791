"""Plain-torch oracle of every op, and the back end where no kernel serves.

One function per op with the op's signature. Products accumulate in float32, or in float64 when the
activations are float64, so that the same code run in float64 is the oracle and passes gradcheck.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.dropout import philox_keep
from peftkern.formats.nf4 import ABSMAX_FLOOR, nf4_code, nf4_midpoints

_CHUNK = 1 << 20  # values handled at once: scratch stays near 12 MB whatever the weight's size


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a float32, float16 or bfloat16 tensor of any shape to NF4.

    Returns: packed uint8 [(numel + 1) // 2] and absmax float32 [ceil(numel / blocksize)].
    """
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=flat.device)
    thresholds = torch.tensor(nf4_midpoints(), dtype=torch.float32, device=flat.device)
    for start in range(0, numel, _CHUNK):  # a multiple of every blocksize
        stop = min(start + _CHUNK, numel)
        codes, scale = _quantize_blocks(flat[start:stop].float(), thresholds, blocksize)
        if len(codes) % 2:
            codes = F.pad(codes, (0, 1), value=7)
        packed[start // 2 : (stop + 1) // 2] = codes[::2] << 4 | codes[1::2]
        absmax[start // blocksize : -(-stop // blocksize)] = scale
    return packed, absmax


def nf4_quantize_absmax(
    absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Quantise `absmax - offset` to the nearest of 256 ascending values, in blocks.

    Returns: q uint8 [nblocks] and nested_absmax float32 [ceil(nblocks / blocksize)].
    """
    return _quantize_blocks(absmax - offset, (code[:-1] + code[1:]) / 2, blocksize)


def nf4_absmax(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """The float32 absmax of every block: as it is, or rebuilt from its nested form."""
    if nested_absmax is None:
        return absmax
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return nested_code[absmax.int()] * scale + nested_offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int] | tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild the weight: NF4_CODE[code] * absmax in float32, rounded once to `dtype`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
    nf4_dequantize_out(*pieces, blocksize, nested_blocksize, out)
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
    """`nf4_dequantize` into `out`, which has the shape and the dtype that are wanted."""
    flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    numel = flat.numel()
    scale = nf4_absmax(absmax, nested_absmax, nested_code, nested_offset, nested_blocksize)
    code = nf4_code(packed.device)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        octets = packed[start // 2 : (stop + 1) // 2]
        codes = torch.stack((octets >> 4, octets & 15), dim=1).view(-1)[: stop - start]
        blocks = scale[start // blocksize : -(-stop // blocksize)]
        flat[start:stop] = code[codes.int()] * blocks.repeat_interleave(blocksize)[: stop - start]
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """y = x @ weight.T + bias + scaling * S @ lora_B.T with S = dropout(x) @ lora_A.T.

    Args: x [..., K]; weight [N, K] and bias [N] in the dtype of x; lora_A [r, K], lora_B [N, r] in
        any float dtype, or both None; keep, what dropout keeps: bool [..., K], an int64 [1] seed
        for `dropout.philox_keep`, or None.
    Returns: y [..., N] in the dtype of x, and S [..., r] in the accumulation dtype ([0] without
        adapters).
    """
    rows, acc = math.prod(x.shape[:-1]), _accumulation_dtype(x)
    x2 = x.reshape(rows, x.shape[-1])
    y = F.linear(x2, weight, bias)
    shape = (*x.shape[:-1], weight.shape[0])
    if lora_A is None or lora_B is None:
        return y.view(shape), x.new_empty(0, dtype=acc)
    S = lora_shrink(x, lora_A, keep, dropout_p)
    y = y.to(acc).addmm_(S.reshape(rows, lora_A.shape[0]) * scaling, lora_B.to(acc).t()).to(x.dtype)
    return y.view(shape), S


def lora_shrink(x: Tensor, lora_A: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """S [..., r] = dropout(x) @ lora_A.T in the accumulation dtype; keep as `dropped` takes it."""
    acc = _accumulation_dtype(x)
    return F.linear(dropped(x, keep, dropout_p, acc), lora_A.to(acc))


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear_forward`.

    dS = scaling * dy @ lora_B;  dx = dy @ weight + dropout'(dS @ lora_A);  dA = dS.T @ dropout(x);
    dB = scaling * dy.T @ S;  dbias = sum of dy over its rows.

    Args: dy [..., N]; x is read for dA alone, S for dB alone and weight for dx alone, None where
        that is not wanted; needs: which of dx, dA, dB, dbias are wanted.
    Returns: dx in the dtype of dy, dA and dB in the dtypes of lora_A and lora_B, dbias in the dtype
        of dy; an empty tensor [0] for what is not wanted.
    """
    need_dx, need_dA, need_dB, need_dbias = needs
    rows, acc = math.prod(dy.shape[:-1]), _accumulation_dtype(dy)
    dy2 = dy.reshape(rows, dy.shape[-1])
    has_lora = lora_A is not None and lora_B is not None
    dx, dA, dB, dbias = (dy.new_empty(0) for _ in range(4))
    if has_lora and (need_dx or need_dA):
        dS = (dy2.to(acc) @ lora_B.to(acc)) * scaling
    if need_dx:
        dx = dy2 @ weight
        if has_lora and keep is None:
            dx = dx.to(acc).addmm_(dS, lora_A.to(acc)).to(dy.dtype)
        elif has_lora:
            dx = (dx + dropped(dS @ lora_A.to(acc), keep, dropout_p, acc)).to(dy.dtype)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    if has_lora and need_dA:
        x2 = x.reshape(rows, lora_A.shape[1])
        dA = (dS.t() @ dropped(x2, keep, dropout_p, acc)).to(lora_A.dtype)
    if has_lora and need_dB:
        S2 = S.reshape(rows, lora_B.shape[1])
        dB = (dy2.to(acc).t() @ (S2 * scaling)).to(lora_B.dtype)
    if need_dbias:
        dbias = dy2.sum(0)
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
    shape: list[int] | tuple[int, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_forward` over an NF4 weight, dequantised straight to the dtype of x."""
    pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
    weight = nf4_dequantize(*pieces, blocksize, nested_blocksize, shape, x.dtype)
    return lora_linear_forward(x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p)


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
    shape: list[int] | tuple[int, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lora_linear_backward` over an NF4 weight, dequantised straight to the dtype of dy."""
    weight = None
    if needs[0]:  # only dx reads its values
        pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
        weight = nf4_dequantize(*pieces, blocksize, nested_blocksize, shape, dy.dtype)
    return lora_linear_backward(dy, x, S, weight, lora_A, lora_B, scaling, keep, dropout_p, needs)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Norms [N] of the rows of weight + scaling * lora_B @ lora_A, a block of rows at a time.

    Returns: float64 if the weight or a factor is, else float32, in which it accumulates.
    """
    wide = torch.float64 in (weight.dtype, lora_A.dtype, lora_B.dtype)
    acc = torch.float64 if wide else torch.float32
    A, B = lora_A.to(acc), lora_B.to(acc) * scaling
    norm = weight.new_empty(weight.shape[0], dtype=acc)
    rows = max(1, _CHUNK // max(weight.shape[1], 1))
    for start in range(0, len(norm), rows):
        block = slice(start, start + rows)
        total = torch.addmm(weight[block].to(acc), B[block], A)
        norm[block] = torch.linalg.vector_norm(total, dim=1)
    return norm


def nf4_dora_norm(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int] | tuple[int, ...],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`dora_norm` of an NF4 weight, dequantised to values of `dtype`."""
    pieces = (packed, absmax, nested_absmax, nested_code, nested_offset)
    weight = nf4_dequantize(*pieces, blocksize, nested_blocksize, shape, dtype)
    return dora_norm(weight, lora_A, lora_B, scaling)


def low_rank_svd(
    lora_B: list[Tensor],
    lora_A: list[Tensor],
    scaling: list[float],
    vectors: bool,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Singular values and vectors of scaling * B A through two QR decompositions in float64.

    B = Q_B R_B, A^T = Q_A R_A, and U_c S V_c^T = scaling R_B R_A^T give U = Q_B U_c, V = Q_A V_c.
    Accurate in either mode.

    Args: lists of L pairs lora_B [m, r] and lora_A [r, n], any float dtypes, and their scaling.
    Returns: all U [m, k] one after the other in one flat tensor, all S [k], all Vh [k, n], where
        k = min(m, r, n), float64 if any factor is, else float32; U and Vh are empty unless
        `vectors`; rank and info int64 [L].
    """
    wide = any(tensor.dtype is torch.float64 for tensor in (*lora_B, *lora_A))
    dtype = torch.float64 if wide else torch.float32
    pairs = zip(lora_B, lora_A, scaling, strict=True)
    U, S, Vh, rank, info = zip(*(_low_rank_svd(*pair, dtype) for pair in pairs), strict=True)
    U, S, Vh = (torch.cat([t.reshape(-1).to(dtype) for t in flat]) for flat in (U, S, Vh))
    if not vectors:
        U, Vh = S.new_empty(0), S.new_empty(0)
    return U, S, Vh, torch.stack(rank), torch.stack(info)


def _low_rank_svd(
    lora_B: Tensor, lora_A: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r = lora_B.shape[1]
    B, A = lora_B.double(), lora_A.double()
    finite = torch.isfinite(B).all() & torch.isfinite(A).all() & math.isfinite(scaling)
    B, b, b_top = _unit_columns(torch.where(finite, B, 0.0))
    At, a, a_top = _unit_columns(torch.where(finite, A, 0.0).mT)
    weights = b * a  # the share of column l of B and row l of A
    top = weights.amax() if r else weights.new_zeros(())
    weights = weights / torch.where(top > 0, top, 1.0)
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(At)
    core = math.copysign(1.0, scaling) * (R_B * weights) @ R_A.mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    floor = r * torch.finfo(torch.float64).eps * weights.sum()
    rank = ((floor < S) & (scaling != 0)).sum()
    keep = torch.arange(len(S), device=B.device) < rank
    nan = torch.where(finite, 0.0, math.nan)
    U = torch.where(keep, Q_B @ U, 0.0) + nan
    Vh = torch.where(keep[:, None], Vh @ Q_A.mT, 0.0) + nan
    factor = torch.tensor(abs(scaling) if math.isfinite(scaling) else 0.0, dtype=torch.float64)
    S = torch.where(keep, _product(S, top, b_top, a_top, factor.to(S.device)), 0.0)
    info = -2 * unrepresentable(S, keep, dtype).long()
    return U, S + nan, Vh, rank, torch.where(finite, info, -1)


def unrepresentable(sigma: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether among the singular values [..., k] that `keep` marks are some beyond the normal
    numbers of `dtype`: infinite there, zero, or with fewer digits. Bool [...]."""
    limits, values = torch.finfo(dtype), sigma.to(dtype)
    return (keep & ~((values >= limits.tiny) & (values <= limits.max))).any(-1)


def _product(values: Tensor, *factors: Tensor) -> Tensor:
    """values * factors, where no product over- or underflows unless the result does."""
    exponents = 0
    for factor in factors:
        mantissa, exponent = torch.frexp(factor)
        values, exponents = values * mantissa, exponents + exponent
    # Both halves are float64 numbers. As integers they would make ldexp a power in float32.
    exponents = exponents.clamp(-2000, 2000)
    half = exponents // 2
    return torch.ldexp(torch.ldexp(values, half.double()), (exponents - half).double())


def _unit_columns(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns divided by their norms (zero columns stay), the norms over the matrix's largest
    value, and that value: in parts, as their products may overflow."""
    top = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    scaled = matrix / torch.where(top > 0, top, 1.0)
    columns = scaled.abs().amax(0) if len(matrix) else matrix.new_zeros(matrix.shape[1])
    scaled = scaled / torch.where(columns > 0, columns, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=0)
    return scaled / torch.where(norm > 0, norm, 1.0), norm * columns, top


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def dropped(x: Tensor, keep: Tensor | None, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """x * (keep / (1 - p)), rounded as nn.Dropout does it so that the bits are the same.

    keep: a mask of as many elements as x [..., K], a seed for `philox_keep`, or None.
    """
    x = x.to(dtype)
    if keep is None:
        return x
    if keep.dtype is torch.int64:
        keep = philox_keep(keep, math.prod(x.shape[:-1]), x.shape[-1], dropout_p)
    noise = keep.reshape(x.shape).to(dtype)
    return x * (noise / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0 * noise)


def _quantize_blocks(values: Tensor, thresholds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Nearest codes (uint8) of float32 values scaled by their block's absmax, and the absmax."""
    numel = len(values)
    padded = F.pad(values, (0, -numel % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=ABSMAX_FLOOR)).unsqueeze(1)
    codes = torch.bucketize(scaled.view(-1)[:numel], thresholds, out_int32=True)
    return codes.to(torch.uint8), absmax


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    """AdaLoRA's two EMAs, updated in place, and the score of every triplet.

    params: lora_E [r, 1], lora_A [r, K], lora_B [N, r] of every layer in turn. The EMAs hold the
    same elements in the same order, flat; sums over K and N are taken in their dtype.
    """
    sizes = [p.numel() for p in params]
    scores = []
    for p, g, ipt, unc in zip(
        params, grads, exp_avg_ipt.split(sizes), exp_avg_unc.split(sizes), strict=True
    ):
        if g is None:
            sensitivity = torch.zeros_like(ipt)
        else:
            sensitivity = (p.detach().to(ipt.dtype) * g.to(ipt.dtype)).abs().reshape(-1)
        finite = sensitivity.isfinite()  # elsewhere the EMAs stay, and the score is NaN
        ipt.copy_(torch.where(finite, beta1 * ipt + (1 - beta1) * sensitivity, ipt))
        spread = (1 - beta2) * (sensitivity - ipt).abs()
        unc.copy_(torch.where(finite, beta2 * unc + spread, unc))
        scores.append(torch.where(finite, ipt * unc, torch.nan).view(p.shape))
    triplets = zip(scores[::3], scores[1::3], scores[2::3], strict=True)
    return torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in triplets])


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    """Keep the `budget` best scores, zero what else is in lora_E; nothing waits for the device.

    Returns: the mask of what is kept, bool like scores.
    """
    count = scores.numel()
    keep = torch.ones(count, dtype=torch.bool, device=scores.device)
    if budget < count:
        values, order = scores.sort(descending=True, stable=True)
        keep.scatter_(0, order[budget:], False)
        if threshold_ties:  # scores that are all zero say nothing: they fall to the exact rule
            keep = torch.where(values[0] == 0, keep, ~(scores <= values[budget]))
    with torch.no_grad():
        for E, kept in zip(lora_E, keep.split([E.numel() for E in lora_E]), strict=True):
            E.masked_fill_(~kept.view(E.shape), 0.0)
    return keep


def adalora_orthogonality_forward(
    lora_A: list[Tensor], lora_B: list[Tensor], squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over matrices of |A A^T - I|_F and |B^T B - I|_F, or of their squares.

    Returns: the loss, the residuals (each Gram matrix minus I) one after the other, and the factor
    of each for which d loss / d A = factor * residual @ A, d loss / d B = factor * B @ residual.
    """
    matrices = [*lora_A, *(B.t() for B in lora_B)]
    wide = torch.float64 if matrices[0].dtype is torch.float64 else torch.float32
    residuals: list[Tensor] = [matrices[0]] * len(matrices)
    squares = torch.empty(len(matrices), dtype=wide, device=matrices[0].device)
    for indices in _same_shape(matrices):
        rows = torch.stack([matrices[i].detach().to(wide) for i in indices])
        gram = rows @ rows.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        squares[indices] = gram.square().sum((1, 2))
        for i, residual in zip(indices, gram, strict=True):
            residuals[i] = residual.reshape(-1)
    n = len(matrices)
    if squared:
        return squares.mean(), torch.cat(residuals), torch.full_like(squares, 4 / n)
    norms = squares.sqrt()  # at zero the norm has no gradient; torch takes 0 there
    factors = torch.where(norms > 0, 2 / (n * norms), 0.0)
    return norms.mean(), torch.cat(residuals), factors


def adalora_orthogonality_backward(
    dloss: Tensor,
    residual: Tensor,
    factors: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> list[Tensor]:
    """Gradients of every lora_A, then of every lora_B."""
    matrices = [*lora_A, *(B.t() for B in lora_B)]
    residuals = residual.split([m.shape[0] ** 2 for m in matrices])
    scale = (factors * dloss).unbind()
    grads: list[Tensor] = [dloss] * len(matrices)
    for indices in _same_shape(matrices):
        r = matrices[indices[0]].shape[0]
        rows = torch.stack([matrices[i].detach().to(residual.dtype) for i in indices])
        factor = torch.stack([residuals[i].view(r, r) * scale[i] for i in indices])
        for i, grad in zip(indices, (factor @ rows).to(matrices[0].dtype), strict=True):
            grads[i] = grad if i < len(lora_A) else grad.t().contiguous()
    return grads


def _same_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Indices of the matrices, grouped by shape: one batched product serves a group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(tuple(matrix.shape), []).append(i)
    return list(groups.values())


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """dy.T @ x at the entries of a sparse matrix [N, K] alone.

    Args: dy [..., N] and x [..., K] of one dtype; crow [N + 1] and col [nnz], int32 or int64: the
        columns of row n are col[crow[n] : crow[n + 1]].
    Returns: [nnz] in the accumulation dtype, entries in the order of col.
    Raises: ValueError if an index is out of range.
    """
    N, K = crow.numel() - 1, x.shape[-1]
    _check_sparse(crow, col, K)
    rows, acc = math.prod(x.shape[:-1]), _accumulation_dtype(x)
    dy2, x2 = dy.reshape(rows, N), x.reshape(rows, K)
    values = torch.zeros(col.numel(), dtype=acc, device=x.device)
    row = torch.repeat_interleave(torch.arange(N, device=x.device), crow.diff().long())
    chunk = max(1, _CHUNK // max(rows, 1))
    for start in range(0, col.numel(), chunk):
        at = slice(start, start + chunk)
        products = dy2[:, row[at]].to(acc) * x2[:, col[at].long()].to(acc)
        values[at] = products.sum(0)
    return values


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    """y += x @ S.T in place, S [N, K] being sparse; the product is summed up, then rounded once.

    Args: y [..., N] and x [..., K] of one dtype; crow and col as in `rosa_sddmm`; the value of
        entry j is values[order[j]], values[j] without an order.
    Raises: ValueError if an index is out of range.
    """
    nnz = col.numel()
    _check_sparse(crow, col, x.shape[-1])
    if order is not None:
        _check_range("order", order, nnz)
        values = values[order.long()]
    rows, acc = math.prod(x.shape[:-1]), _accumulation_dtype(x)
    x2, values = x.reshape(rows, x.shape[-1]), values.to(acc)
    starts, lengths = crow.tolist(), crow.diff().long()
    first = 0
    while first < len(starts) - 1:
        last = first + 1  # as many rows of S as make a chunk of products
        while last < len(starts) - 1 and (starts[last + 1] - starts[first]) * rows <= _CHUNK:
            last += 1
        at = slice(starts[first], starts[last])
        if rows and starts[last] > starts[first]:
            products = x2[:, col[at].long()].t().to(acc) * values[at, None]
            sums = torch.segment_reduce(products, "sum", lengths=lengths[first:last], initial=0)
            target = y[..., first:last]
            target.copy_(target.to(acc) + sums.t().reshape(target.shape))
        first = last


def _check_sparse(crow: Tensor, col: Tensor, K: int) -> None:
    if crow[0] != 0 or crow[-1] != col.numel() or (crow.diff() < 0).any():
        raise ValueError("crow: expected to ascend from 0 to the number of entries")
    _check_range("col", col, K)


def _check_range(name: str, index: Tensor, limit: int) -> None:
    if index.numel() and not 0 <= index.min() <= index.max() < limit:
        raise ValueError(f"{name}: an index is out of range, expected 0 to {limit - 1}")
