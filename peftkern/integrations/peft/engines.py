"""Layers whose parts are units of an engine: all units are entered, and one op runs inside them.

FSDP and accelerate's offload gather or load a weight when its module is called, and drop it when
the call returns. So each part is called, as PEFT calls it, and its forward is for that call the
next part's: base_layer(x) -> lora_A(x) -> lora_B(x) -> the patched layer, within whose parts every
weight is there then. x goes in and y comes out through each unit, on which an engine hangs what it
does in the backward pass: weights gathered again before y's gradient is used, gradients reduced
when x's is there. The engine puts the weights back into the storage that autograd has saved.

Inside, parts look as they would without the engine, so that what serves or refuses a layer, and
PEFT, need not know of it. Nothing of this stays on a module when the call is over.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from peftkern.functional.arguments import flat_parameter_of
from peftkern.integrations.peft.fallback import Fallback, PatchedForward, kept_forward
from peftkern.layers.expert_stack import dense_now

_FSDP = "torch.distributed.fsdp"
_OF_SHARDS = (" is DTensor", " does not fit the experts")  # of FSDP2, and of pieces of FSDP1
_ITS_MODULES = f"{_FSDP}."
_OF_ACCELERATE = ("forward", "_old_forward", "_hf_hook")
_OF_ENGINES = ("_forward_hooks", "_forward_pre_hooks", *_OF_ACCELERATE)


class Part(NamedTuple):
    """A module that a layer calls: its role in words, and the dict and key where the layer has it.

    Base layers are the first of a layer's parts.
    """

    role: str
    holder: dict[str, Any]
    key: str


class Unit(NamedTuple):
    """A part that an engine looks after.

    leaf: the module with the weight, which may be inside the one that is called. kind: its class
    without the engine. attribute: where calls find its forward. takes: the dtype that inputs are
    cast to, and gives: the one of outputs, None for no cast. device: where the engine computes.
    """

    part: Part
    leaf: nn.Module
    kind: type[nn.Module]
    attribute: str = "forward"
    takes: torch.dtype | None = None
    gives: torch.dtype | None = None
    device: Any = None

    def call(self, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Call the part as PEFT does, with another forward in the place of its own."""
        own, name = self.leaf.__dict__, self.attribute
        before = own.get(name)

        def restore() -> None:
            if before is None:
                own.pop(name, None)
            else:
                own[name] = before

        def once(x: Tensor) -> Tensor:
            restore()
            return forward(x)

        own[name] = once
        try:
            return self.part.holder[self.part.key](x)
        finally:
            restore()


def units_of(parts: Sequence[Part]) -> list[Unit]:
    """Return those parts that an engine gathers or loads when they are called.

    A part with anything else around it, say a hook of the user's, is none: inside the others it is
    refused as it is without an engine.
    """
    found = (_unit(part, part.holder[part.key]) for part in parts)
    return [unit for unit in found if unit is not None]


def served(layer: Any, x: Tensor, units: Sequence[Unit]) -> Tensor | Fallback:
    """Return a layer's output, computed within units; a fallback if they do not agree."""
    if len({str(unit.device) for unit in units if unit.device is not None}) > 1:
        return Fallback("parts are loaded to several devices")
    inside = x.dtype
    for role, takes, gives in ((unit.part.role, unit.takes, unit.gives) for unit in units):
        if role == "base_layer":
            inside = takes or inside
        elif (takes or inside) is not inside or gives not in (None, inside, torch.float32):
            return Fallback(f"mixed precision of {role} is not that of base_layer")
    return _Entry(layer, units).run(x, 0)


def is_sharded(layer: nn.Module, parts: Sequence[Part]) -> bool:
    """Return whether FSDP has a layer, or one of its parts, whose weights are whole in a call."""
    modules = [layer, *(part.holder[part.key] for part in parts)]
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in modules)


def in_a_call(reason: str | None, layer: nn.Module, parts: Sequence[Part] = ()) -> str | None:
    """Return what is left of a reason against a layer when FSDP has made its weights whole."""
    sharded = reason is not None and reason.endswith(_OF_SHARDS)
    return None if sharded and is_sharded(layer, parts) else reason


def is_frozen_view(weight: Tensor, module: nn.Module) -> bool:
    """Return whether a weight has a graph only as FSDP1 views it in a parameter with trained ones.

    FSDP gives no gradient to a parameter that was frozen when it was made a part of another.
    """
    flat = flat_parameter_of(weight)
    infos, params = getattr(flat, "_param_infos", None), getattr(flat, "_params", None)
    return any(
        info.module is module and info.param_name == "weight" and not param.requires_grad
        for info, param in zip(infos or (), params or (), strict=True)
    )


def in_flat_parameters(layer: nn.Module) -> bool:
    """Return whether FSDP1 has a module of a layer, or in this call all of its parameters."""
    fsdp = sys.modules.get(_FSDP)
    if fsdp is None:
        return False
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in layer.modules()):
        return True
    return any(flat_parameter_of(parameter) is not None for parameter in layer.parameters())


def asks_for_fsdp(model: nn.Module) -> bool:
    """Return whether FSDP has a part of this model, or accelerate was told to give it the whole."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        return True
    return _has_units(model)


def dense_experts(model: nn.Module) -> str | None:
    """Return what to warn of if FSDP2 shards stacks of experts, of which its shards are dense."""
    count = sum(len(dense_now(module)) for module in model.modules()) if _has_units(model) else 0
    if not count:
        return None
    said = (
        f"{count} stacks of experts in 4 bits are dense in the shards of FSDP2, and take the "
        "memory of dense ones: leave them whole on every device by ignored_params of fully_shard, "
        "or train under DistributedDataParallel"
    )
    return said


def _has_units(model: nn.Module) -> bool:
    fsdp = sys.modules.get(_FSDP)
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules())


class _Entry:
    """One call of a layer within its units."""

    def __init__(self, layer: Any, units: Sequence[Unit]) -> None:
        self.layer, self.units = layer, units
        self.adapter = int(units[0].part.role == "base_layer")  # the depth of the first unit of one

    def run(self, x: Tensor, depth: int) -> Tensor:
        """Enter the units from this depth on; returns the output in the base's dtype."""
        if depth == len(self.units):
            with bare(self.units):
                y = PatchedForward.forward(self.layer, x)
            self.dtype = y.dtype
            return y
        y = self.units[depth].call(x, lambda x: self.run(x, depth + 1))
        if depth == self.adapter and y.dtype is not self.dtype:  # PEFT casts to what the base gave
            return y.to(self.dtype)
        return y


@contextlib.contextmanager
def bare(units: Sequence[Unit]) -> Iterator[None]:
    """Take the engine off modules for the length of a `with` block, whose weights are there."""
    taken: list[tuple[Unit, nn.Module, type, dict[str, Any]]] = []
    try:
        for unit in units:
            leaf, (_, holder, key) = unit.leaf, unit.part
            own = leaf.__dict__
            kept = {name: own[name] for name in _OF_ENGINES if name in own}
            taken.append((unit, holder[key], type(leaf), kept))
            holder[key] = leaf
            if "_hf_hook" in kept:
                for name in _OF_ACCELERATE:
                    own.pop(name, None)
            own["_forward_hooks"], own["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
            if type(leaf) is not unit.kind:
                object.__setattr__(leaf, "__class__", unit.kind)
        yield
    finally:
        for unit, module, kind, kept in reversed(taken):  # a module may be there twice
            if type(unit.leaf) is not kind:
                object.__setattr__(unit.leaf, "__class__", kind)
            unit.leaf.__dict__.update(kept)
            unit.part.holder[unit.part.key] = module


def _unit(part: Part, module: nn.Module) -> Unit | None:
    """Look at a part; None for one that no engine has, or that more than an engine is around."""
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    if "_hf_hook" in module.__dict__:
        return _offloaded(part, module)
    fsdp = sys.modules.get(_FSDP)
    if "forward" in module.__dict__:
        return None
    if "ds_id" in module.__dict__:
        return Unit(part, module, type(module)) if of_deepspeed(module) else None
    if fsdp is None:
        return None
    if type(module) is fsdp.FullyShardedDataParallel:
        return _flat(part, module)
    if isinstance(module, fsdp.FSDPModule):
        return _fully_sharded(part, module)
    return None


def _offloaded(part: Part, module: nn.Module) -> Unit | None:
    """Return a module whose weights accelerate's hook loads at each call."""
    hook = module._hf_hook
    hooks = hook.hooks if type(hook) is SequentialHook else (hook,)
    if any(type(one) is not AlignDevicesHook for one in hooks) or _hooks(module):
        return None
    loading = [one for one in hooks if one.offload]
    if len(loading) != 1 or kept_forward(module) != "_old_forward":
        return None
    device = loading[0].execution_device
    return Unit(part, module, type(module), "_old_forward", device=device)


def _flat(part: Part, module: nn.Module) -> Unit | None:
    """Return a module inside a unit of FSDP1."""
    leaf, precision = module._modules.get("_fsdp_wrapped_module"), module.mixed_precision
    if leaf is None or _hooks(module) or _hooks(leaf) or "forward" in leaf.__dict__:
        return None
    if leaf._backward_hooks or leaf._backward_pre_hooks:
        return None
    takes = precision.param_dtype if precision.cast_forward_inputs else None
    return Unit(part, leaf, type(leaf), takes=takes)


def _fully_sharded(part: Part, module: nn.Module) -> Unit | None:
    """Return a unit of FSDP2, whose class is made of FSDPModule and the module's own."""
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
    bases = type(module).__bases__
    if policy is None or len(bases) != 2:
        return None
    if not all(hook.__module__.startswith(_ITS_MODULES) for hook in _hooks(module)):
        return None
    takes = policy.param_dtype if policy.cast_forward_inputs else None
    return Unit(part, module, bases[1], takes=takes, gives=policy.output_dtype)


def of_deepspeed(module: nn.Module) -> bool:
    """Return whether all hooks of a module are of DeepSpeed's stage 3, if it has any."""
    own = module.__dict__
    return "ds_id" in own and all(_origin(hook).startswith("deepspeed.") for hook in _hooks(module))


def _hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _origin(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__module__", None) or ""
