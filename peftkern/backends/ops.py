"""The ops of `torch.ops.peftkern`: schemas, implementations that call dispatch, fakes.

The ops have no autograd of their own (`functional` owns the backward formulas), mutate only what
their schema says, return tensors that are neither inputs nor views, and run with autocast off:
their callers have cast what had to be cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import dispatch
from peftkern.backends.schemas import SCHEMAS, by_name


def _below_autograd_and_autocast() -> torch._C.DispatchKeySet:
    """Return the dispatch keys that kernels run without.

    ADInplaceOrView is where autograd looks for views: what a back end has reshaped is a tensor like
    any other, which users may write to.
    """
    kinds = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(kinds.AutogradFunctionality)
    for name, kind in kinds.__members__.items():
        if name == "ADInplaceOrView" or name.startswith("Autocast"):
            keys = keys | torch._C.DispatchKeySet(kind)
    return keys


_EXCLUDED = _below_autograd_and_autocast()


def _call(op: str, *args: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
        return dispatch.call(op, args)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((int, float, bool))  # a list that begins with one holds no tensors


def run(op: str, *args: Any) -> Any:
    """Call an op, past torch's dispatcher where nothing in it would act on the call.

    Its way from Python to Python costs a call of few tokens a tenth of its time.
    """
    if torch.compiler.is_compiling() or _dispatched(args):
        return _OVERLOADS[op](*args)
    with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
        return dispatch.call(op, args)


def _dispatched(args: Iterable[Any]) -> bool:
    """Return whether torch's dispatcher would do more with a call than pass it on.

    For a mode, a transform, a tracer or the profiler; for a subclass, a tensor without memory, or
    one that is negated or zero by a flag.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    parts: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is tuple or kind is list:
            if arg and type(arg[0]) not in _NUMBERS:
                parts += arg
        elif arg is not None and kind not in _NUMBERS:
            parts.append(arg)
    for part in parts:
        if type(part) in _PLAIN:
            if part.is_meta or part.is_neg() or part._is_zerotensor():
                return True
        elif isinstance(part, Tensor):
            return True
    return False


_library = torch.library.Library("peftkern", "DEF")
for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op, functools.partial(_call, _op), "CompositeExplicitAutograd")


def _fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Register a function of some of an op's operands as its fake."""

    def register(function: Callable[..., Any]) -> None:
        torch.library.register_fake(f"peftkern::{op}", by_name(op, function), lib=_library)

    return register


@_fake("nf4_quantize")
def _(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((numel + blocksize - 1) // blocksize, dtype=torch.float32)


@_fake("nf4_quantize_absmax")
def _(absmax: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = absmax.numel()
    q = absmax.new_empty(n, dtype=torch.uint8)
    return q, absmax.new_empty((n + blocksize - 1) // blocksize)


@_fake("nf4_dequantize")
def _(w: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    return w[0].new_empty(layout[3:], dtype=dtype)


@_fake("nf4_dequantize_out")
def _(out: Tensor) -> None:
    return None


@_fake("lora_linear_forward")
def _(x: Tensor, weight: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, weight.shape, lora_A)


@_fake("lora_linear_backward")
def _(dy: Tensor, lora_A: Tensor, lora_B: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    return _fake_backward(dy, (lora_B.shape[0], lora_A.shape[1]), lora_A, lora_B, needs)


@_fake("nf4_lora_linear_forward")
def _(x: Tensor, layout: list[int], lora_A: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, layout[3:], lora_A)


@_fake("nf4_lora_linear_backward")
def _(
    dy: Tensor, layout: list[int], lora_A: Tensor | None, lora_B: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    return _fake_backward(dy, layout[3:], lora_A, lora_B, needs)


@_fake("route")
def _(top_k_index: Tensor, top_k_weights: Tensor | None, num_experts: int) -> tuple[Tensor, ...]:
    pairs = top_k_index.numel()
    rows = top_k_index.new_empty(pairs, dtype=torch.int32)
    weights = top_k_index.new_empty(0) if top_k_weights is None else top_k_weights
    return (
        *(rows, rows.new_empty(num_experts)),
        top_k_index.new_empty(top_k_index.shape, dtype=torch.int64),
        weights.new_empty(weights.numel()),
    )


@_fake("grouped_linear_forward")
def _(
    x: Tensor,
    rows: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    N = lora_B.shape[1] if weight is None else weight.shape[2 if transposed else 1]
    return _fake_grouped_forward(x, rows, N, lora_A)


@_fake("nf4_grouped_linear_forward")
def _(
    x: Tensor, rows: Tensor | None, layout: list[int], transposed: bool, lora_A: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _fake_grouped_forward(x, rows, layout[5 if transposed else 4], lora_A)


@_fake("grouped_linear_backward")
def _(
    dy: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    K = 0
    if needs[0]:
        K = lora_A.shape[2] if weight is None else weight.shape[1 if transposed else 2]
    return _fake_grouped_backward(dy, offsets, K, lora_A, lora_B, needs)


@_fake("nf4_grouped_linear_backward")
def _(
    dy: Tensor,
    offsets: Tensor,
    layout: list[int],
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    K = layout[4 if transposed else 5]
    return _fake_grouped_backward(dy, offsets, K, lora_A, lora_B, needs)


@_fake("swiglu_forward")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_fake("swiglu_backward")
def _(gate_up: Tensor, need_gate_up: bool, need_weights: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if gate_up.dtype is torch.float64 else torch.float32
    dw = gate_up.new_empty(gate_up.shape[0] if need_weights else 0, dtype=wide)
    return gate_up.new_empty(gate_up.shape if need_gate_up else 0), dw


@_fake("dora_norm")
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return _fake_norm(weight.shape, lora_A, lora_B, weight.dtype)


@_fake("nf4_dora_norm")
def _(layout: list[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return _fake_norm(layout[3:], lora_A, lora_B, dtype)


@_fake("gram_product")
def _(weight: Tensor, x: Tensor, need_z: bool, need_squares: bool) -> tuple[Tensor, ...]:
    return _fake_gram_product(weight.shape, weight.dtype, x, need_z, need_squares)


@_fake("nf4_gram_product")
def _(layout: list[int], x: Tensor, need_z: bool, need_squares: bool) -> tuple[Tensor, ...]:
    return _fake_gram_product(layout[3:], torch.float32, x, need_z, need_squares)


@_fake("adalora_importance_")
def _(exp_avg_ipt: Tensor, params: list[Tensor]) -> Tensor:
    return exp_avg_ipt.new_empty(sum(E.numel() for E in params[::3]))


@_fake("adalora_allocate_")
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@_fake("adalora_orthogonality_forward")
def _(lora_A: list[Tensor], lora_B: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if lora_A[0].dtype is torch.float64 else torch.float32
    size = sum(A.shape[0] ** 2 for A in lora_A) + sum(B.shape[1] ** 2 for B in lora_B)
    sizes = ((), (size,), (len(lora_A) + len(lora_B),))
    return tuple(lora_A[0].new_empty(n, dtype=wide) for n in sizes)


@_fake("adalora_orthogonality_backward")
def _(lora_A: list[Tensor], lora_B: list[Tensor]) -> list[Tensor]:
    return [matrix.new_empty(matrix.shape) for matrix in (*lora_A, *lora_B)]


@_fake("rosa_sddmm")
def _(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    torch._check(dy.shape[:-1] == x.shape[:-1])
    torch._check(dy.shape[-1] == crow.shape[0] - 1)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty(col.shape[0], dtype=dtype)


@_fake("rosa_spmm_")
def _(y: Tensor, x: Tensor, crow: Tensor) -> None:
    torch._check(y.shape[:-1] == x.shape[:-1])
    torch._check(y.shape[-1] == crow.shape[0] - 1)


def _fake_forward(x: Tensor, shape: Any, lora_A: Tensor | None) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[-1] == shape[1])
    S_shape = (0,) if lora_A is None else (*x.shape[:-1], lora_A.shape[0])
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x.new_empty((*x.shape[:-1], shape[0])), x.new_empty(S_shape, dtype=dtype)


def _fake_backward(
    dy: Tensor, shape: Any, lora_A: Tensor | None, lora_B: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(dy.shape[-1] == shape[0])
    need_dx, need_dA, need_dB, need_dbias = needs
    dx = dy.new_empty((*dy.shape[:-1], shape[1]) if need_dx else (0,))
    dA, dB = dy.new_empty(0), dy.new_empty(0)
    if lora_A is not None and need_dA:
        dA = dy.new_empty(lora_A.shape, dtype=lora_A.dtype)
    if lora_B is not None and need_dB:
        dB = dy.new_empty(lora_B.shape, dtype=lora_B.dtype)
    return dx, dA, dB, dy.new_empty(shape[0] if need_dbias else 0)


def _fake_grouped_forward(
    x: Tensor, rows: Tensor | None, N: Any, lora_A: Tensor | None
) -> tuple[Tensor, Tensor]:
    R = (x if rows is None else rows).shape[0]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    S = x.new_empty(0 if lora_A is None else (R, lora_A.shape[1]), dtype=dtype)
    return x.new_empty(R, N), S


def _fake_grouped_backward(
    dy: Tensor,
    offsets: Tensor,
    K: Any,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_dx, need_dA, need_dB, need_dbias = needs
    return (
        dy.new_empty((dy.shape[0], K) if need_dx else 0),
        torch.empty_like(lora_A) if need_dA and lora_A is not None else dy.new_empty(0),
        torch.empty_like(lora_B) if need_dB and lora_B is not None else dy.new_empty(0),
        dy.new_empty((offsets.shape[0], dy.shape[1]) if need_dbias else 0),
    )


def _fake_norm(shape: Any, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(lora_A.shape[1] == shape[1])
    wide = torch.float64 in (dtype, lora_A.dtype, lora_B.dtype)
    return lora_A.new_empty(shape[0], dtype=torch.float64 if wide else torch.float32)


def _fake_gram_product(
    shape: Any, dtype: torch.dtype, x: Tensor, need_z: bool, need_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), (width, columns) = shape, x.shape
    torch._check(columns == n)
    wide = torch.float64 if torch.float64 in (dtype, x.dtype) else torch.float32
    sizes = ((width, m), (width, n) if need_z else 0, m if need_squares else 0)
    return tuple(x.new_empty(size, dtype=wide) for size in sizes)


@_fake("low_rank_svd")
def _(
    lora_B: list[Tensor], lora_A: list[Tensor], vectors: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    U = S = Vh = 0
    for B, A in zip(lora_B, lora_A, strict=True):
        (m, r), n = B.shape, A.shape[1]
        torch._check(A.shape[0] == r)
        k = min(m, r, n)
        U, S, Vh = U + m * k * vectors, S + k, Vh + k * n * vectors
    wide = any(tensor.dtype is torch.float64 for tensor in (*lora_B, *lora_A))
    dtype = torch.float64 if wide else torch.float32
    values = (lora_B[0].new_empty(size, dtype=dtype) for size in (U, S, Vh))
    rank, info = (lora_B[0].new_empty(len(lora_B), dtype=torch.int64) for _ in range(2))
    return *values, rank, info


@_fake("low_rank_svd_out")
def _(rank: Tensor) -> None:
    return None


_OVERLOADS = {op: getattr(torch.ops.peftkern, op).default for op in SCHEMAS}
globals().update(_OVERLOADS)
