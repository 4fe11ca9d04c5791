"""DoRA: a linear layer with trained row lengths and a low-rank update of their directions.

The products are those of `lora_linear` with their columns scaled, forward and backward. DoRA's own
are the norm of every row, an op that never makes the updated weight, and the lengths' gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends import ops, reference
from peftkern.backends.dropout import keep_scale, philox_keep
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional.arguments import (
    cast_for_autocast,
    check_dense,
    check_factors,
    check_float,
    check_frozen,
    check_linear,
    draw_keep,
    fold_scaling,
    mismatch,
)
from peftkern.functional.autograd import (
    batchable,
    dense,
    forced_backend,
    gradients,
    partial_gradients,
    product,
    save_for_backward,
    saved_tensors,
    use_backend,
    wanted,
)

__all__ = ["dora_linear", "dora_norm"]


def dora_norm(
    weight: Tensor | QuantizedWeight, lora_A: Tensor, lora_B: Tensor, *, scaling: float | Tensor
) -> Tensor:
    """Compute the row norms of a weight plus its update, which is never formed as a whole.

    norm_n = |weight_n + scaling * lora_B_n @ lora_A|

    Args: weight [N, K], dense or NF4 (its values are those of its own dtype); lora_A [r, K] and
        lora_B [N, r], any float dtype; scaling, a number or a 0-dim tensor.
    Returns: [N], float64 if one of them is, else float32, accumulated in it or better.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch.
    Gradients: none.   Error bound: kernels/NUMERICS.md#dora
    Source: Liu et al. 2024, eq. 5, arXiv:2402.09353
    """
    nf4 = isinstance(weight, QuantizedWeight)
    if not nf4:
        check_dense("weight", weight)
        check_float("weight", weight)
    if len(weight.shape) != 2:
        raise mismatch("weight", "shape (N, K)", weight)
    check_factors(*weight.shape, weight.device, lora_A, lora_B)
    with torch.no_grad():
        lora_B, scaling = fold_scaling(lora_B, scaling, lora_B)
        if nf4:
            stored = (weight.tensors, weight.layout, weight.dtype)
            return ops.nf4_dora_norm(*stored, lora_A, lora_B, scaling)
        return ops.dora_norm(weight, lora_A, lora_B, scaling)


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    recompute: bool | None = None,
) -> Tensor:
    """Apply a linear layer with a low-rank update and a trained length per row: DoRA, QDoRA.

    c = magnitude / |weight + scaling * lora_B @ lora_A|, by rows
    y = x @ weight.T + (c - 1) * (d @ weight.T) + c * scaling * (d @ lora_A.T) @ lora_B.T + bias

    with d = dropout(x). Without dropout that is x @ (c * (weight + scaling * lora_B @ lora_A)).T +
    bias: the layer of the paper; with it, PEFT's, in which the frozen part sees x whole.

    Args: x [..., K] float16|bfloat16|float32|float64; weight [N, K], of the dtype of x or NF4,
        frozen; lora_A [r, K], lora_B [N, r] and magnitude [N], any float dtype; scaling, bias and
        dropout_p as in `lora_linear`. Under autocast the products are in its dtype, the norm is
        that of the tensors as they are. recompute: the gradient of magnitude forms d @ weight.T
        once more (True), or a tensor as large as the output is kept for it (False), half of what
        PEFT keeps or less; None: forms it again unless that is known to take longer than PEFT's
        layer does, see `_forms_again`.
    Returns: [..., N], dtype of x.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch, and if weight
        requires a gradient.
    Gradients: x, lora_A, lora_B, magnitude, bias, a tensor scaling; the norm counts as a constant
        (section 4.3); twice differentiable where x is saved. Saved are x, if lora_A or magnitude
        requires a gradient, and d @ lora_A.T, if lora_B or magnitude does.
        Error bound: kernels/NUMERICS.md#dora
    Source: Liu et al. 2024, eq. 5 and 11, arXiv:2402.09353
    """
    check_float("x", x)
    nf4 = isinstance(weight, QuantizedWeight)
    if not nf4:
        check_frozen(weight)
    norm = dora_norm(weight, lora_A, lora_B, scaling=scaling)
    N, K = weight.shape
    frozen, layout = (weight.tensors, weight.layout) if nf4 else ((weight,), ())
    x, cast, lora_A, lora_B, bias = cast_for_autocast(
        x, None if nf4 else weight, lora_A, lora_B, bias
    )
    if nf4:
        if isinstance(bias, Tensor) and bias.is_floating_point():
            bias = bias.to(x.dtype)
    else:
        frozen = (cast,)
        if cast.dtype is not x.dtype:
            raise mismatch("weight", f"[N, K] {x.dtype} on {x.device} like x", cast)
    if norm.device != x.device:
        raise ValueError(f"weight: expected a tensor on {x.device} like x, got {norm.device}")
    check_linear(x, N, K, bias, dropout_p)  # lora_A and lora_B: by dora_norm
    check_float("magnitude", magnitude)
    if magnitude.shape != (N,) or magnitude.device != x.device:
        raise mismatch("magnitude", f"[{N}] on {x.device} for a weight [{N}, {K}]", magnitude)
    norm = norm.to(torch.promote_types(norm.dtype, x.dtype))  # float32 or float64
    lora_B, scaling = fold_scaling(lora_B, scaling, x)
    keep = draw_keep(x, dropout_p)
    leaves = (x, lora_A, lora_B, bias, magnitude)
    args = (*leaves, norm, scaling, keep, dropout_p, layout, *frozen)
    if recompute is None:
        recompute = _forms_again(x, N * K)
    needs = tuple(t is not None and t.requires_grad for t in leaves)
    if torch.is_grad_enabled() and any(needs):
        return _DoRALinear.apply(needs, recompute, *args)
    return _forward(*args)[0]


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, needs, recompute, x, lora_A, lora_B, bias, magnitude, norm, *rest):
        scaling, keep, dropout_p, layout, *frozen = rest
        y, S, u = _forward(x, lora_A, lora_B, bias, magnitude, norm, *rest)
        need_dx, need_dA, need_dB, _, need_dm = needs
        again = need_dm and recompute
        read = (
            x if need_dA or need_dm else None,
            S if need_dB or again or (need_dm and keep is not None) else None,
            keep if need_dx or need_dA or need_dm else None,
            u if need_dm and not recompute else None,
        )
        save_for_backward(ctx, (*read, lora_A, lora_B, magnitude, norm), frozen)
        ctx.options, ctx.layout, ctx.needs = (scaling, keep is not None, dropout_p), layout, needs
        ctx.backend = None if x.is_cpu else forced_backend()
        return y

    @staticmethod
    @batchable
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph
            grads = _differentiable_backward(dy, *saved_tensors(ctx), ctx=ctx)
        else:
            # As its forward pass, whatever autocast is on where backward is called.
            with use_backend(ctx.backend), torch.autocast(dy.device.type, enabled=False):
                grads = _backward(dy, *saved_tensors(ctx), ctx=ctx)
        return None, None, *wanted(grads, ctx.needs), *[None] * (len(ctx.needs_input_grad) - 7)


def _forward(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    layout: tuple[Any, ...],
    *frozen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, d @ lora_A.T, and d @ (weight + scaling * lora_B @ lora_A).T.

    With dropout the third is d @ weight.T without dropout's scale.
    """
    c = magnitude.detach().to(norm.dtype) / norm
    if keep is None:
        u, S = _product(x, frozen, layout, lora_A, lora_B, None, scaling)
        return _scaled(u, c, bias), S, u
    # One product with the columns of the update scaled, and what scaling adds to the frozen part:
    # little, so that rounding it to 16 bits costs nothing.
    scaled_B = lora_B.to(norm.dtype) * c[:, None]
    y, S = _product(x, frozen, layout, lora_A, scaled_B, bias, scaling, keep, dropout_p)
    u, _ = _product(_kept(x, keep, dropout_p), frozen, layout)
    return _scaled(u, (c - 1) * keep_scale(keep, dropout_p), y), S, u


def _backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    u: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    *frozen: Tensor | None,
    ctx: Any,
) -> tuple[Tensor | None, ...]:
    """Compute gradients of x, lora_A, lora_B, bias, magnitude; None, or anything, if not wanted.

    With D = scaling * dy.T @ S: d lora_B = c * D, and d magnitude is the sum over rows of dy times
    the frozen part's product, plus the row sums of lora_B * D, over the norm. That product is
    formed once more: kept, it is as large as the output, and the output itself belongs to the
    caller, who may write to it. The factors' gradients see dy as it came, with c in lora_B, as c
    times dy would be rounded in 16 bits.
    """
    need_dx, need_dA, need_dB, need_dbias, need_dm = ctx.needs
    scaling, dropped, p = ctx.options
    layout, acc = ctx.layout, norm.dtype
    c = magnitude.to(acc) / norm
    whole = u is not None and not dropped  # u has the update's part too
    needs = (False, need_dA, need_dB or (need_dm and not whole), False)
    dx = dA = dB = dbias = dm = D = None
    scaled_B = lora_B.to(acc) * c[:, None]
    if any(needs):
        options = (lora_A, scaled_B, scaling, keep, p, needs)
        _, dA, D, _ = gradients(dy, x, S, frozen, layout, *options)
    if need_dx and dropped:
        q = keep_scale(keep, p)
        inner = _base_gradient(_scaled(dy, (c - 1) * q), frozen, layout)
        inner = inner + (dy.to(acc) @ scaled_B * (scaling * q)) @ lora_A.to(acc)
        dx = (_base_gradient(dy, frozen, layout) + _kept(inner, keep, p)).to(dy.dtype)
    elif need_dx:
        options = (lora_A, lora_B, scaling, None, p, (True, False, False, False))
        dx = gradients(_scaled(dy, c), None, None, frozen, layout, *options)[0]
    if need_dB:
        dB = (D * c[:, None]).to(lora_B.dtype)
    if need_dbias:
        dbias = _column_sums(dy)
    if need_dm:
        if u is None:
            u, _ = _product(_kept(x, keep, p) if dropped else x, frozen, layout)
        dm = _column_sums(dy.to(acc) * u)
        if not whole:
            dm = dm * keep_scale(keep, p) + (lora_B * D).sum(1)
        dm = (dm / norm).to(magnitude.dtype)
    return dx, dA, dB, dbias, dm


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    u: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    *frozen: Tensor | None,
    ctx: Any,
) -> list[Tensor | None]:
    """Run `_backward` in operations that autograd differentiates once more."""
    need_dx, need_dA, need_dB, need_dbias, need_dm = ctx.needs
    scaling, _, p = ctx.options
    acc = norm.dtype
    weight = dense(frozen, ctx.layout, dy.dtype)
    if x is None and need_dB:
        raise RuntimeError(
            "lora_A, magnitude: expected one that requires a gradient for second derivatives "
            "(create_graph=True), as x is saved only then; got frozen ones"
        )
    if x is None:  # the gradient by x alone does not depend on it
        x = dy.new_zeros((*dy.shape[:-1], weight.shape[1]), requires_grad=True)

    def layer(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        d, c = reference.dropped(x, keep, p, acc), magnitude.to(acc) / norm
        y = F.linear(x.to(acc), weight.to(acc)) + (c - 1) * F.linear(d, weight.to(acc))
        return y + c * scaling * F.linear(F.linear(d, lora_A.to(acc)), lora_B.to(acc))

    needs = (need_dx, need_dA, need_dB, need_dm)
    dx, dA, dB, dm = partial_gradients(layer, (x, lora_A, lora_B, magnitude), needs, dy.to(acc))
    return [dx, dA, dB, _column_sums(dy) if need_dbias else None, dm]


def _product(
    x: Tensor,
    frozen: Sequence[Tensor | None],
    layout: tuple[Any, ...],
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Compute the layer without its gradients, or its frozen part alone."""
    if lora_A is None and not layout:
        return F.linear(x, *frozen, bias), None
    return product(x, frozen, layout, lora_A, lora_B, bias, scaling, keep, dropout_p)


def _base_gradient(dy: Tensor, frozen: Sequence[Tensor | None], layout: tuple[Any, ...]) -> Tensor:
    """Compute dy @ weight."""
    if not layout:
        return dy @ frozen[0]
    needs = (True, False, False, False)
    return gradients(dy, None, None, frozen, layout, None, None, 1.0, None, 0.0, needs)[0]


def _scaled(values: Tensor, c: Tensor, plus: Tensor | None = None) -> Tensor:
    """Compute values * c (+ plus) in the dtype of c or better, rounded once to that of values."""
    total = values * c
    if plus is not None:
        total += plus
    return total.to(values.dtype)


def _forms_again(x: Tensor, weights: int) -> bool:
    """Return True if another product with the weight takes less than PEFT's passes for its norms.

    On a CPU PEFT's passes over a weight that caches do not hold take as long as products with some
    1,300 rows in float32, or 6,000 in bfloat16 with AMX (Xeon, one thread, November 2026).
    """
    if not x.is_cpu:
        return True
    rows = x.numel() // max(x.shape[-1], 1)
    return weights >= 1 << 20 and rows <= (512 if x.dtype is torch.float32 else 1024)


def _column_sums(values: Tensor) -> Tensor:
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1]).sum(0)


def _kept(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """Mask x without scaling it: exact in every dtype."""
    if keep.dtype is torch.int64:
        rows = math.prod(x.shape[:-1])
        keep = philox_keep(keep, rows, x.shape[-1], dropout_p).view(x.shape)
    return x * keep
