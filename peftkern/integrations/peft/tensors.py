"""Which tensors and which calls our ops do not express, though torch's own linear does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftkern.formats.nf4 import ArgumentError, TruncatedWeightError

_PLAIN = (Tensor, nn.Parameter)


def unusual_tensor(role: str, tensor: Tensor) -> str | None:
    """Why a tensor has to go through torch's operators; None for a dense one without behavior.

    DTensor and other wrappers, subclasses that follow the results, and sparse layouts.
    """
    kind = type(tensor)
    if kind not in _PLAIN and (
        hasattr(kind, "__tensor_flatten__")
        or kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    ):
        return f"{role} is {kind.__name__}"
    return None if tensor.layout is torch.strided else f"{role} is {tensor.layout}"


def unusual_input(x: Tensor) -> str | None:
    """`unusual_tensor` of activations: also nested ones, and those that autograd does not save."""
    reason = unusual_tensor("input", x)
    if reason is None and x.is_nested:
        return "input is a nested tensor"
    if reason is None and not torch.compiler.is_compiling() and x.is_inference():
        return "input was made in inference mode" if torch.is_grad_enabled() else None
    return reason


def unusual_call() -> str | None:
    """Why the call has to go through torch's operators: a transform that autograd functions with a
    plain backward pass do not take part in."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transform"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return None


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """`module.<name>`, without the time that nn.Module takes to look for it."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def refusal(error: ArgumentError) -> str:
    """Why an argument was refused, in words that are the same for every shape of it.

    Raises: a TruncatedWeightError again, where bitsandbytes would read on.
    """
    if isinstance(error, TruncatedWeightError):
        raise error
    return str(error).partition(", got ")[0]
