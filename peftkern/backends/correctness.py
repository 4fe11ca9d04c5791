"""Checks of a kernel's first results on the user's own tensors, against torch.

The linear ops are judged as the tests judge them: sampled rows of y and dx, and all of dA, dB and
dbias, against the formula in float32 (float64 for float32 tensors); an error may be RATIO times
that of the plain torch operations in the same dtypes, plus a floor and what the order of a sum
makes. Ops that move bits must equal the reference on sampled blocks; small ones are compared with
it whole. Nothing here needs more than CHUNK bytes of scratch beyond one result of the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import grouped_correctness, reference
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.error_rule import (
    compared,
    flat,
    judged,
    mean_square,
    sampled,
    tensors,
    wide_dtype,
)
from peftkern.formats.table import cut

CHUNK = 64 << 20  # bytes
WHOLE = 1 << 22  # values up to which an op is compared whole

Args = tuple[Any, ...]


def wrong(op: str, args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Return what is wrong with the result of an op in words, or None.

    Args: plain, the op on the back end of torch's own operations.
    """
    judge = _JUDGES.get(op)
    if judge is not None:
        return judge(args, got, plain)
    if sum(t.numel() for t in tensors(args)) > WHOLE:
        return None
    return compared(flat(got), flat(plain()))


def _forward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    x, weight, A, B, bias, scaling, keep, p = _forward_arguments(args)
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return None
    y, S = got[0].reshape(rows, -1), got[1]
    plain_y, plain_S = plain()
    at = torch.tensor(sampled(rows), device=x.device)
    wide = wide_dtype(x.dtype)
    x_at = x.reshape(rows, -1)[at].to(wide)
    oracle = _product(x_at, weight, wide, transposed=True)
    if bias is not None:
        oracle += bias.to(wide)
    if A is not None:
        S_at = _dropped(x_at, _mask(keep, at, x, p), p) @ A.to(wide).t()
        oracle.addmm_(S_at, B.to(wide).t(), alpha=scaling)
        S, plain_S = (t.reshape(rows, -1)[at] for t in (S, plain_S))
        reason = judged("S", S, plain_S, S_at, x.dtype, x.shape[-1])
        if reason is not None:
            return reason
    return judged("y", y[at], plain_y.reshape(rows, -1)[at], oracle, x.dtype, x.shape[-1])


def _backward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    dy, x, S, weight, A, B, scaling, keep, p, needs = _backward_arguments(args)
    rows = math.prod(dy.shape[:-1])
    if rows == 0:
        return None
    theirs = plain()
    wide, dy = wide_dtype(dy.dtype), dy.reshape(rows, -1)
    x = x if x is None else x.reshape(rows, -1)
    oracles: dict[str, tuple[Tensor, float]] = {}
    if needs[0]:
        at = torch.tensor(sampled(rows), device=dy.device)
        dy_at = dy[at].to(wide)
        oracle = _product(dy_at, weight, wide, transposed=False)
        if A is not None:
            update = (dy_at @ B.to(wide)) @ A.to(wide) * scaling
            mask = _mask(keep, at, oracle.new_empty(rows, A.shape[1]), p)
            oracle += _dropped(update, mask, p)
        ours, other = (t[0].reshape(rows, -1)[at] for t in (got, theirs))
        reason = judged("dx", ours, other, oracle, dy.dtype, dy.shape[1])
        if reason is not None:
            return reason
    _sum_gradients(oracles, dy, x, S, A, B, scaling, keep, p, needs, wide)
    for index, name in enumerate(("dx", "dA", "dB", "dbias")):
        if name in oracles:
            oracle, typical = oracles[name]
            reason = judged(name, got[index], theirs[index], oracle, dy.dtype, rows, typical)
            if reason is not None:
                return reason
    return None


def _sum_gradients(
    oracles: dict[str, tuple[Tensor, float]],
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    p: float,
    needs: list[bool],
    wide: torch.dtype,
) -> None:
    """Compute dA, dB and dbias, the sums over all rows, and their sizes if nothing cancels."""
    need_dA, need_dB = needs[1] and A is not None, needs[2] and B is not None
    if not (need_dA or need_dB or needs[3]):
        return
    rows, N = dy.shape
    widest = max(N, 0 if x is None else x.shape[1])
    step = max(1, CHUNK // (3 * wide.itemsize * widest))
    totals = {
        "dA": dy.new_zeros(A.shape, dtype=wide) if need_dA else None,
        "dB": dy.new_zeros(B.shape, dtype=wide) if need_dB else None,
        "dbias": dy.new_zeros(N, dtype=wide) if needs[3] else None,
    }
    squares = dict.fromkeys(totals, 0.0)  # of the terms' sizes, as means over rows and columns
    for start in range(0, rows, step):
        at = torch.arange(start, min(start + step, rows), device=dy.device)
        dy_at = dy[at].to(wide)
        if need_dA:
            x_at = _dropped(x[at].to(wide), _mask(keep, at, x, p), p)
            dS_at = (dy_at @ B.to(wide)).mul_(scaling)
            totals["dA"].addmm_(dS_at.t(), x_at)
            squares["dA"] += (mean_square(dS_at) * mean_square(x_at)).sum().item()
        if need_dB:
            S_at = S.reshape(rows, -1)[at].to(wide) * scaling
            totals["dB"].addmm_(dy_at.t(), S_at)
            squares["dB"] += (mean_square(dy_at) * mean_square(S_at)).sum().item()
        if needs[3]:
            totals["dbias"] += dy_at.sum(0)
            squares["dbias"] += mean_square(dy_at).sum().item()
    for name, total in totals.items():
        if total is not None:
            oracles[name] = total, math.sqrt(squares[name])


def _forward_arguments(args: Args) -> Args:
    if isinstance(args[1], (list, tuple)):
        x, w, layout, *rest = args
        return x, (w, layout), *rest
    return args


def _backward_arguments(args: Args) -> Args:
    if isinstance(args[3], (list, tuple)):
        dy, x, S, w, layout, *rest = args
        return dy, x, S, (w, layout), *rest
    return args


def _product(left: Tensor, weight: Any, wide: torch.dtype, *, transposed: bool) -> Tensor:
    """Compute left @ weight.T or left @ weight in `wide`, some rows of the weight at a time."""
    N, K = weight[1][3:] if isinstance(weight, tuple) else weight.shape
    out = left.new_zeros(left.shape[0], N if transposed else K)
    for start, rows in _weight_rows(weight, wide, N, K):
        stop = start + rows.shape[0]
        if transposed:
            out[:, start:stop] = left @ rows.t()
        else:
            out.addmm_(left[:, start:stop], rows)
    return out


def _weight_rows(weight: Any, wide: torch.dtype, N: int, K: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows in `wide`) of a dense or quantized weight."""
    step = max(1, CHUNK // (2 * wide.itemsize * max(K, 1)))
    if not isinstance(weight, tuple):
        for start in range(0, N, step):
            yield start, weight[start : start + step].to(wide)
        return
    stored, layout = reference.unnested(*weight)
    blocksize = layout[1]
    period = blocksize // math.gcd(K, blocksize)  # rows that are whole blocks
    step = -(-step // period) * period
    for start in range(0, N, step):
        stop = min(start + step, N)
        blocks = slice(start * K // blocksize, -(-stop * K // blocksize))
        rows = cut(stored, layout, blocks, (stop - start, K))
        yield start, reference.nf4_dequantize(*rows, torch.float32).to(wide)


def _mask(keep: Tensor | None, at: Tensor, like: Tensor, p: float) -> Tensor | None:
    """Return the dropout mask of some rows of x, stored or drawn again from its seed."""
    if keep is None:
        return None
    if keep.dtype is torch.int64:
        return philox_keep(keep, at, like.shape[-1], p)
    return keep.reshape(-1, like.shape[-1])[at]


def _dropped(values: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return values if mask is None else values * (mask.to(values.dtype) * keep_scale(mask, p))


def _nf4_quantize(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Compare sampled blocks and the rest of one with the reference, bit for bit."""
    weight, blocksize = args
    packed, absmax = got
    flat, blocks = weight.detach().reshape(-1), weight.numel() // blocksize
    at = torch.tensor(sampled(blocks), device=weight.device, dtype=torch.int64)
    whole = blocks * blocksize
    codes, scales = reference.nf4_quantize(flat[:whole].view(blocks, -1)[at], blocksize)
    ours = packed[: whole // 2].view(blocks, -1)[at].reshape(-1)
    rest = [packed[whole // 2 :], absmax[blocks:]]
    right = [codes, scales, *reference.nf4_quantize(flat[whole:], blocksize)]
    return compared([ours, absmax[at], *rest], right)


def _nf4_dequantize(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Compare sampled blocks and the rest of one with the reference, bit for bit."""
    *w, out = args
    value = out if isinstance(out, Tensor) else got
    w, layout = reference.unnested(*w)
    size, flat = layout[1], value.reshape(-1)
    blocks = flat.numel() // size
    at = torch.tensor(sampled(blocks), device=value.device, dtype=torch.int64)
    pieces = (
        (at, flat[: blocks * size].view(blocks, size)[at]),
        (slice(blocks, blocks + 1), flat[blocks * size :].view(1, -1)),
    )
    for which, ours in pieces:
        right = reference.nf4_dequantize(*cut(w, layout, which, ours.shape), value.dtype)
        if not torch.equal(ours.isnan(), right.isnan()):
            return "NaN is not where the format has it"
        if not torch.equal(ours.nan_to_num(), right.nan_to_num()):
            return "values differ from the format's"
    return None


def _low_rank_svd(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Compare norms of singular values, and products with a vector from either side."""
    lora_B, lora_A, scaling, vectors, _ = args
    U, S, Vh, _, info = got
    shapes = [(*B.shape, A.shape[1]) for B, A in zip(lora_B, lora_A, strict=True)]
    k = [min(shape) for shape in shapes]
    values = S.split(k)
    if not vectors:
        return _decompositions(lora_B, lora_A, scaling, None, values, None, info)
    U = U.split([m * width for (m, _, _), width in zip(shapes, k, strict=True)])
    Vh = Vh.split([width * n for (_, _, n), width in zip(shapes, k, strict=True)])
    return _decompositions(lora_B, lora_A, scaling, U, values, Vh, info)


def _low_rank_svd_out(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    lora_B, lora_A, scaling, _, U, S, Vh, _, info = args
    return _decompositions(lora_B, lora_A, scaling, U, S, Vh, info)


def _decompositions(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    scaling: Sequence[float],
    U: Sequence[Tensor] | None,
    S: Sequence[Tensor],
    Vh: Sequence[Tensor] | None,
    info: Tensor,
) -> str | None:
    for index in sampled(len(lora_B)):
        B, A = lora_B[index].double() * scaling[index], lora_A[index].double()
        norm = ((B.t() @ B) * (A @ A.t()).t()).sum().clamp(min=0).sqrt()
        if info[index] or not norm.isfinite():
            continue
        values = S[index].double()
        off = (values.norm() - norm).abs()
        if U is not None and Vh is not None:
            m, n, k = len(B), A.shape[1], len(values)
            right, left = _waves(n, B), _waves(m, B)
            u, v = U[index].double().view(m, k) * values, Vh[index].double().view(k, n)
            off = torch.stack(
                [
                    off,
                    (u @ (v @ right) - B @ (A @ right)).abs().max(),
                    ((left @ u) @ v - (left @ B) @ A).abs().max(),
                ]
            ).max()
        if not off <= 1e-3 * norm:
            return f"the decomposition of pair {index} is {(off / norm).item():.1e} away"
    return None


def _waves(size: int, like: Tensor) -> Tensor:
    """Return a vector of length near 1 with no zeros, drawn from no generator."""
    return torch.arange(1, size + 1, device=like.device, dtype=like.dtype).cos() * size**-0.5


_JUDGES: dict[str, Callable[[Args, Any, Callable[[], Any]], str | None]] = {
    "lora_linear_forward": _forward,
    "lora_linear_backward": _backward,
    "nf4_lora_linear_forward": _forward,
    "nf4_lora_linear_backward": _backward,
    "grouped_linear_forward": grouped_correctness.forward,
    "grouped_linear_backward": grouped_correctness.backward,
    "nf4_grouped_linear_forward": grouped_correctness.forward,
    "nf4_grouped_linear_backward": grouped_correctness.backward,
    "nf4_quantize": _nf4_quantize,
    "nf4_dequantize": _nf4_dequantize,
    "nf4_dequantize_out": _nf4_dequantize,
    "low_rank_svd": _low_rank_svd,
    "low_rank_svd_out": _low_rank_svd_out,
}
