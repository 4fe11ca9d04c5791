"""Checks of a kernel's first results on the user's own tensors, against torch.

The linear ops are judged as the tests judge them: sampled rows of y and dx, and all of dA, dB and
dbias, against the formula in float32 (float64 for float32 tensors); an error may be RATIO times
that of the plain torch operations in the same dtypes plus a floor. Ops that move bits must equal
the reference on sampled blocks; small ones are compared with it whole. Nothing here needs more than
CHUNK bytes of scratch beyond one result of the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import reference
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors
from peftkern.formats.table import stored

CHUNK = 64 << 20  # bytes
SAMPLED = 32  # rows, or blocks
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
    return _compared(_flat(got), _flat(plain()))


def tensors(args: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors(arg)


def sampled(rows: int) -> list[int]:
    """Return rows to look at: the ends, the edges of tiles, and some drawn without torch's seed."""
    edges = [0, 1, 15, 16, 31, 32, 63, 64, 127, 128]
    last = [rows - 1 - i for i in (0, 1, 2, 7, 15, 16)]
    stride = max(1, rows // (SAMPLED - len(edges) - len(last)))
    spread = range(rows // 7 % stride, rows, stride)
    return sorted({row for row in (*edges, *last, *spread) if 0 <= row < rows})


def _compared(got: list[Tensor], plain: list[Tensor]) -> str | None:
    """Compare whole results with plain ones: integers bit for bit, floats to a rounding."""
    for index, (ours, theirs) in enumerate(zip(got, plain, strict=True)):
        if ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
            return f"result {index} is {_kind(ours)}, expected {_kind(theirs)}"
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"result {index} differs from torch"
        elif not _same_specials(ours, theirs):
            return f"result {index} has NaN or infinity in other places"
        else:
            finite = theirs.isfinite()
            rms, _ = errors(ours[finite], theirs[finite])
            if rms > 100 * FLOOR_RMS[ours.dtype]:
                return f"result {index} is {rms:.1e} away from torch"
    return None


def _linear(name: str, got: Tensor, plain: Tensor, oracle: Tensor, bits: torch.dtype) -> str | None:
    """Judge one result of a linear op by the rule of the tests."""
    if got.dtype is not plain.dtype or got.shape != plain.shape:
        return f"{name} is {_kind(got)}, expected {_kind(plain)}"
    finite = oracle.isfinite() & plain.isfinite()
    if not got[finite].isfinite().all():
        return f"{name} is not finite where torch is"
    (rms, most), (plain_rms, plain_most) = (errors(t[finite], oracle[finite]) for t in (got, plain))
    bound_rms = RATIO * plain_rms + max(FLOOR_RMS[got.dtype], FLOOR_RMS[bits])
    bound_most = RATIO * plain_most + max(FLOOR_MAX[got.dtype], FLOOR_MAX[bits])
    share = max(rms / bound_rms, most / bound_most)
    return None if share <= 1.0 else f"{name} has {share:.3g} times the error allowed"


def _forward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    x, weight, A, B, bias, scaling, keep, p = _forward_arguments(args)
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return None
    y, S = got[0].reshape(rows, -1), got[1]
    plain_y, plain_S = plain()
    at = torch.tensor(sampled(rows), device=x.device)
    wide = _wide(x.dtype)
    x_at = x.reshape(rows, -1)[at].to(wide)
    oracle = _product(x_at, weight, wide, transposed=True)
    if bias is not None:
        oracle += bias.to(wide)
    if A is not None:
        S_at = _dropped(x_at, _mask(keep, at, x, p), p) @ A.to(wide).t()
        oracle.addmm_(S_at, B.to(wide).t(), alpha=scaling)
        S, plain_S = (t.reshape(rows, -1)[at] for t in (S, plain_S))
        reason = _linear("S", S, plain_S, S_at, x.dtype)
        if reason is not None:
            return reason
    return _linear("y", y[at], plain_y.reshape(rows, -1)[at], oracle, x.dtype)


def _backward(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    dy, x, S, weight, A, B, scaling, keep, p, needs = _backward_arguments(args)
    rows = math.prod(dy.shape[:-1])
    if rows == 0:
        return None
    theirs = plain()
    wide, dy = _wide(dy.dtype), dy.reshape(rows, -1)
    x = x if x is None else x.reshape(rows, -1)
    oracles: dict[str, Tensor] = {}
    if needs[0]:
        at = torch.tensor(sampled(rows), device=dy.device)
        dy_at = dy[at].to(wide)
        oracle = _product(dy_at, weight, wide, transposed=False)
        if A is not None:
            update = (dy_at @ B.to(wide)) @ A.to(wide) * scaling
            mask = _mask(keep, at, oracle.new_empty(rows, A.shape[1]), p)
            oracle += _dropped(update, mask, p)
        ours, other = (t[0].reshape(rows, -1)[at] for t in (got, theirs))
        reason = _linear("dx", ours, other, oracle, dy.dtype)
        if reason is not None:
            return reason
    _sum_gradients(oracles, dy, x, S, A, B, scaling, keep, p, needs, wide)
    for index, name in enumerate(("dx", "dA", "dB", "dbias")):
        if name in oracles:
            reason = _linear(name, got[index], theirs[index], oracles[name], dy.dtype)
            if reason is not None:
                return reason
    return None


def _sum_gradients(
    oracles: dict[str, Tensor],
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
    """Compute dA, dB and dbias, the sums over all rows, some rows at a time."""
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
    for start in range(0, rows, step):
        at = torch.arange(start, min(start + step, rows), device=dy.device)
        dy_at = dy[at].to(wide)
        if need_dA:
            x_at = _dropped(x[at].to(wide), _mask(keep, at, x, p), p)
            totals["dA"].addmm_((dy_at @ B.to(wide)).t(), x_at, alpha=scaling)
        if need_dB:
            S_at = S.reshape(rows, -1)[at].to(wide)
            totals["dB"].addmm_(dy_at.t(), S_at, alpha=scaling)
        if needs[3]:
            totals["dbias"] += dy_at.sum(0)
    oracles.update({name: total for name, total in totals.items() if total is not None})


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
    tensors_, layout = weight
    part = stored(tensors_, layout)
    absmax = reference.nf4_absmax(tensors_, layout)
    period = 2 * part.blocksize // math.gcd(K, 2 * part.blocksize)  # rows in whole blocks and bytes
    step = -(-step // period) * period
    for start in range(0, N, step):
        stop = min(start + step, N)
        packed = part.packed[start * K // 2 : (stop * K + 1) // 2]
        scales = absmax[start * K // part.blocksize : -(-stop * K // part.blocksize)]
        plain = [layout[0], part.blocksize, 0, stop - start, K]
        yield start, reference.nf4_dequantize([packed, scales], plain, torch.float32).to(wide)


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
    """Compare sampled blocks with the reference, bit for bit."""
    weight, blocksize = args
    packed, absmax = got
    flat, blocks = weight.detach().reshape(-1), weight.numel() // blocksize
    if blocks == 0:
        return _compared(_flat(got), _flat(plain()))
    at = torch.tensor(sampled(blocks), device=weight.device)
    values = flat[: blocks * blocksize].view(blocks, blocksize)[at]
    codes, scales = reference.nf4_quantize(values, blocksize)
    ours = packed[: blocks * blocksize // 2].view(blocks, -1)[at].reshape(-1)
    return _compared([ours, absmax[at]], [codes, scales])


def _nf4_dequantize(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Compare sampled rows with the reference, bit for bit but for the sign of zero."""
    w, layout, out = args
    value = out if isinstance(out, Tensor) else got
    part = stored(w, layout)
    flat, blocks = value.reshape(-1), value.numel() // part.blocksize
    at = torch.tensor(sampled(blocks), device=value.device)
    absmax = reference.nf4_absmax(w, layout)[at]
    packed = part.packed.view(-1)[: blocks * part.blocksize // 2].view(blocks, -1)[at]
    plain_layout = [layout[0], part.blocksize, 0, len(at), part.blocksize]
    right = reference.nf4_dequantize([packed.reshape(-1), absmax], plain_layout, value.dtype)
    ours = flat[: blocks * part.blocksize].view(blocks, -1)[at]
    return None if torch.equal(ours.nan_to_num(), right.nan_to_num()) else "blocks differ"


def _low_rank_svd(args: Args, got: Any, plain: Callable[[], Any]) -> str | None:
    """Compare singular values, and their sum of squares with the product's Frobenius norm."""
    lora_B, lora_A, scaling, *_ = args
    start, (_, S, _, _, info) = 0, got
    for index, (B, A, s) in enumerate(zip(lora_B, lora_A, scaling, strict=True)):
        k = min(B.shape[0], *A.shape)
        values, start = S[start : start + k].double(), start + k
        if index not in sampled(len(lora_B)) or info[index]:
            continue
        gram = (B.double().t() @ B.double()) @ (A.double() @ A.double().t())
        right = (s * s * gram.diagonal().sum()).clamp(min=0).sqrt()
        if right.isfinite() and not torch.isclose(values.norm(), right, rtol=1e-3, atol=1e-30):
            return f"singular values of pair {index} have norm {values.norm():.6g}, not {right:.6g}"
    return None


_JUDGES: dict[str, Callable[[Args, Any, Callable[[], Any]], str | None]] = {
    "lora_linear_forward": _forward,
    "lora_linear_backward": _backward,
    "nf4_lora_linear_forward": _forward,
    "nf4_lora_linear_backward": _backward,
    "nf4_quantize": _nf4_quantize,
    "nf4_dequantize": _nf4_dequantize,
    "nf4_dequantize_out": _nf4_dequantize,
    "low_rank_svd": _low_rank_svd,
}


def _flat(result: Any) -> list[Tensor]:
    return list(tensors(result if isinstance(result, (tuple, list)) else (result,)))


def _same_specials(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.isfinite(), theirs.isfinite())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
