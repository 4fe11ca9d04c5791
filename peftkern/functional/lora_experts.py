"""Mixture of experts with low-rank updates: two grouped layers, the gate between, routed.

    u = x[rows] @ (W_up[e] + scaling * B_up[e] @ A_up[e]).T + b_up[e]
    a = gate(u) * routing weight of the row
    y[t] = sum over the rows of token t of a @ (W_down[e] + scaling * B_down[e] @ A_down[e]).T

The last layer is linear, so the routing weights multiply its narrower input. For backward x, u and
the two S are kept: no tensor of a row per pair and the model's width, none of the stack's size;
what a kernel has collected of few experts' lora_B, too. The gate is computed again; `swiglu` with
its weights and gradients by kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends import ops
from peftkern.formats.nf4 import NF4Weight
from peftkern.functional.arguments import check_float, check_tensor, mismatch
from peftkern.functional.autograd import (
    batchable,
    forced_backend,
    partial_gradients,
    save_for_backward,
    saved_tensors,
    use_backend,
    wanted,
)
from peftkern.functional.grouped_linear import (
    GroupedLinear,
    backward_op,
    checked,
    forward_op,
    route_weights,
    stored_as,
)

__all__ = ["ExpertLinear", "lora_experts", "swiglu"]
Gate = Callable[[Tensor], Tensor]
_GATE_BYTES = 1 << 19  # of the rows of u whose gradient is computed together on a CPU


class ExpertLinear(NamedTuple):
    """One linear layer of every expert: arguments of `grouped_lora_linear`."""

    weight: Tensor | NF4Weight
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None


class _Options(NamedTuple):
    gate: Gate
    fused: bool  # the gate, its weights and its gradients are ops
    up: tuple[Any, ...]  # transposed, scaling, needs and layout, as `forward_op` takes them
    down: tuple[Any, ...]
    tensors: int  # of the weight of up; the rest are those of down
    dtype: torch.dtype  # of the input of down, which autocast may give another one than up's


def swiglu(u: Tensor) -> Tensor:
    """Compute silu(u[..., :I]) * u[..., I:], the gate of most models."""
    gate, up = u.chunk(2, dim=-1)
    return F.silu(gate) * up


def lora_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    *,
    gate: Gate = swiglu,
    transposed: bool = False,
) -> Tensor:
    """Apply a mixture of experts with a low-rank update of each of its two layers.

    y[t] = sum over j of w[t, j] * down_e(gate(up_e(hidden[t]))), e = top_k_index[t, j],
    up_e(x) = x @ up.weight[e].T + up.scaling * (x @ up.lora_A[e].T) @ up.lora_B[e].T + up.bias[e]

    Args: hidden [T, K]; top_k_index int32|int64 [T, top], where ids from E on (other ranks') add
        nothing; top_k_weights [T, top] of any float dtype; up, with weights [E, 2I, K] (or [E, I,
        K] where a gate has one half), and down, with weights [E, K, I], as `grouped_lora_linear`
        takes them, both [E, in, out] if transposed; gate, a differentiable function from [R, 2I] to
        [R, I], row by row, with no parameters that are trained, called again in backward. Under
        autocast the dtype of dense weights decides, as in transformers' grouped_mm.
    Returns: [T, K], dtype of hidden; each row's sum over its experts is rounded once.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch or an id below 0.
    Gradients: hidden, top_k_weights, the factors and biases; twice differentiable.
        Error bound: kernels/NUMERICS.md#grouped_linear
    Source: Hu et al. 2021, arXiv:2106.09685, in each expert; PEFT's `target_parameters`
    """
    check_float("hidden", hidden)
    if hidden.dim() != 2:
        raise mismatch("hidden", "[T, K]", hidden)
    check_tensor("top_k_index", top_k_index)
    check_float("top_k_weights", top_k_weights)
    for name, one in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if one.device != hidden.device:
            raise mismatch(name, f"[{len(hidden)}, top] on {hidden.device} like hidden", one)
    for name, linear in (("up", up), ("down", down)):
        if type(linear) is not ExpertLinear or not hasattr(linear.weight, "shape"):
            raise mismatch(name, "an ExpertLinear with a weight", linear)
    if not callable(gate):
        raise mismatch("gate", "a function", gate)
    if top_k_weights.shape != top_k_index.shape or len(top_k_weights) != len(hidden):
        raise mismatch("top_k_weights", f"[{len(hidden)}, top] like top_k_index", top_k_weights)
    routing, w = route_weights(top_k_index, top_k_weights.detach(), up.weight.shape[0])
    rows, offsets, _ = routing
    x, A1, B1, b1, s1 = checked(hidden, rows, offsets, *up[:3], up.bias, up.scaling, transposed)
    middle = x.new_empty(0, down.weight.shape[1 if transposed else 2])
    middle, A2, B2, b2, s2 = checked(
        middle, None, offsets, *down[:3], down.bias, down.scaling, transposed
    )
    args = (x, top_k_weights, A1, B1, b1, A2, B2)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in args]
    need_rows = any(needs[:5])
    (up_tensors, up_layout), (down_tensors, down_layout) = (
        stored_as(up.weight),
        stored_as(down.weight),
    )
    fused = gate is swiglu and x.is_cpu and middle.dtype is x.dtype
    options = _Options(
        gate,
        fused and not torch.compiler.is_compiling(),  # where torch fuses the steps of any gate
        (transposed, s1, (needs[0], *needs[2:5]), up_layout),
        (transposed, s2, (need_rows, *needs[5:], False), down_layout),
        len(up_tensors),
        middle.dtype,
    )
    added = None if b2 is None else _routed_bias(top_k_index, top_k_weights, b2)
    weights = (*up_tensors, *down_tensors)
    if not any(needs) and (added is None or not added.requires_grad):
        y = _forward(*args, added, w, routing, options, weights)[0]
    elif torch.compiler.is_compiling():  # no graph holds a gate that is differentiated in a node
        y = _as_nodes(*args, added, routing, options, weights)
    else:
        y = LoraExperts.apply(*args, added, w, *routing, options, *weights)
    return y.to(hidden.dtype)


class LoraExperts(torch.autograd.Function):
    """Experts routed, run and combined; `added` [T, K] goes into each token's sum.

    w [R] are the routing weights by row, through which no gradient flows.
    """

    @staticmethod
    def forward(
        ctx, x, weights, A1, B1, b1, A2, B2, added, w, rows, offsets, inverse, options, *tensors
    ):
        routing = (rows, offsets, inverse)
        args = (x, weights, A1, B1, b1, A2, B2, added, w, routing, options, tensors)
        left: tuple[list[Tensor], list[Tensor]] = ([], [])
        y, u, S1, S2 = _forward(*args, left)
        _, need_A1, need_B1, _ = options.up[2]
        read = (x if need_A1 else None, weights, A1, B1, b1, A2, B2, w, *routing)
        made = (u, S1 if need_B1 else None, S2 if options.down[2][2] else None)
        kept = (one[0] if one else None for one in left)
        save_for_backward(ctx, (*read, *made, *kept), tensors)
        ctx.options, ctx.added = options, None if added is None else added.dtype
        ctx.backend = None if x.is_cpu else forced_backend()
        return y

    @staticmethod
    @batchable
    def backward(ctx, dy):
        saved = saved_tensors(ctx)
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(ctx, saved, dy)
        else:
            with use_backend(ctx.backend):
                grads = _gradients(ctx, saved, dy)
        dadded = None if ctx.added is None else dy.to(ctx.added)
        return *grads, dadded, *[None] * (len(ctx.needs_input_grad) - 8)


def _forward(
    x: Tensor,
    weights: Tensor,
    A1: Tensor | None,
    B1: Tensor | None,
    b1: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    added: Tensor | None,
    w: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    options: _Options,
    tensors: tuple[Tensor, ...],
    left: tuple[list[Tensor] | None, list[Tensor] | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute y, and what backward reads: u, the two S and what the ops left."""
    (rows, offsets, inverse), n = routing, options.tensors
    u, S1 = forward_op(x, rows, offsets, tensors[:n], options.up, A1, B1, b1, left[0])
    a = _weighted(u, w, options)
    y, S2 = forward_op(a, None, offsets, tensors[n:], options.down, A2, B2, None, left[1])
    return _combine(y, inverse, added), u, S1, S2


def _in_one_pass(options: _Options) -> bool:
    """Return whether the gate is a kernel's; back ends that are forced and have none take steps."""
    return options.fused and forced_backend() in (None, "cpu", "reference")


def _weighted(u: Tensor, w: Tensor, options: _Options) -> Tensor:
    """Compute the gate times each row's routing weight."""
    if _in_one_pass(options):
        return ops.run("swiglu_forward", u, w)
    return (options.gate(u) * w[:, None]).to(options.dtype)


def _gradients(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, the routing weights, A1, B1, b1, A2 and B2."""
    x, weights, A1, B1, _, A2, B2, w, rows, offsets, inverse, u, S1, S2, *others = saved
    (up_left, down_left), tensors = ([] if t is None else [t] for t in others[:2]), others[2:]
    gate, _, up, down, n, _ = ctx.options
    need_x, need_weights = ctx.needs_input_grad[:2]
    weighted = _weighted(u, w, ctx.options) if down[2][1] else None
    args = (dy.index_select(0, rows), offsets, weighted, None, S2, tensors[n:], down, A2, B2)
    da, dA2, dB2, _ = backward_op(*args, down_left)
    del args, weighted  # of a row per pair, as the rest: each is freed before the next is made
    needs = (any(up[2]), need_weights)
    if _in_one_pass(ctx.options) and any(needs):
        du, by_row = wanted(ops.run("swiglu_backward", da, u, w, *needs), needs)
    else:
        du, by_row = _gate_gradients(gate, u, da, w[:, None], *needs)
    del da
    dweights = by_row[inverse].to(weights.dtype) if need_weights else None
    dx = dA1 = dB1 = db1 = None
    if du is not None:
        args = (du, offsets, x, rows, S1, tensors[:n], up, A1, B1)
        dx, dA1, dB1, db1 = wanted(backward_op(*args, up_left), up[2])
        del args, du
        dx = _combine(dx, inverse) if need_x else None
    return dx, dweights, dA1, dB1, db1, *wanted((dA2, dB2), down[2][1:3])


def _gate_gradients(
    gate: Gate, u: Tensor, da: Tensor, w: Tensor, need_u: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of u and of each row's routing weight; in blocks that fit a CPU's cache
    there, as a gate's gradient holds several tensors of the size of u."""
    step = max(1, len(u))
    on_cpu = u.is_cpu and forced_backend() != "triton"  # a plan of a GPU's step is on a CPU, too
    if on_cpu and not torch.compiler.is_compiling():
        step = max(1, _GATE_BYTES // max(1, u.shape[1] * u.element_size()))
    du = torch.empty_like(u) if need_u else None
    by_row = da.new_empty(len(da), dtype=_wide(da)) if need_weights else None
    for block in (slice(i, i + step) for i in range(0, len(u), step)):
        with torch.enable_grad():
            part = u[block].detach().requires_grad_(need_u)
            a = gate(part)
        if by_row is not None:
            by_row[block] = torch.linalg.vecdot(da[block].to(_wide(da)), a.detach().to(_wide(da)))
        if du is not None:
            (du[block],) = torch.autograd.grad(a, part, (da[block] * w[block]).to(a.dtype))
    return du, by_row


def _differentiable_gradients(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> list[Tensor | None]:
    """Compute the same so that autograd differentiates them once more."""
    x, *differentiable = saved[:7]
    routing = saved[8:11]
    if x is None:
        raise RuntimeError(
            "up.lora_A: expected one that requires a gradient for second derivatives "
            "(create_graph=True), as hidden is saved only then; got a frozen one"
        )

    def experts(*args):
        return _as_nodes(*args, None, routing, ctx.options, saved[16:])

    return partial_gradients(experts, (x, *differentiable), ctx.needs_input_grad[:7], dy)


def _as_nodes(
    x: Tensor,
    weights: Tensor,
    A1: Tensor | None,
    B1: Tensor | None,
    b1: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    added: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    options: _Options,
    tensors: tuple[Tensor, ...],
) -> Tensor:
    """Compute y in steps that autograd differentiates, the gate among them."""
    rows, offsets, inverse = routing
    gate, _, up, down, n, dtype = options
    a = gate(_linear(x, rows, offsets, tensors[:n], up, A1, B1, b1))
    a = (a * _by_row(weights, inverse)[:, None]).to(dtype)
    return _combine(_linear(a, None, offsets, tensors[n:], down, A2, B2, None), inverse, added)


def _linear(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Run a grouped layer as a node of autograd."""
    transposed, scaling, _, layout = options
    needs = [t is not None and t.requires_grad for t in (x, lora_A, lora_B, bias)]
    options = (transposed, scaling, tuple(needs), layout)
    return GroupedLinear.apply(x, lora_A, lora_B, bias, rows, offsets, options, *tensors)


def _routed_bias(index: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Compute the sums of the experts' biases [E, K] over each token's routing weights."""
    E = len(bias)
    wide = torch.promote_types(_wide(weights), _wide(bias))
    mine = torch.where(index < E, weights, 0).to(wide)
    by_expert = mine.new_zeros(len(index), E)
    by_expert = by_expert.scatter_add(1, index.long().clamp(max=E - 1), mine)
    return by_expert @ bias.to(wide)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _by_row(weights: Tensor, inverse: Tensor) -> Tensor:
    """Return the routing weight of each sorted row."""
    flat = weights.reshape(-1)
    return torch.empty_like(flat).index_copy(0, inverse.view(-1), flat)


def _combine(rows: Tensor, inverse: Tensor, added: Tensor | None = None) -> Tensor:
    """Add up each token's rows, and `added`, rounded once: in order, so deterministic."""
    if len(inverse) == 1:  # of one token, in that of the experts: nothing is gathered
        of_tokens = rows[None]
    else:
        of_tokens = rows.index_select(0, inverse.view(-1)).view(*inverse.shape, rows.shape[1])
    if added is None:
        return of_tokens.sum(1)
    return (of_tokens.sum(1, dtype=_wide(rows)) + added).to(rows.dtype)
