"""Groups of rows for the Triton kernels, interpreted or compiled, against a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops

F64 = torch.float64
GRADIENTS = ("dx", "dA", "dB", "dbias")
EVERY = (True, True, True, True)
NAN = float("nan")


@dataclass(frozen=True)
class Groups:
    """Operands of one call. `weight` is dense, of an NF4 `w` its values; both may be None."""

    x: Tensor
    rows: Tensor | None
    offsets: Tensor
    weight: Tensor | None
    transposed: bool
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scaling: float
    dy: Tensor
    w: NF4Weight | None = None

    def to(self, dtype: torch.dtype) -> Groups:
        """Change the dtype of everything; a packed weight then is its exact values."""
        floats = {k: v.to(dtype) for k, v in vars(self).items() if _is_float(v)}
        if self.w is not None:
            with peftkern.use_backend("reference"):
                floats["weight"] = peftkern.dequantize_nf4(self.w, dtype)
        return replace(self, **floats)

    def on(self, device: str) -> Groups:
        moved = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, (Tensor, NF4Weight))
        }
        return replace(self, **moved)

    @property
    def end(self) -> int:
        """Rows that belong to a group."""
        return int(self.offsets[-1])


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def peft_factors(groups: int, r: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in PEFT's own layout, where groups of lora_B are the fastest."""
    A = (torch.randn(r * groups, K) / K**0.5).to(dtype)
    B = (torch.randn(N, r * groups) / r**0.5).to(dtype)
    return A.view(groups, r, K), B.view(N, r, groups).permute(2, 0, 1)


def grouped(
    sizes: Sequence[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    past: int = 3,
    rows: bool = True,
    transposed: bool = False,
    nf4: dict | None = None,
    weights: int | None = None,
    bias: bool = True,
) -> Groups:
    """Draw groups of these sizes and `past` rows of NaN past the end; shape is (N, K, r).

    weights: in the stack, one for each group or 1 or 0; nf4: options of quantize_nf4.
    """
    (N, K, r), E = shape, len(sizes)
    R, end = sum(sizes) + past, sum(sizes)
    T = max(1, R // 2) if rows else R
    weights = E if weights is None else weights
    x, dy = torch.randn(T, K).to(dtype), torch.randn(R, N).to(dtype)
    index = torch.randint(T, (R,), dtype=torch.int32) if rows else None
    dy[end:] = NAN
    if rows:
        x = torch.cat((x, x.new_full((1, K), NAN)))  # the row that those past the end read
        index[end:] = T
    else:
        x[end:] = NAN
    weight = torch.randn(weights, *((K, N) if transposed else (N, K))) if weights else None
    w = None
    if nf4 is not None:
        with peftkern.use_backend("reference"):
            w = peftkern.quantize_nf4(weight, **nf4)
            weight = peftkern.dequantize_nf4(w, dtype)
    lora_A, lora_B = peft_factors(E, r, N, K, adapter_dtype) if r else (None, None)
    return Groups(
        x=x,
        rows=index,
        offsets=torch.tensor(sizes).cumsum(0).to(torch.int32),
        weight=None if weight is None else weight.to(dtype),
        transposed=transposed,
        lora_A=lora_A,
        lora_B=lora_B,
        bias=torch.randn(E, N).to(dtype) if bias else None,
        scaling=1.5,
        dy=dy,
        w=w,
    )


def kernels(o: Groups, needs: Sequence[bool] = EVERY, of: Any = ops) -> dict[str, Tensor]:
    """Forward and backward op, or functions `of` a back end, with S between them."""
    packed, adapters = o.w is not None, (o.lora_A, o.lora_B)
    forward, backward = of.grouped_linear_forward, of.grouped_linear_backward
    weight = (o.weight,)
    if packed:
        forward, backward = of.nf4_grouped_linear_forward, of.nf4_grouped_linear_backward
        weight = (o.w.tensors, o.w.layout)
    y, S = forward(o.x, o.rows, o.offsets, *weight, o.transposed, *adapters, o.bias, o.scaling)
    needs = [
        need and (o.lora_A is not None or name not in ("dA", "dB"))
        for name, need in zip(GRADIENTS, needs, strict=True)
    ]
    read = (o.x if needs[1] else None, o.rows, S if needs[2] else None)
    if not packed and not needs[0]:
        weight = (None,)
    grads = backward(o.dy, o.offsets, *read, *weight, o.transposed, *adapters, o.scaling, needs)
    return {"y": y, "S": S, **dict(zip(GRADIENTS, grads, strict=True))}


def loop(o: Groups) -> dict[str, Tensor]:
    """The same by a loop over the groups and autograd; rows past the end are 0."""
    E, end = o.offsets.shape[0], o.end
    x = (o.x if o.rows is None else o.x[o.rows[:end].long()])[:end].detach().requires_grad_()
    leaves = {"dA": o.lora_A, "dB": o.lora_B, "dbias": o.bias}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    bounds = [0, *o.offsets.tolist()]
    parts, products = [], []
    for e in range(E):
        of = x[bounds[e] : bounds[e + 1]]
        y = of.new_zeros((of.shape[0], o.dy.shape[1]))
        if o.weight is not None:
            weight = o.weight[e if o.weight.shape[0] > 1 else 0]
            y = of @ weight if o.transposed else F.linear(of, weight)
        if o.bias is not None:
            y = y + leaves["dbias"][e]
        if o.lora_A is not None:
            S = of.to(o.lora_A.dtype) @ leaves["dA"][e].t()
            y = (y + S @ leaves["dB"][e].t() * o.scaling).to(of.dtype)
            products.append(S)
        parts.append(y)
    y = torch.cat(parts)
    results = dict(
        zip(
            ("dx", *leaves),
            torch.autograd.grad(y, (x, *leaves.values()), o.dy[:end], allow_unused=True),
            strict=True,
        )
    )
    padded = {"y": y.detach(), "dx": results.pop("dx")}
    if products:
        padded["S"] = torch.cat(products).detach()
    past = o.dy.shape[0] - end
    return {**results, **{k: F.pad(v, (0, 0, 0, past)) for k, v in padded.items()}}


def check(o: Groups) -> dict[str, Tensor]:
    """Every result is as accurate as eager torch's loop, dense in its layout, zero past the end."""
    got, eager, oracle = kernels(o), loop(o), loop(o.to(F64))
    for name, exact in oracle.items():
        mine, theirs = got[name], eager[name]
        if name == "S":
            mine, theirs = mine.float(), theirs.float()
        assert_as_accurate_as_torch(mine, theirs, exact)
        if name in ("y", "S", "dx"):
            assert not mine[o.end :].any(), name
    for name, factor in (("dA", o.lora_A), ("dB", o.lora_B)):
        if factor is not None:
            assert got[name].stride() == factor.stride() and got[name].dtype is factor.dtype
            empty = o.offsets.diff(prepend=o.offsets.new_zeros(1)) == 0
            assert not got[name][empty].any()
    return got
