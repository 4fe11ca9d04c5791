"""Which tensors and which calls our ops do not express, though torch's own linear does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def unusual_tensor(role: str, tensor: Tensor) -> str | None:
    """Why a tensor has to go through torch's operators; None for a dense one without behavior.

    DTensor and other wrappers, subclasses that follow the results, sparse and nested layouts, and
    what was made in inference mode, which autograd saves for no one.
    """
    kind = type(tensor)
    if kind not in _PLAIN and (
        hasattr(kind, "__tensor_flatten__")
        or kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    ):
        return f"{role} is {kind.__name__}"
    if tensor.layout is not torch.strided:
        return f"{role} is {tensor.layout}"
    if torch.compiler.is_compiling():
        return None
    if tensor.is_inference() and torch.is_grad_enabled():
        return f"{role} was made in inference mode"
    return None


def unusual_call() -> str | None:
    """What else than eager PyTorch or torch.compile runs the call, of which our autograd functions
    know nothing."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transform"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return None
