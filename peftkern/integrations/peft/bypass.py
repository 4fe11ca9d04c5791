"""Patched layers that nobody calls, for another library's fused kernels read their weights.

Axolotl's `lora_qkv_kernel`, `lora_o_kernel` and `lora_mlp_kernel`, Unsloth's `fast_lora` and what
descends from them put functions on the attention and MLP modules of a model that take the weights
and factors out of its LoRA layers. Those functions are found by what they do. Whatever else may
pass all layers by is noticed in the first forward pass of the model.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from peftkern.backends import counts
from peftkern.integrations.peft.engines import dense_experts
from peftkern.integrations.peft.fallback import PatchedForward

_READER = "get_lora_parameters"  # what all of them call, of each layer: "..._bias" as well


def bypassed(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (layer, the function that reads its weights) for functions on modules of a model."""
    for module in model.modules():
        for value in list(module.__dict__.values()):
            if not isinstance(value, MethodType) or not isinstance(value.__self__, nn.Module):
                continue
            function = inspect.unwrap(value.__func__)
            names = function.__code__.co_names if isinstance(function, FunctionType) else ()
            if any(name.startswith(_READER) for name in names):
                for name, child in value.__self__._modules.items():
                    if name in names and child is not None:
                        yield child, f"{function.__module__}.{function.__qualname__}"


class FirstForward:
    """Forward hook of a patched model that goes with its first forward pass.

    It warns if none of the patched layers was called in that: each would have been counted. It also
    warns if FSDP2 has made experts in 4 bits dense. told: the warning of that which `patch` gave.
    """

    def __init__(self) -> None:
        self.counted, self.told = counts.recorded(), None

    @staticmethod
    def watch(model: nn.Module) -> None:
        """Watch a model, unless it is a layer itself; one that is watched already stays so."""
        if isinstance(model, PatchedForward):
            return
        if not FirstForward.watches(model):
            model.register_forward_hook(FirstForward())
        for hook in model._forward_hooks.values():
            if isinstance(hook, FirstForward):
                hook.told = dense_experts(model)

    @staticmethod
    def watches(model: nn.Module) -> bool:
        """Return True if a model is watched."""
        return any(isinstance(hook, FirstForward) for hook in model._forward_hooks.values())

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Undo `watch`."""
        for key, hook in list(model._forward_hooks.items()):
            if isinstance(hook, FirstForward):
                model._forward_hooks.pop(key, None)

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        FirstForward.forget(model)
        dense = dense_experts(model)
        if dense not in (None, self.told):
            warnings.warn(dense, stacklevel=2)
        if counts.recorded() != self.counted or _compiled_before():
            return
        layers = sum(isinstance(module, PatchedForward) for module in model.modules())
        if layers:
            warnings.warn(
                f"none of the {layers} layers that peftkern has patched was called in a forward "
                "pass of the model: nothing was served. Fused kernels of another library that "
                "read the weights past the layers do this, and so do inputs that take another way",
                stacklevel=2,
            )


def _compiled_before() -> bool:
    """Return whether a graph may hold layers, in which nothing is counted."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and any(dynamo.counters.values())
