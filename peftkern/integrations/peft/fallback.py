"""The forward of every swapped class, and the reasons that they share for a fallback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from peftkern.backends import dispatch
from peftkern.backends.counts import record_eager_fallback
from peftkern.formats.nf4 import ArgumentError, TruncatedWeightError

# What is called around every module of the process, those that an op stands for among them.
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
_PLAIN = (Tensor, nn.Parameter)
_HOOKS = AlignDevicesHook.__module__


class Fallback(NamedTuple):
    """Reason in words for the forward of the original class, as `peftkern.stats()` counts it.

    answer: what gives that forward's result for (layer, *inputs), if it does more than call it.
    """

    reason: str
    answer: Callable[..., Tensor] | None = None


class Outlook(NamedTuple):
    """State of a patched layer as a report tells it, whatever the input.

    reason: for the forward of the original class, None if ours can serve. rows: from which on its
    kernels pay, 0 if from none. key: (op, kind, N, K, rank) of its trials, None if there is none.
    """

    device: torch.device
    reason: str | None
    rows: int = 1
    key: tuple | None = None


class PatchedForward:
    """Mixin of the swapped classes, each a subclass of its class `original`."""

    original: type
    own_forward: Callable[..., Tensor]  # of `original`, as it came
    op: str  # under which a fallback is counted

    def __init_subclass__(cls) -> None:
        if "original" in cls.__dict__:
            # What repr shows, and PEFT and accelerate ask for; pickle goes by __qualname__.
            cls.__name__ = cls.original.__name__
            cls.own_forward = cls.original.forward
            if cls.peer_forward is PatchedForward.peer_forward:
                cls.peer_forward = cls.original.forward  # a call less, of a microsecond

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, PatchedForward):  # a hook has kept this method over `unpatch`
            return type(self).forward(self, x, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        result = self._fused(x, args, kwargs, compiling)
        if type(result) is not Fallback:
            return result
        if not compiling:
            record_eager_fallback(self.op, result.reason)
        if result.answer is not None:
            return result.answer(self, x, *args, **kwargs)
        return self.peer_forward(x, *args, **kwargs)

    def peer_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the original class does."""
        return self.original.forward(self, x, *args, **kwargs)

    def _fused(self, x: Tensor, args: tuple, kwargs: dict, compiling: bool) -> Tensor | Fallback:
        """Return the output of our ops, or the reason against them with nothing changed.

        Args: compiling, whether a graph is traced.
        """
        raise NotImplementedError

    def outlook(self) -> Outlook:
        """Look at a layer with an adapter as it is now."""
        raise NotImplementedError


def active_names(layer: Any) -> list[str]:
    """Return the active adapters that a layer has, in PEFT's order."""
    group = layer._modules["lora_A"]
    adapters = group._modules or group._parameters  # LoRA keeps modules, AdaLoRA parameters
    active = layer.active_adapter
    return [name for name in ([active] if isinstance(active, str) else active) if name in adapters]


def extra_arguments(args: tuple, kwargs: dict) -> str | None:
    """Return the reason for a call with more than x that says something."""
    given = sorted(name for name, value in kwargs.items() if value is not None)
    if not args and not given:
        return None
    return f"extra arguments: {', '.join(given) or 'positional'}"


def unusual_tensor(**tensors: Tensor) -> str | None:
    """Return the reason to send one of these through torch's operators, named by its keyword.

    None for dense tensors without behavior. DTensor and other wrappers, subclasses that follow the
    results, and sparse layouts are not, nor is what a module may take that is no tensor at all.
    """
    for role, tensor in tensors.items():
        kind = type(tensor)
        if kind not in _PLAIN and (
            not issubclass(kind, Tensor)
            or hasattr(kind, "__tensor_flatten__")
            or kind.__torch_function__ is not torch._C._disabled_torch_function_impl
        ):
            return f"{role} is {kind.__name__}"
        if tensor.layout is not torch.strided:
            return f"{role} is {tensor.layout}"
    return None


def unusual_call(x: Tensor, compiling: bool) -> str | None:
    """Return the reason to send a call with this input through torch's operators.

    Beyond `unusual_tensor`: nested activations, those that autograd does not save, transforms that
    autograd functions with a plain backward pass take no part in, devices that no kernel serves.
    """
    reason = unusual_tensor(input=x)
    if reason is not None:
        return reason
    if x.is_nested:
        return "input is a nested tensor"
    if not compiling and x.is_inference() and torch.is_grad_enabled():
        return "input was made in inference mode"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transform"
    if not compiling and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if not (x.is_cpu or compiling):  # in a graph, the op itself falls back
        reason = dispatch.unserved(x.device)
        if reason is not None and dispatch.forced_backend() is None:
            return reason
    return None


def hooked(device: torch.device, **modules: nn.Module) -> str | None:
    """Return the reason to call one of these, named by its keyword, and not to read it.

    A hook, or a forward of its own, does more than the forward of its class. Those that accelerate
    puts on every module of a model on two devices do nothing to an input on the module's own.

    Args: device, of the input.
    """
    for role, module in modules.items():
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"hooks on {role}"
        if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
            if kept_forward(module) is None:
                return f"forward of {role} is replaced"
            effect = _effect(module.__dict__.get("_hf_hook"), device)
            if effect is not None:
                return f"accelerate's hook on {role} {effect}"
    return None


def _effect(hook: Any, device: torch.device) -> str | None:
    """Return what a hook of accelerate does to an input on this device; None for nothing."""
    if hook is None:  # it is removed
        return None
    if type(hook) is SequentialHook:
        effects = (_effect(one, device) for one in hook.hooks)
        return next((effect for effect in effects if effect is not None), None)
    if type(hook) is not AlignDevicesHook:
        return f"is {type(hook).__name__}"
    if hook.offload:
        return "loads its weights"
    target = hook.execution_device
    if isinstance(target, int):
        stays = target == device.index
    else:
        target = None if target is None else torch.device(target)
        stays = target is None or (
            target.type == device.type and target.index in (None, device.index)
        )
    return None if stays else f"moves its input to {target}"


def kept_forward(module: nn.Module) -> str | None:
    """Return the attribute in which a module itself keeps the forward of its class.

    accelerate's hooks keep it in `_old_forward`, and leave it behind in `forward`. Returns: "" if
    the class alone has it, None if calls of the module do not reach it.
    """
    own = module.__dict__
    name = "forward"
    if "_hf_hook" in own:
        wrapper = own.get(name)
        if type(wrapper) is not functools.partial or wrapper.func.__module__ != _HOOKS:
            return None
        name = "_old_forward"
    method = own.get(name)
    if method is None:
        return "" if name == "forward" else None
    kept = getattr(method, "__self__", None) is module and (
        method.__func__ in (type(module).forward, PatchedForward.forward)
    )
    return name if kept else None


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, of a unit of FSDP2 the one that FSDPModule was put before."""
    kind = type(module)
    return kind.__bases__[1] if _is_unit(kind) else kind


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Swap the class of a module, and with it the forward that its hooks call.

    What is a unit of FSDP2 stays one.
    """
    name, before = kept_forward(module), type(module)
    if _is_unit(before) and not _is_unit(kind):
        kind = _unit_of(kind, before)
    module.__class__ = kind
    if name:
        module.__dict__[name] = MethodType(kind.forward, module)


def _is_unit(kind: type) -> bool:
    """Return whether FSDP2 has made a class, of a kind of FSDPModule and a module's own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    bases = kind.__bases__
    return fsdp is not None and len(bases) == 2 and issubclass(bases[0], fsdp.FSDPModule)


@functools.cache
def _unit_of(kind: type, before: type) -> type:
    """Make FSDP2's class of another class than it was made of."""
    engine, own = before.__bases__
    name = before.__name__.removesuffix(own.__name__) + kind.__name__
    return type(name, (engine, kind), {"__deepcopy__": before.__deepcopy__})


def unusual_dropout(drop: nn.Module) -> str | None:
    """Return the reason to call an adapter's dropout module instead of reading its probability."""
    kind = type(drop)
    if kind is nn.Identity or (kind is nn.Dropout and drop.p != 1 and not drop.inplace):
        return None
    return f"lora_dropout is {drop}"


def parameters_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return `module.weight` and `module.bias`, without the time nn.Module takes to find them."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias


def refused(error: ArgumentError) -> Fallback:
    """Return the fallback for a refused argument, in words that are the same for every shape.

    Raises: a TruncatedWeightError again, where bitsandbytes would read on.
    """
    if isinstance(error, TruncatedWeightError):
        raise error
    return Fallback(str(error).partition(", got ")[0])
