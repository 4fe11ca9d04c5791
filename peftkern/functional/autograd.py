"""What the backward passes of autograd functions share: frozen weights, and second derivatives.

A backward pass runs kernels. Under create_graph torch runs it with gradients enabled, and what
kernels compute would be constants to it: then it takes torch's own operations, which autograd
differentiates once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import reference


def save_for_backward(
    ctx: Any, tensors: Sequence[Tensor | None], frozen: Sequence[Tensor | None]
) -> None:
    """Save what backward reads, the tensors of a frozen weight last.

    Those were perhaps made in inference mode. Autograd saves no such tensor, since it could not see
    it change; a frozen weight does not.
    """
    aside = False
    if not torch.compiler.is_compiling():
        for tensor in frozen:
            if tensor is not None and tensor.is_inference():
                aside = True
                break
    ctx.save_for_backward(*tensors, *(() if aside else frozen))
    ctx.aside = tuple(frozen) if aside else ()


def saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """What `save_for_backward` was given."""
    return (*ctx.saved_tensors, *ctx.aside)


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
    """`lora_linear_backward` in torch's own operations, for autograd to differentiate once more.

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
    """Gradients of function(*arguments) where needed, through which autograd can pass again."""
    # Each with the others held, though one of them may have been computed from another.
    own = [t.view_as(t) if need else t for t, need in zip(arguments, needs, strict=True)]
    wanted = [t for t, need in zip(own, needs, strict=True) if need]
    if not wanted:
        return [None] * len(own)
    with torch.autocast(dy.device.type, enabled=False):
        grads = iter(torch.autograd.grad(function(*own), wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
