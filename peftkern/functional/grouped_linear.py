"""Linear layer over groups of rows, each with its own weight and low-rank update."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.backends import kept, ops, reference
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional.arguments import (
    DTYPES,
    autocast_dtype,
    autocast_to,
    check_float,
    check_frozen,
    check_tensor,
    integer,
    mismatch,
    needs_gradient,
    number,
)
from peftkern.functional.autograd import (
    batchable,
    forced_backend,
    save_for_backward,
    saved_tensors,
    use_backend,
    wanted,
)

__all__ = ["Routing", "grouped_lora_linear", "route"]
_INDICES = (torch.int32, torch.int64)


class Routing(NamedTuple):
    """Pairs of token and expert, sorted by expert.

    rows: int32 [T * top], the token of each sorted row; offsets: int32 [E], the ends of the
    experts' rows; inverse: int64 [T, top], the sorted row of each pair.
    """

    rows: Tensor
    offsets: Tensor
    inverse: Tensor


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of token and expert by expert, tokens in order within each: stably.

    Args: top_k_index [T, top] int32|int64, the experts of each token; ids from num_experts on, by
        which expert parallelism marks the rows of other ranks, come last and belong to no group.
    Raises: ValueError on another shape or dtype; on a CPU on a negative id, elsewhere the device
        asserts it.
    Gradients: none.
    """
    return route_weights(top_k_index, None, num_experts)[0]


def route_weights(
    top_k_index: Tensor, top_k_weights: Tensor | None, num_experts: int
) -> tuple[Routing, Tensor]:
    """Sort as `route` does, and the weights [T, top] of the pairs: returns these by row."""
    check_tensor("top_k_index", top_k_index)
    if top_k_index.dim() != 2:
        raise mismatch("top_k_index", "[T, top]", top_k_index)
    if top_k_index.dtype not in _INDICES:
        raise mismatch("top_k_index", f"one of {_INDICES}", top_k_index)
    args = top_k_index, top_k_weights, integer("num_experts", num_experts, 1)
    *routing, row_weights = (
        ops.run("route", *args) if _sorts(top_k_index) else reference.route(*args)
    )
    return Routing(*routing), row_weights


def _sorts(index: Tensor) -> bool:
    """Return whether the op sorts; in graphs torch's own operations do, and on GPUs."""
    if torch.compiler.is_compiling() or not index.is_cpu:
        return False
    return forced_backend() in (None, "cpu", "reference")


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    transposed: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """Apply to each group of rows a linear layer with a low-rank update of its own.

    y = x @ weight[e].T + scaling * (x @ lora_A[e].T) @ lora_B[e].T + bias[e]

    e is the group of a row of y: row i belongs to the e with offsets[e-1] <= i < offsets[e], and to
    none, where y is 0, from offsets[-1] on. It reads x[rows[i]], or x[i] without `rows`.

    Args: x [T, K] float16|bfloat16|float32|float64; weight [E, N, K] in the dtype of x, or
        [E, K, N] if transposed, dense or NF4, frozen, of one matrix if all groups share it, or None
        for the update alone; offsets int32 [E], ascending, the last at most R; lora_A [E, r, K] and
        lora_B [E, N, r], any float dtype, any strides (PEFT keeps lora_B as [N, r, E]); bias [E, N]
        in any float dtype, cast to that of x; rows int32 [R], below T. Under autocast x is cast to
        the dtype of a dense weight, as torch's F.grouped_mm over experts is called, and to that of
        autocast for an NF4 one.
    Returns: [R, N], dtype of x; products accumulate in float32.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch, and on a CPU for
        offsets or rows that leave the tensors.
    Gradients: x, lora_A, lora_B (with their strides, 0 for a group without rows), bias; twice
        differentiable unless lora_A is frozen. x is saved only if lora_A requires a gradient;
        nothing of the size of the stack is made.   Error bound: kernels/NUMERICS.md#grouped_linear
    Source: Hu et al. 2021, arXiv:2106.09685, per expert as PEFT's `target_parameters` defines it
    """
    x, lora_A, lora_B, bias, scaling = checked(
        x, rows, offsets, weight, lora_A, lora_B, bias, scaling, transposed
    )
    needs = needs_gradient(x, lora_A, lora_B, bias)
    tensors, layout = stored_as(weight)
    options = (transposed, scaling, needs, layout)
    if needs is None:
        return forward_op(x, rows, offsets, tensors, options, lora_A, lora_B, bias)[0]
    return GroupedLinear.apply(x, lora_A, lora_B, bias, rows, offsets, options, *tensors)


class GroupedLinear(torch.autograd.Function):
    """y = x[rows] @ weight[e].T + bias[e] + scaling * (x[rows] @ lora_A[e].T) @ lora_B[e].T.

    options: transposed, scaling, needs, layout; a weight is as in `LowRankLinear`.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, rows, offsets, options, *weight):
        y, S = forward_op(x, rows, offsets, weight, options, lora_A, lora_B, bias)
        _, _, needs, layout = ctx.options = options
        need_dx, need_dA, need_dB, _ = needs
        read = (x if need_dA else None, S if need_dB else None, lora_A, lora_B, rows, offsets)
        save_for_backward(ctx, read, weight if need_dx or layout else (None,))
        ctx.tokens = None if rows is None else len(x)
        ctx.backend = None if x.is_cpu else forced_backend()
        return y

    @staticmethod
    @batchable
    def backward(ctx, dy):
        x, S, lora_A, lora_B, rows, offsets, *weight = saved_tensors(ctx)
        needs = ctx.options[2]
        args = (dy, offsets, x, rows, S, weight, ctx.options, lora_A, lora_B)
        if torch.is_grad_enabled():
            dx, *others = _differentiable_gradients(*args)
        else:
            with use_backend(ctx.backend):
                dx, *others = backward_op(*args)
        if needs[0] and ctx.tokens is not None:  # rows of x that several groups read add up
            total = dx.new_zeros((ctx.tokens, dx.shape[1]), dtype=_sum_dtype(dx.dtype))
            dx = total.index_add(0, rows, dx.to(total.dtype)).to(dx.dtype)
        return *wanted((dx, *others), needs), *[None] * (len(ctx.needs_input_grad) - 4)


def forward_op(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Any,
    options: tuple[Any, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    left: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward op of dense or quantized weights: y and S.

    Args: left, an empty list that takes what the backward op can use.
    """
    transposed, scaling, _, layout = options
    args = (transposed, lora_A, lora_B, bias, scaling)
    if layout:
        return _run(left, "nf4_grouped_linear_forward", x, rows, offsets, weight, layout, *args)
    return _run(left, "grouped_linear_forward", x, rows, offsets, *weight, *args)


def backward_op(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    weight: Any,
    options: tuple[Any, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    left: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward op of dense or quantized weights: dx [R, K], dA, dB and dbias."""
    transposed, scaling, needs, layout = options
    args = (transposed, lora_A, lora_B, scaling, needs)
    first = (dy, offsets, x, rows, S)
    if layout:
        return _run(left, "nf4_grouped_linear_backward", *first, weight, layout, *args)
    return _run(left, "grouped_linear_backward", *first, *weight, *args)


def _run(left: list[Tensor] | None, op: str, *args: Any) -> Any:
    return ops.run(op, *args) if left is None else kept.run(left, op, *args)


def _differentiable_gradients(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    weight: Any,
    options: tuple[Any, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run the backward op in torch's own operations, to be differentiated once more.

    Raises: RuntimeError if the gradient of lora_B depends on an x that was not saved.
    """
    transposed, scaling, needs, layout = options
    with torch.autocast(dy.device.type, enabled=False):
        if needs[2] and x is not None:
            shrink = (x, rows, offsets, None, False, lora_A, lora_B, None, 0.0)
            S = reference.grouped_linear_forward(*shrink)[1]
        elif needs[2] and needs[0]:
            raise RuntimeError(
                "lora_A: expected one that requires a gradient for second derivatives "
                "(create_graph=True), as x is saved only then; got a frozen one"
            )
        args = (transposed, lora_A, lora_B, scaling, list(needs))
        if layout:
            plain = reference.nf4_grouped_linear_backward
            return plain(dy, offsets, x, rows, S, weight, layout, *args)
        return reference.grouped_linear_backward(dy, offsets, x, rows, S, *weight, *args)


def stored_as(weight: Tensor | QuantizedWeight | None) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return a weight's tensors and its layout, () for a dense one."""
    if isinstance(weight, QuantizedWeight):
        return weight.tensors, weight.layout
    return (weight,), ()


def checked(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    transposed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """Check the arguments of `grouped_lora_linear`; return those that were cast."""
    check_float("x", x)
    if x.dim() != 2:
        raise mismatch("x", "[T, K]", x)
    for name, index in (("rows", rows), ("offsets", offsets)):
        if index is None and name == "rows":
            continue
        check_tensor(name, index)
        wrong = index.dim() != 1 or index.dtype != torch.int32
        if wrong or index.device != x.device:
            raise mismatch(name, f"an int32 vector on {x.device}", index)
    E = len(offsets)
    if weight is None and (lora_A is None or lora_B is None):
        raise ArgumentError("weight, lora_A, lora_B: expected a weight or two factors, got None")
    if (lora_A is None) != (lora_B is None):
        raise ArgumentError("lora_A, lora_B: expected two tensors or none, got one")
    x, (N, K) = _checked_weight(x, weight, E, lora_A, lora_B, transposed)
    if x.shape[1] != K:
        raise mismatch("x", f"[T, {K}] for weights [{N}, {K}]", x)
    if lora_A is not None:
        _check_group_factors(E, N, K, x.device, lora_A, lora_B)
    if bias is not None:
        check_float("bias", bias)
        if bias.shape != (E, N) or bias.device != x.device:
            raise mismatch("bias", f"[{E}, {N}] on {x.device}", bias)
        bias = bias.to(x.dtype)
    if isinstance(scaling, Tensor):
        raise mismatch("scaling", "a number", scaling)
    return x, lora_A, lora_B, bias, number("scaling", scaling)


def _checked_weight(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    E: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    transposed: bool,
) -> tuple[Tensor, tuple[int, int]]:
    """Return x in the dtype of the products, and (N, K)."""
    dtype = autocast_dtype(x)
    if weight is None:
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            check_float(name, factor)
            if factor.dim() != 3:
                raise mismatch(name, "three dimensions", factor)
        return (x if dtype is None else autocast_to(dtype, x)), (lora_B.shape[1], lora_A.shape[2])
    nf4 = isinstance(weight, QuantizedWeight)
    if not nf4:
        check_frozen(weight)
        if dtype is not None and x.dtype in DTYPES[:3] and weight.dtype in DTYPES[:3]:
            x = x.to(weight.dtype)
    elif dtype is not None:
        x = autocast_to(dtype, x)
    shape = weight.shape
    if len(shape) != 3 or shape[0] not in (1, E) or weight.device != x.device:
        kind = "[E, K, N]" if transposed else "[E, N, K]"
        raise mismatch("weight", f"{kind} with {E} groups on {x.device}", weight)
    if nf4 and (shape[1] * shape[2]) % weight.blocksize:
        raise mismatch(
            "weight", f"matrices of whole blocks of {weight.blocksize} values each", weight
        )
    if not nf4 and weight.dtype is not x.dtype:
        raise mismatch("weight", f"{x.dtype} like x", weight)
    return x, (shape[2], shape[1]) if transposed else (shape[1], shape[2])


def _check_group_factors(
    E: int, N: int, K: int, device: torch.device, lora_A: Any, lora_B: Any
) -> None:
    check_float("lora_A", lora_A)
    check_float("lora_B", lora_B)
    if lora_A.dim() != 3 or (lora_A.shape[0], lora_A.shape[2]) != (E, K) or lora_A.device != device:
        raise mismatch("lora_A", f"[{E}, r, {K}] on {device}", lora_A)
    r = lora_A.shape[1]
    if lora_B.shape != (E, N, r) or lora_B.device != device:
        raise mismatch("lora_B", f"[{E}, {N}, {r}] on {device}", lora_B)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
