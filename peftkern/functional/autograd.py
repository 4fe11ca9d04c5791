"""The autograd function of low-rank updated layers, and the steps that others share with it.

A frozen weight is `(tensors, layout)`: dense ones are `((weight,), ())`, quantized ones what
`peftkern.formats.table` says. A backward pass runs kernels. Under create_graph torch runs it with
gradients enabled, and what kernels compute would be constants to it: then it takes torch's own
operations, which autograd differentiates once more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import dispatch, ops, reference
from peftkern.functional.arguments import autocast_to

Gradients = tuple[Tensor | None, ...]


def batchable(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """Run a backward pass once for each gradient of a batch, where torch gives it a batch.

    So do is_grads_batched of torch.autograd.grad, vectorize=True of jacobian and hessian, and vmap
    over a call of autograd: they have rules for torch's operations, which a pass under create_graph
    takes, and none for kernels.
    """

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> Gradients:
        found = None
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            found = _batch(dy)
        if found is None:
            return backward(ctx, dy)
        rows, batched = found
        count = len(rows)
        some = rows if count else rows.new_zeros(1, *rows.shape[1:])  # of none one tells the shapes
        grads = zip(*(run(ctx, row) for row in some), strict=True)
        return tuple(
            None if each[0] is None else batched(torch.stack(each)[:count]) for each in grads
        )

    return run


def _batch(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Return what vmap has made one tensor of, by rows, and what makes such a tensor of rows."""
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(tensor):
        level = functorch.maybe_get_level(tensor)
        rows, dim = functorch._unwrap_batched(tensor, level)
        return rows.movedim(dim, 0), lambda rows: functorch._add_batch_dim(rows, 0, level)
    if functorch.is_legacy_batchedtensor(tensor):  # of autograd's own vmap
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        rows = torch._remove_batch_dim(tensor, level, 0, 0)
        return rows, lambda rows: torch._add_batch_dim(rows, 0, level)
    return None


class LowRankLinear(torch.autograd.Function):
    """y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias.

    weight: a dense one, or None. options: scaling, dropout_p, needs, the dtype that autocast gives
    the factors, and a quantized weight's tensors and layout. What stands there costs no node of the
    graph and no look of autograd each: factors are cast here, and a quantized weight, which is
    frozen, is kept and not saved, as bitsandbytes does.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, keep, weight, options):
        scaling, dropout_p, needs, dtype, packed, layout = options
        ctx.options = options
        if dtype is not None:
            known = lora_A is not None and not (lora_A.is_inference() or lora_B.is_inference())
            ctx.versions = (lora_A._version, lora_B._version) if known else None
            ctx.factors = lora_A, lora_B
            lora_A, lora_B = autocast_to(dtype, lora_A), autocast_to(dtype, lora_B)
        frozen = packed or (weight,)
        y, S = product(x, frozen, layout, lora_A, lora_B, bias, scaling, keep, dropout_p)
        need_dx, need_dA, need_dB, _ = needs
        read = (
            x if need_dA else None,
            S if need_dB else None,
            keep if need_dx or need_dA else None,
            lora_A,
            lora_B,
        )
        save_for_backward(ctx, read, (weight if need_dx else None,))
        ctx.backend = None if x.is_cpu else forced_backend()
        return y

    @staticmethod
    @batchable
    def backward(ctx, dy):
        x, S, keep, lora_A, lora_B, weight = saved_tensors(ctx)
        scaling, dropout_p, needs, dtype, packed, layout = ctx.options
        frozen = packed or (weight,)
        if torch.is_grad_enabled():
            if dtype is not None:
                now = ctx.versions and tuple(factor._version for factor in ctx.factors)
                if now != ctx.versions:  # autograd's own check, for what it has not saved
                    raise RuntimeError("lora_A, lora_B: modified by an inplace operation")
                lora_A, lora_B = (autocast_to(dtype, factor) for factor in ctx.factors)
            args = (lora_A, lora_B, scaling, keep, dropout_p, needs)
            grads = differentiable_gradients(dy, x, S, dense(frozen, layout, dy.dtype), *args)
        else:
            args = (lora_A, lora_B, scaling, keep, dropout_p, needs)
            with use_backend(ctx.backend):
                grads = gradients(dy, x, S, frozen, layout, *args)
        # Autograd casts each to the dtype of its argument.
        return *wanted(grads, needs), None, None, None


def product(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Run the forward op of a dense or quantized weight: y and S."""
    args = (lora_A, lora_B, bias, scaling, keep, dropout_p)
    if layout:
        return ops.run("nf4_lora_linear_forward", x, weight, layout, *args)
    return ops.run("lora_linear_forward", x, *weight, *args)


def gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Sequence[Tensor | None],
    layout: Sequence[int],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward op of a dense or quantized weight: dx, dA, dB and dbias."""
    if layout:
        return ops.run("nf4_lora_linear_backward", dy, x, S, weight, layout, *options)
    return ops.run("lora_linear_backward", dy, x, S, *weight, *options)


def dense(
    weight: Sequence[Tensor | None], layout: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """Return a weight as a dense tensor in torch's own operations."""
    return reference.nf4_dequantize(weight, layout, dtype) if layout else weight[0]


def wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return None for each gradient that is not needed."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def forced_backend() -> str | None:
    """Return what `use_backend` forces, for a backward pass that torch runs in its own thread."""
    return None if torch.compiler.is_compiling() else dispatch.forced_backend()


_UNFORCED = contextlib.nullcontext()


def use_backend(name: str | None) -> contextlib.AbstractContextManager:
    """Force what the forward pass was forced to; None forces nothing."""
    return _UNFORCED if name is None else dispatch.use_backend(name)


def save_for_backward(
    ctx: Any, tensors: Sequence[Tensor | None], frozen: Sequence[Tensor | None]
) -> None:
    """Save what backward reads, x first and a frozen weight last.

    Its tensors were perhaps made in inference mode. Autograd saves no such tensor, since it could
    not see it change; a frozen weight does not.

    Parameters are saved as they are now: of one whose `data` is replaced before backward, torch's
    own layers read the old, for they save a view of it. Of x, which they save itself, they read the
    new, and so do bitsandbytes' of a 4-bit weight.
    """
    aside, leaves = False, []
    if not torch.compiler.is_compiling():
        saved = list(tensors)
        for i, tensor in enumerate(saved):
            if i and tensor is not None and tensor.requires_grad and tensor.is_leaf:
                leaves.append((i, tensor))
                # DeepSpeed's stage 3 would hold two tensors for a parameter.
                saved[i] = tensor if "ds_id" in tensor.__dict__ else tensor.detach()
        tensors = saved
        for tensor in frozen:
            if tensor is not None and tensor.is_inference():
                aside = True
                break
        if not aside and frozen[0] is not None and frozen[0].is_floating_point():
            frozen = [
                tensor if tensor is None or "ds_id" in tensor.__dict__ else tensor.detach()
                for tensor in frozen
            ]
    ctx.save_for_backward(*tensors, *(() if aside else frozen))
    ctx.aside = tuple(frozen) if aside else ()
    ctx.leaves = leaves


def saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what `save_for_backward` was given; under create_graph the parameters themselves."""
    saved = [*ctx.saved_tensors, *ctx.aside]
    if ctx.leaves and torch.is_grad_enabled():
        for i, leaf in ctx.leaves:
            saved[i] = leaf
    return tuple(saved)


def differentiable_gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Run `lora_linear_backward` in torch's own operations, to be differentiated once more.

    Backward passes take it under create_graph, where they run with gradients enabled. The layer is
    linear in each of x, lora_A, lora_B and bias, so what depends on what stands in the formulas.

    Raises: RuntimeError if the gradient of lora_B depends on an x that was not saved.
    """
    with torch.autocast(dy.device.type, enabled=False):
        if needs[2] and x is not None:
            S = reference.lora_shrink(x, lora_A, keep, dropout_p)
        elif needs[2] and needs[0]:
            raise RuntimeError(
                "lora_A: expected one that requires a gradient for second derivatives "
                "(create_graph=True), as x is saved only then; got a frozen one"
            )
        return reference.lora_linear_backward(
            dy, x, S, weight, lora_A, lora_B, scaling, keep, dropout_p, list(needs)
        )


def partial_gradients(
    function: Callable[..., Tensor],
    arguments: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
) -> list[Tensor | None]:
    """Return gradients of function(*arguments) where needed, differentiable once more."""
    # Each with the others held, though one of them may have been computed from another.
    own = [t.view_as(t) if need else t for t, need in zip(arguments, needs, strict=True)]
    chosen = [t for t, need in zip(own, needs, strict=True) if need]
    if not chosen:
        return [None] * len(own)
    with torch.autocast(dy.device.type, enabled=False):
        grads = iter(torch.autograd.grad(function(*own), chosen, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
