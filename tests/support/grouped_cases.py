"""Grouped linear layers: inputs, the formula by a loop over groups, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import SUM_RTOL, assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops

# None, one, a few, and both sides of what kernels take at once; then rows of no group.
SIZES = (0, 1, 2, 5, 0, 6, 15, 16, 17, 33, 0)
PAST = 3
GRADIENTS = ("dx", "dA", "dB", "dbias")


@dataclass(frozen=True)
class Grouped:
    """Inputs of one call; `weight` is dense, [E, N, K] or [E, K, N] if transposed, or None."""

    x: Tensor
    rows: Tensor | None
    offsets: Tensor
    weight: Tensor | None
    w: NF4Weight | None
    transposed: bool
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scaling: float = 1.5

    def to(self, dtype: torch.dtype) -> Grouped:
        return self.each(lambda value: value.to(dtype))

    def each(self, change: Callable[[Tensor], Tensor]) -> Grouped:
        """The same with other values or strides of all that is float."""
        names = ("x", "weight", "lora_A", "lora_B", "bias", "dy")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v if v is None else change(v) for k, v in values.items()})

    @property
    def leaves(self) -> dict[str, Tensor]:
        values = {"x": self.x, "A": self.lora_A, "B": self.lora_B, "bias": self.bias}
        return {name: value for name, value in values.items() if value is not None}


def grouped_operands(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    N: int = 48,
    K: int = 64,
    r: int = 4,
    sizes: tuple[int, ...] = SIZES,
    nf4: bool = False,
    transposed: bool = False,
    shared: bool = False,
    through_rows: bool = True,
    adapter: bool = True,
    base: bool = True,
    bias: bool = True,
) -> Grouped:
    """Draw them, lora_B as PEFT keeps it; x has NaN where no row of a group reads it."""
    E, R = len(sizes), sum(sizes) + PAST
    offsets = torch.tensor(sizes).cumsum(0).int()
    T = max(1, R // 2) if through_rows else R
    x = torch.randn(T + through_rows, K).to(dtype)
    rows = torch.randint(T, (R,), dtype=torch.int32) if through_rows else None
    if through_rows:
        rows[R - PAST :] = T
    x[T:] = float("nan")
    if not through_rows:
        x[R - PAST :] = float("nan")
    shape = (1 if shared else E, *((K, N) if transposed else (N, K)))
    weight, w = torch.randn(shape).to(dtype), None
    if nf4:
        w = peftkern.quantize_nf4(torch.randn(shape), blocksize=32, double_quant=N % 2 == 0)
        weight = peftkern.dequantize_nf4(w, dtype)
    B = (torch.randn(N, r * E) / r**0.5).to(adapter_dtype)
    A = (torch.randn(r * E, K) / K**0.5).to(adapter_dtype)
    return Grouped(
        x=x,
        rows=rows,
        offsets=offsets,
        weight=weight if base else None,
        w=w,
        transposed=transposed,
        lora_A=A.view(E, r, K) if adapter else None,
        lora_B=B.view(N, r, E).permute(2, 0, 1) if adapter else None,
        bias=torch.randn(E, N).to(dtype) if bias else None,
        dy=torch.randn(R, N).to(dtype),
    )


def ours(o: Grouped, x: Tensor, A=None, B=None, bias=None) -> Tensor:
    """The public function, on whatever back end serves."""
    weight = o.weight if o.w is None else o.w
    options = {"scaling": o.scaling, "bias": bias, "transposed": o.transposed, "rows": o.rows}
    return peftkern.grouped_lora_linear(x, weight, o.offsets, A, B, **options)


def looped(o: Grouped, x: Tensor, A=None, B=None, bias=None) -> Tensor:
    """Eager torch, group after group, with PEFT's formula in each."""
    R, N = o.dy.shape
    parts, start = [], 0
    for e, stop in enumerate(o.offsets.tolist()):
        at = slice(start, stop) if o.rows is None else o.rows[start:stop]
        x_e, start = x[at], stop
        y = x.new_zeros(len(x_e), N)
        bias_e = None if bias is None else bias[e]
        if o.weight is not None:
            W = o.weight[e if len(o.weight) > 1 else 0]
            y = F.linear(x_e, W.mT if o.transposed else W, bias_e)
        elif bias is not None:
            y = y + bias_e
        if A is not None:
            update = F.linear(F.linear(x_e.to(A.dtype), A[e]), B[e])
            y = (y + update * o.scaling).to(y.dtype)
        parts.append(y)
    return torch.cat([*parts, x.new_zeros(R - start, N)])


def with_gradients(o: Grouped, function) -> dict[str, Tensor]:
    """Output and gradients of function(o, **leaves)."""
    leaves = {name: value.detach().requires_grad_() for name, value in o.leaves.items()}
    y = function(o, **leaves)
    y.backward(o.dy)
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def check(o: Grouped) -> None:
    """Every result is as accurate as eager torch's loop, and rows of no group are zero."""
    got, eager = with_gradients(o, ours), with_gradients(o, looped)
    oracle = with_gradients(o.to(torch.float64), looped)
    assert got["y"][-PAST:].eq(0).all()
    assert got.keys() == oracle.keys()
    for name, value in got.items():
        assert value.dtype is eager[name].dtype, name
        assert_as_accurate_as_torch(value, eager[name], oracle[name])


def check_terms(o: Grouped) -> None:
    """No result misses a term or has one too many: its error is small beside all magnitudes."""
    got, oracle = with_gradients(o, ours), with_gradients(o.to(torch.float64), looped)
    magnitudes = with_gradients(o.to(torch.float64).each(torch.abs), looped)
    for name, value in got.items():
        rtol = max(SUM_RTOL[o.x.dtype], SUM_RTOL[value.dtype])
        wrong = (value.double() - oracle[name]).abs() > rtol * magnitudes[name]
        assert value.isfinite().all() and not wrong.any(), name


def run_ops(o: Grouped, needs: Sequence[bool] = (True,) * 4, of: Any = ops) -> dict[str, Tensor]:
    """Forward and backward op, or functions `of` a back end, with S between them."""
    adapters = (o.lora_A, o.lora_B)
    weight, kind = (o.weight,), "grouped_linear"
    if o.w is not None:
        weight, kind = (o.w.tensors, o.w.layout), "nf4_grouped_linear"
    forward, backward = (getattr(of, f"{kind}_{way}") for way in ("forward", "backward"))
    y, S = forward(o.x, o.rows, o.offsets, *weight, o.transposed, *adapters, o.bias, o.scaling)
    read = (o.x if needs[1] else None, o.rows, S if needs[2] else None)
    if o.w is None and not needs[0]:
        weight = (None,)
    options = (o.transposed, *adapters, o.scaling, list(needs))
    grads = backward(o.dy, o.offsets, *read, *weight, *options)
    return {"y": y, "S": S, **dict(zip(GRADIENTS, grads, strict=True))}
